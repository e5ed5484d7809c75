"""Fetch the wheels that scripts/gpu_check.sh installs on a CUDA machine without network. Run it where pip works.

They go into wheels/, which git ignores. bitsandbytes is cut down to its CPU and its CUDA 13.0 library, because the
whole set has to travel with a checkout. Fails when a requirement of ours, or of a wheel, is neither brought nor
expected there.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator
from email.parser import Parser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
WHEELS = ROOT / "wheels"
LIMIT_BYTES = 60 * 2**20
# That machine's Python. pip matches each platform tag exactly, so every one that wheels are tagged with is named.
PYTHON_VERSION = "3.12"
PLATFORMS = (
    *(f"manylinux_2_{glibc}_x86_64" for glibc in (34, 31, 28, 27, 24, 17)),
    "manylinux2014_x86_64",
    "manylinux1_x86_64",
)
# The versions that the CPU tests run with; peft, rich and the typing packages are there too, in unknown versions.
BROUGHT = {
    "annotated-types": "0.8.0",
    "bitsandbytes": "0.50.2",
    "cyclopts": "5.4.0",
    "datasets": "5.2.0",
    "dill": "0.4.1",
    "docstring-parser": "0.18.0",
    "multiprocess": "0.70.19",
    "peft": "0.21.2",
    "pydantic": "2.14.3",
    "pydantic-core": "2.50.4",
    "rich": "15.0.0",
    "rich-rst": "2.2.0",
    "tomli-w": "1.2.0",
    "trl": "1.16.0",
    "typing-extensions": "4.16.0",
    "typing-inspection": "0.4.5",
}
# What is expected there already, with its version where it is known.
PRESENT = {
    "accelerate": "1.15.0",
    "attrs": "",
    "filelock": "",
    "fsspec": "",
    "huggingface-hub": "1.33.0",
    "jinja2": "",
    "markdown-it-py": "",
    "numpy": "2.5.2",
    "packaging": "",
    "pandas": "",
    "psutil": "",
    "pyarrow": "",
    "pygments": "",
    "pytest": "",
    "pytest-timeout": "",
    "pyyaml": "",
    "safetensors": "0.8.0",
    "tokenizers": "0.23.2",
    "torch": "2.11.0",
    "tqdm": "",
    "transformers": "5.17.0",
    "xxhash": "",
}
KEPT_LIBRARIES = ("libbitsandbytes_cpu.so", "libbitsandbytes_cuda130.so")


def main() -> int:
    """Fetch, cut down, check and list the wheels. Returns the exit code."""
    WHEELS.mkdir(exist_ok=True)
    for old in WHEELS.glob("*.whl"):
        old.unlink()  # two versions of one package would stop the install
    with tempfile.TemporaryDirectory() as scratch:
        download(Path(scratch))
        for wheel in sorted(Path(scratch).glob("*.whl")):
            if wheel.name.startswith("bitsandbytes-"):
                strip_bitsandbytes(wheel, WHEELS / wheel.name)
            else:
                shutil.copyfile(wheel, WHEELS / wheel.name)
    wheels = sorted(WHEELS.glob("*.whl"))
    for wheel in wheels:
        print(f"{wheel.stat().st_size / 2**20:7.2f} MiB  {wheel.name}")
    total = sum(wheel.stat().st_size for wheel in wheels)
    print(f"{total / 2**20:7.2f} MiB  in {len(wheels)} wheels")
    problems = list(find_unmet(wheels))
    if total > LIMIT_BYTES:
        problems.append(f"the wheels exceed {LIMIT_BYTES / 2**20:.0f} MiB")
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problems else 0


def download(folder: Path) -> None:
    """Download the wheels for that machine's Python, whatever Python runs this."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--implementation", "cp", "--python-version", PYTHON_VERSION, "--dest", str(folder)]
    command += [argument for platform in PLATFORMS for argument in ("--platform", platform)]
    subprocess.run([*command, *(f"{name}=={version}" for name, version in BROUGHT.items())], check=True)


def strip_bitsandbytes(source: Path, target: Path) -> None:
    """Copy the wheel without the libraries of other devices, and without their lines in RECORD."""
    with zipfile.ZipFile(source) as full, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as slim:
        kept = [entry for entry in full.infolist() if _is_kept(entry.filename)]
        for entry in kept:
            content = full.read(entry)
            if entry.filename.endswith(".dist-info/RECORD"):
                lines = content.decode().splitlines(keepends=True)
                content = "".join(line for line in lines if _is_kept(line.split(",")[0])).encode()
            slim.writestr(entry, content, zipfile.ZIP_DEFLATED)
    missing = set(KEPT_LIBRARIES) - {Path(entry.filename).name for entry in kept}
    if missing:
        raise SystemExit(f"error: {source.name} holds no {', '.join(sorted(missing))}")


def _is_kept(path: str) -> bool:
    name = Path(path).name
    return not name.startswith("libbitsandbytes_") or name in KEPT_LIBRARIES


def find_unmet(wheels: list[Path]) -> Iterator[str]:
    """Say for every requirement of the project and of the wheels that will not be met there what is missing."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    required = [("qlora-tune", line) for line in project["dependencies"]]
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            path = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
            metadata = Parser().parsestr(archive.read(path).decode())
        required += [(metadata["Name"], line) for line in metadata.get_all("Requires-Dist", [])]
    there = {**PRESENT, **BROUGHT}
    environment = {"extra": "", "python_version": PYTHON_VERSION, "python_full_version": f"{PYTHON_VERSION}.0"}
    environment |= {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"}
    for owner, line in required:
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate(environment):
            continue
        version = there.get(canonicalize_name(requirement.name))
        if version is None:
            yield f"{owner} needs {line}, which is neither brought nor expected there"
        elif version and not requirement.specifier.contains(version):
            yield f"{owner} needs {line}, there will be {version}"


if __name__ == "__main__":
    sys.exit(main())
