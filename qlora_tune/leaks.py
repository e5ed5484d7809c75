"""What must not leave this machine: its paths and names, secrets, and texts of the data that a run was trained on.

Station before export, which writes nothing that fails here. Whatever the base model's own files say is public already,
and so is what every model card says; neither counts as a find.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import re
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_tune.base import read_header
from qlora_tune.data import label_files
from qlora_tune.errors import DataError, ExportError
from qlora_tune.gguf_adapter import read_header_text
from qlora_tune.preferences import read_kept_pairs
from qlora_tune.prepare import data_files, heldout_files, load_files, training_files
from qlora_tune.runs import Run, fingerprint_files

COPIED = 40  # so many characters in a row of a text of the data, blanks evened out, are a copy of it
_STEP = COPIED // 2  # any COPIED characters hold a whole one of the pieces of this length that a text is cut into
SHORTEST_NAME = 4  # a shorter name stands in too many words' company to mean somebody
# Logins and hosts that are nobody's.
_COMMON_NAMES = {
    *("admin", "administrator", "colab", "container", "debian", "default", "docker", "fedora", "guest", "home", "host"),
    *("jovyan", "kaggle", "localhost", "machine", "nobody", "notebook", "root", "runner", "server", "student", "test"),
    *("ubuntu", "user", "users", "vagrant", "work", "worker", "workspace"),
}
# A vocabulary holds pieces of paths, and names, that are nobody's: each entry was frequent in the base's training text.
# So a vocabulary (tokenizer.model, vocab.json, merges.txt, that part of tokenizer.json) is searched for everything but
# names and paths in general.
_VOCABULARIES = ("tokenizer.model", "merges.txt")  # that are no JSON; the first is binary
_BORDER = "\0"  # between strings
_LOCAL_PATH = re.compile(r"(?<![\w.:/-])(?:/(?:home|root|Users|tmp|var|work|mnt|opt|content)/|[A-Za-z]:\\\\?)\S+")
# The forms in which services hand out keys, as their own secret scanners look for them.
_SECRETS = re.compile(
    r"\bhf_[A-Za-z0-9]{20,}\b"  # Hugging Face
    r"|\bsk-[A-Za-z0-9_-]{20,}"  # OpenAI, Anthropic
    r"|\bgh[opusr]_[A-Za-z0-9]{20,}\b|\bgithub_pat_[A-Za-z0-9_]{20,}\b"
    r"|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"  # AWS
    r"|\bglpat-[A-Za-z0-9_-]{20,}"  # GitLab
    r"|\bxox[abeoprs]-[A-Za-z0-9-]{10,}"  # Slack
    r"|\bAIza[0-9A-Za-z_-]{35}"  # Google
    r"|-----BEGIN [A-Z ]*PRIVATE KEY"
    r"|//[^\s/:@'\"]+:[^\s/@'\"]+@[\w.-]+"  # a password in an address
)


@dataclass(frozen=True)
class Private:
    """What is looked for: places and names of this machine, and texts of the run's own data."""

    places: frozenset[str]
    names: frozenset[str]
    texts: tuple[str, ...]


def find_private(run: Run, base: Path) -> Private:
    """Gather what must not leave with a run: where things lie here, who works here, and every text of its rows.

    Texts are the turns of training and held-out rows, and rejected rows, as far as the data files are still there
    (has_its_data).
    """
    places = {place.resolve() for place in (Path.home(), Path.cwd(), run.path, base)}
    names = {Path.home().name, _login(), socket.gethostname(), socket.gethostname().partition(".")[0]}
    return Private(
        frozenset(str(place) for place in places if len(place.parts) > 2),
        frozenset(name.lower() for name in names if len(name) >= SHORTEST_NAME and name.lower() not in _COMMON_NAMES),
        tuple(dict.fromkeys(_texts_of(run))),
    )


def has_its_data(run: Run) -> bool:
    """Whether the files that a run was trained on are there and the same; else their texts can't be looked for."""
    try:
        return bool(fingerprint_files(data_files(run.read_config())) == run.read_state()["data_fingerprint"])
    except (DataError, OSError):
        return False


def refuse_private(folder: Path, private: Private, base: Path, public: Iterable[str] = ()) -> None:
    """Raise ExportError when anything in a folder that is about to leave holds something private.

    Searched are names of files, whole text files (JSON as the strings it stands for), and what safetensors and GGUF
    files say of themselves; their tensors are loaded and compared elsewhere. Words of the files in the folder `base`
    and of the texts in `public` are known to the world, and so are the long entries of the base's vocabulary, such as
    rulers of 64 dashes; its short ones are no words of anybody's.
    """
    ours = [path for path in _files(base) if path.suffix in (".json", ".jinja") or path.name in _VOCABULARIES]
    texts = [found for path in ours for found in _read(path)]
    known = [*public, *(text for text, full in texts if full)]
    known_pieces = {piece for text in (*public, *(text for text, _ in texts)) for piece in _pieces(text)}
    known_words = set(re.findall(r"\w+", "\n".join(known).lower()))
    names = {name for name in private.names if name not in known_words}
    searched = [("the name of the export", folder.name, True)]
    for path in _files(folder):
        searched += [(path.name, text, full) for text, full in [(path.name, True), *_read(path)]]
    for where, text, full in searched:
        if found := _find_in(text, private.places, names if full else set(), full):
            raise ExportError(f"{where} holds {found}, which must not leave this machine.")
    pieces = {piece: where for where, text, _ in searched for piece in _pieces(text) if piece not in known_pieces}
    if copied := _find_copied(private.texts, pieces):
        raise ExportError(
            f"{pieces[copied]} holds {copied!r}, a text of the run's own data, which must not leave this machine."
        )


def _find_in(text: str, places: Iterable[str], names: Iterable[str], paths: bool) -> str | None:
    if place := next((place for place in places if place in text), None):
        return repr(place)
    if match := _SECRETS.search(text) or (_LOCAL_PATH.search(text) if paths else None):
        return repr(match.group()[:60])
    for name in names:
        if re.search(rf"(?<![^\W_]){re.escape(name)}(?![^\W_])", text, re.I):
            return f"{name!r} (a name of this user or machine: rename the run or file that carries it)"
    return None


def _find_copied(texts: Iterable[str], pieces: dict[str, str]) -> str | None:
    """The first of the pieces that stands in one of the texts. Looks up one short piece in every _STEP characters."""
    short = {piece[at : at + _STEP] for piece in pieces for at in range(COPIED - _STEP + 1)}
    for text in map(_even, texts):
        for at in range(0, len(text) - _STEP + 1, _STEP):
            if text[at : at + _STEP] in short:
                for start in range(max(0, at + _STEP - COPIED), min(at, len(text) - COPIED) + 1):
                    if text[start : start + COPIED] in pieces:
                        return text[start : start + COPIED]
    return None


def _pieces(text: str) -> Iterator[str]:
    """Every COPIED characters in a row; none crosses the border between two strings."""
    for even in map(_even, text.split(_BORDER)):
        yield from (even[at : at + COPIED] for at in range(len(even) - COPIED + 1))


def _even(text: str) -> str:
    """In lower case and with single blanks: line breaks and capitals hide no copy."""
    return " ".join(text.lower().split())


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def _read(path: Path) -> list[tuple[str, bool]]:
    """The texts of a file; False with those of a vocabulary, which is not searched for paths in general and names."""
    if path.suffix == ".safetensors":
        with path.open("rb") as stream:
            return [(_join(_strings(read_header(stream)[1].get("__metadata__"))), True)]
    if path.suffix == ".gguf":
        return [(read_header_text(path), True)]
    text = path.read_text(encoding="utf-8", errors="replace")
    if path.name in _VOCABULARIES:
        return [(_join(re.findall(r"[^\x00-\x1f\ufffd]{16,}", text)), False)]
    if path.suffix != ".json":
        return [(text, True)]
    try:
        content = json.loads(text)
    except ValueError:
        return [(text, True)]
    if path.name == "vocab.json":
        return [(_join(_strings(content)), False)]
    model = content.get("model") if path.name == "tokenizer.json" and isinstance(content, dict) else None
    vocabulary = [model.pop(name, None) for name in ("vocab", "merges")] if isinstance(model, dict) else []
    return [(_join(_strings(content)), True), (_join(_strings(vocabulary)), False)]


def _join(strings: Iterable[str]) -> str:
    return f"\n{_BORDER}".join(strings)


def _strings(content: Any) -> Iterator[str]:
    """Every string of a JSON value, keys too, as it is meant: no escape hides anything."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, dict):
        for key, value in content.items():
            yield key
            yield from _strings(value)
    elif isinstance(content, list):
        for value in content:
            yield from _strings(value)


def _login() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user without a name, as containers have
        return ""


def _texts_of(run: Run) -> Iterator[str]:
    config = run.read_config()
    examples = run.read_heldout()
    for files in (training_files, heldout_files):
        with contextlib.suppress(DataError, OSError):  # gone: has_its_data says so
            found = files(config)
            examples += load_files(config, found, label_files(found))[0] if found else []
    pairs = [pair for kept in read_kept_pairs(run.path) for pair in kept]
    examples += [pair.to_example() for pair in pairs]
    yield from (pair.rejected for pair in pairs)
    for example in examples:
        yield from _strings([dict(turn) for turn in example.messages])
    yield from _strings([problem.get("original") for problem in run.read_problems()])
