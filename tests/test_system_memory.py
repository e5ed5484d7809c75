"""Free memory is that of the container where there is one: past its limit a process is killed, not refused."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from qlora_tune import system_memory
from qlora_tune.system_memory import available_bytes, total_bytes

GB = 10**9
UNLIMITED = 9223372036854771712  # what version 1 says


@pytest.fixture
def mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 64 GB, 40 of them free, whose control groups a test writes."""
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=64 * GB, available=40 * GB))
    monkeypatch.setattr(system_memory, "_MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(system_memory, "_MOUNT", tmp_path / "mount")
    return tmp_path / "mount"


def join(mount: Path, *lines: str) -> None:
    (mount.parent / "membership").write_text("".join(f"{line}\n" for line in lines))


def write_v2(folder: Path, limit: int | str, used: int, idle_cache: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon {used - idle_cache}\ninactive_file {idle_cache}\nactive_file 0\n")


def write_v1(folder: Path, limit: int, used: int, idle_cache: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"inactive_file 1\ntotal_inactive_file {idle_cache}\n")


def test_without_groups_it_is_the_machines(mount: Path) -> None:
    assert (total_bytes(), available_bytes()) == (64 * GB, 40 * GB)
    join(mount, "12:memory:/", "3:cpu,cpuacct:/", "1:name=systemd:/", "0::/")
    assert (total_bytes(), available_bytes()) == (64 * GB, 40 * GB)


def test_the_tightest_group_up_to_the_machines_counts_and_idle_cache_is_free(mount: Path) -> None:
    join(mount, "0::/user.slice/job/step")
    write_v2(mount / "user.slice" / "job" / "step", "max", 6 * GB, 0)
    write_v2(mount / "user.slice" / "job", 8 * GB, 6 * GB, GB)
    write_v2(mount / "user.slice", 32 * GB, 30 * GB, 0)
    assert total_bytes() == 8 * GB
    assert available_bytes() == 2 * GB  # the user's other jobs leave less than this job has left
    write_v2(mount / "user.slice", 32 * GB, 10 * GB, 0)
    assert available_bytes() == 3 * GB
    write_v2(mount / "user.slice" / "job", 8 * GB, 9 * GB, 0)
    assert available_bytes() == 0


def test_a_container_that_sees_its_own_group_as_the_root(mount: Path) -> None:
    join(mount, "4:memory:/docker/0123abc", "0::/")
    write_v1(mount / "memory", 4 * GB, 3 * GB, GB // 2)
    assert (total_bytes(), available_bytes()) == (4 * GB, GB + GB // 2)
    write_v1(mount / "memory", UNLIMITED, 3 * GB, 0)
    assert (total_bytes(), available_bytes()) == (64 * GB, 40 * GB)


def test_groups_that_can_not_be_read_are_left_out(mount: Path) -> None:
    join(mount, "0::/job")
    write_v2(mount / "job", "what?", GB, 0)
    assert available_bytes() == 40 * GB
    write_v2(mount / "job", 4 * GB, GB, 0)
    (mount / "job" / "memory.stat").unlink()
    assert available_bytes() == 40 * GB


@pytest.fixture
def limited() -> Iterator[Path]:
    """A real control group with a limit of 1 GB; it takes root to make one."""
    for root, limit in (("/sys/fs/cgroup", "memory.max"), ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")):
        group = Path(root) / f"qlora-tune-test-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        if (group / limit).is_file():  # the kernel's own; else the controller is of the other version, or absent
            (group / limit).write_text(str(2**30))
            yield group
            group.rmdir()
            return
        group.rmdir()
    pytest.skip("a control group with a limit can't be made here: that needs root, and a memory controller")


def test_a_process_in_a_real_group_knows_its_limit(limited: Path) -> None:
    code = "from qlora_tune.system_memory import *; print(total_bytes(), available_bytes())"
    command = f'echo $$ > {limited}/cgroup.procs && exec "$0" -c "$1"'
    done = subprocess.run(["sh", "-c", command, sys.executable, code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    total, available = map(int, done.stdout.split())
    assert total == 2**30
    assert 0.8 * 2**30 < available < 2**30
