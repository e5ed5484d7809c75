"""Documents to pairs by rule: a text and a template of tasks become questions and answers, each with its source.

Before the first station of a row's journey: what is written here is read as any file of rows. Nothing is made up:
every answer stands in its document, word for word.
"""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING, Annotated

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from qlora_tune.config import read_toml
from qlora_tune.data import label_files
from qlora_tune.errors import ConfigError, DataError, join_problems
from qlora_tune.row_files import to_row, write_rows
from qlora_tune.shapes import Example
from qlora_tune.turns import Message

if TYPE_CHECKING:
    from markdown_it.token import Token

DOCUMENT_FIELDS = ("title", "first_paragraph", "body", "text")
SECTION_FIELDS = ("section_title", "section")
MAX_DOCUMENT_CHARS = 4000
MAX_TITLE_CHARS = 100  # a longer first line of a text file is its first paragraph
_FRONT_MATTER = re.compile(r"\A---\n.*?\n(?:---|\.\.\.)(?:\n|\Z)", re.S)
_Text = Annotated[str, Field(min_length=1)]
_Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class Task:
    """One kind of pair: templates whose {fields} a passage fills; lengths are of the answer, in characters."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: _Text
    user: _Text
    assistant: _Text
    system: str = ""
    min_chars: _Count = 1
    max_chars: _Count | None = None

    @property
    def fields(self) -> frozenset[str]:
        """The fields that its templates name."""
        parts = (part for text in (self.system, self.user, self.assistant) for part in _parse_template(text))
        return frozenset(field for _, field in parts if field is not None)


@dataclass(frozen=True)
class Recipe:
    """The tasks to make from every document, and how long a piece of a document may be [characters]."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    task: Annotated[tuple[Task, ...], Field(min_length=1)]  # as the TOML tables are called: [[task]]
    max_document_chars: Annotated[int, Field(ge=100)] = MAX_DOCUMENT_CHARS


DEFAULT_RECIPE = Recipe(
    (
        Task("title", "Give this text a title.\n\n{body}", "{title}", max_chars=200),
        Task("opening", 'Write the opening paragraph of a text titled "{title}".', "{first_paragraph}", min_chars=40),
        Task("section title", "Give this section a heading.\n\n{section}", "{section_title}", max_chars=200),
    )
)


@dataclass(frozen=True)
class Passage:
    """A document, a piece of one, a section or a table's row, with the fields that a task may name."""

    source: str  # "notes.md:12", the line it starts on
    text: str
    fields: Mapping[str, str]


@dataclass(frozen=True)
class Skipped:
    """A task that gave no pair for a passage, or a passage that was left out of all tasks (no task's name)."""

    source: str
    task: str
    reason: str

    def __str__(self) -> str:
        return ": ".join(filter(None, (self.source, self.task, self.reason)))


@dataclass(frozen=True)
class Document:
    """One document, whole or in pieces, and its sections; a table's rows serve as both."""

    label: str
    field_names: frozenset[str]
    passages: tuple[Passage, ...]
    sections: tuple[Passage, ...]
    skipped: tuple[Skipped, ...]


@dataclass(frozen=True)
class PairReport:
    """The pairs, how many each task gave, and what was skipped with the reason."""

    examples: tuple[Example, ...]
    counts: Mapping[str, int]
    skipped: tuple[Skipped, ...]


@dataclass(frozen=True)
class _Block:
    """What stands between empty lines at a document's top level: a heading, paragraph, list, table or code."""

    text: str
    line: int
    level: int = 0  # of a heading
    heading: str = ""
    paragraph: str = ""


def make_pairs(paths: Sequence[str | Path], recipe: Recipe = DEFAULT_RECIPE) -> PairReport:
    """Fill every task's templates from every document (.txt, .md or .csv), in their order.

    Raises DataError naming every file that can't be read, ConfigError naming every field that no document has.
    """
    documents = read_documents(paths, recipe.max_document_chars)
    _check_fields(recipe, documents)
    made = [made for document in documents for task in recipe.task for made in _apply_task(task, document)]
    examples = tuple(item for item in made if isinstance(item, Example))
    skipped = [skip for document in documents for skip in document.skipped]
    skipped += [item for item in made if isinstance(item, Skipped)]
    by_task = Counter(example.task for example in examples)
    return PairReport(examples, {task.name: by_task[task.name] for task in recipe.task}, tuple(skipped))


def write_pairs(report: PairReport, path: Path) -> None:
    """Write the pairs as JSON Lines that say which rule made each, whole or not at all."""
    write_rows({path: [{**to_row(example), "made_by": f"rule:{example.task}"} for example in report.examples]})


def load_recipe(path: Path) -> Recipe:
    """Read a recipe from TOML. Raises ConfigError listing everything that is wrong with it."""
    try:
        recipe = TypeAdapter(Recipe).validate_python(read_toml(path))
    except ValidationError as error:
        problems = [f"{_place(item['loc'])}: {item['msg'].removeprefix('Input ')}" for item in error.errors()]
        heading = f"{path}: this recipe can't be used. Each [[task]] has name, user and assistant:"
        raise ConfigError(join_problems(heading, problems)) from None
    names = Counter(task.name for task in recipe.task)
    problems = [f'two tasks are called "{name}"' for name, count in names.items() if count > 1]
    for task in recipe.task:
        try:
            _ = task.fields
        except ValueError as error:
            problems.append(f'task "{task.name}": {error}; write {{{{ and }}}} for braces that stay')
    if problems:
        raise ConfigError(join_problems(f"{path}: this recipe can't be used:", problems))
    return recipe


def read_documents(paths: Sequence[str | Path], max_chars: int = MAX_DOCUMENT_CHARS) -> list[Document]:
    """Read .txt, .md and .csv files; split texts between paragraphs into pieces of at most max_chars characters.

    Raises DataError naming every file that can't be read.
    """
    readers = {".txt": _read_plain, ".md": _read_markdown, ".markdown": _read_markdown, ".csv": _read_table}
    labels = label_files(paths)
    documents: list[Document] = []
    problems: list[str] = []
    for path in dict.fromkeys(map(str, paths)):
        try:
            if (reader := readers.get(Path(path).suffix.lower())) is None:
                raise DataError(f"{path}: is no document that can be read. Expected .txt, .md or .csv.")
            documents.append(reader(_read_utf8(Path(path)), labels[path], max_chars))
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError(join_problems("These documents can't be read:", problems))
    return documents


def _place(loc: tuple[int | str, ...]) -> str:
    return " ".join(str(part + 1) if isinstance(part, int) else part for part in loc) or "recipe"


def _parse_template(template: str) -> list[tuple[str, str | None]]:
    """Split a template into pieces of text, each with the field that follows it. Raises ValueError on a lone brace."""
    parts: list[tuple[str, str | None]] = []
    for literal, name, spec, conversion in Formatter().parse(template):
        # A colon or an exclamation mark is part of a column's name here, not a format.
        tail = (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
        parts.append((literal, None if name is None else name + tail))
    return parts


def _fill(template: str, fields: Mapping[str, str]) -> str:
    return "".join(literal + (fields[name] if name is not None else "") for literal, name in _parse_template(template))


def _check_fields(recipe: Recipe, documents: Sequence[Document]) -> None:
    known = sorted(frozenset[str]().union(*(document.field_names for document in documents)))
    asked = [(task.name, name) for task in recipe.task for name in sorted(task.fields)]
    problems = [f'task "{task}" names {{{name}}}' for task, name in asked if name not in known]
    if problems:
        fields = ", ".join(f"{{{name}}}" for name in known)
        heading = f"Fields that no document has. They have {fields}; a recipe of your own names the fields to use:"
        raise ConfigError(join_problems(heading, problems))


def _apply_task(task: Task, document: Document) -> list[Example | Skipped]:
    missing = sorted(task.fields - document.field_names)
    kind, passages = "text", document.passages
    if task.fields & set(SECTION_FIELDS):
        kind, passages = "section", document.sections
    if missing or not passages:
        reason = f"the document has no {{{missing[0]}}}" if missing else f"the document has no {kind}"
        return [Skipped(f"{document.label}:1", task.name, reason)]
    return [_make_pair(task, passage) for passage in passages]


def _make_pair(task: Task, passage: Passage) -> Example | Skipped:
    empty = [name for name in sorted(task.fields) if not passage.fields.get(name, "").strip()]
    if empty:
        return Skipped(passage.source, task.name, f"{{{empty[0]}}} is missing or empty")
    system, user, answer = (_fill(text, passage.fields) for text in (task.system, task.user, task.assistant))
    if not task.min_chars <= len(answer) <= (task.max_chars or len(answer)):
        limits = f"{task.min_chars} to {task.max_chars}" if task.max_chars else f"at least {task.min_chars}"
        return Skipped(passage.source, task.name, f"the answer has {len(answer)} characters, expected {limits}")
    opening = [Message(role="system", content=system)] if system.strip() else []
    turns = (*opening, Message(role="user", content=user), Message(role="assistant", content=answer))
    return Example(turns, task.name, passage.source)


def _read_utf8(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror}.") from None
    try:
        text = content.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: not UTF-8 text. Save the file as UTF-8.") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _read_plain(text: str, label: str, max_chars: int) -> Document:
    blocks: list[_Block] = []
    for filled, numbered in itertools.groupby(enumerate(text.split("\n"), start=1), lambda item: bool(item[1].strip())):
        lines = list(numbered)
        if filled:
            content = "\n".join(line for _, line in lines).strip()
            blocks.append(_Block(content, lines[0][0], paragraph=content))
    first = blocks[0] if blocks else None
    if first and len(blocks) > 1 and "\n" not in first.text and len(first.text) <= MAX_TITLE_CHARS:
        blocks[0] = _Block(first.text, first.line, level=1, heading=first.text)
    return _to_document(blocks, label, max_chars)


def _read_markdown(text: str, label: str, max_chars: int) -> Document:
    from markdown_it import MarkdownIt

    # Front matter would be read as a rule and a heading; its lines stay counted.
    text = _FRONT_MATTER.sub(lambda found: "\n" * found[0].count("\n"), text)
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    starts = [i for i, token in enumerate(tokens) if token.level == 0 and token.nesting >= 0 and token.map]
    lines = text.split("\n")
    # Each to the next one's first line, so that link definitions, which are no token, stay in the text.
    bounds = [*((tokens[index].map or [0])[0] for index in starts), len(lines)]
    texts = ["\n".join(lines[begin:end]).strip("\n").rstrip() for begin, end in itertools.pairwise(bounds)]
    spans = zip(starts, texts, bounds, strict=False)
    blocks = [_to_block(tokens[i], tokens[i + 1 : i + 2], content, begin + 1) for i, content, begin in spans]
    if before := "\n".join(lines[: bounds[0]]).strip():
        blocks.insert(0, _Block(before, 1))
    return _to_document(blocks, label, max_chars)


def _to_block(token: Token, following: Sequence[Token], content: str, line: int) -> _Block:
    inline = [child for token in following for child in token.children or []]
    if token.type == "heading_open":
        plain = "".join(child.content for child in inline).strip()
        return _Block(content, line, level=int(token.tag[1]), heading=plain)
    # A line of badges is a paragraph without a word.
    if token.type == "paragraph_open" and any(child.type == "text" and child.content.strip() for child in inline):
        return _Block(content, line, paragraph=following[0].content)
    return _Block(content, line)


def _read_table(text: str, label: str, max_chars: int) -> Document:
    """A document a row: its fields are the columns, as text."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    passages: list[Passage] = []
    skipped: list[Skipped] = []
    line = 1
    try:
        columns = next(reader, [])
        if not all(columns) or len(set(columns)) < len(columns) or not columns:
            raise DataError(f"{label}:1: its columns are {columns}. Expected a first line that names each column once.")
        line = reader.line_num + 1
        for cells in reader:
            source = f"{label}:{line}"
            line = reader.line_num + 1
            if len(cells) != len(columns):
                if cells:
                    skipped.append(Skipped(source, "", f"the row has {len(cells)} cells, expected {len(columns)}"))
            elif sum(map(len, cells)) > max_chars:
                skipped.append(Skipped(source, "", f"the row is longer than max_document_chars ({max_chars})"))
            else:
                fields = dict(zip(columns, cells, strict=True))
                described = "\n".join(f"{name}: {cell}" for name, cell in fields.items())
                passages.append(Passage(source, described, fields))
    except csv.Error as error:
        raise DataError(f"{label}:{line}: not valid CSV: {error}. Save the table as CSV with commas.") from None
    rows = tuple(passages)
    return Document(label, frozenset(columns), rows, rows, tuple(skipped))


def _to_document(blocks: list[_Block], label: str, max_chars: int) -> Document:
    title = next((block for block in blocks if block.level == 1), None)
    skipped = [
        Skipped(f"{label}:{block.line}", "", f"a paragraph is longer than max_document_chars ({max_chars})")
        for block in blocks
        if len(block.text) > max_chars
    ]
    if not blocks:
        skipped.append(Skipped(f"{label}:1", "", "the document is empty"))
    passages = [_to_passage(piece, title, label) for piece in _pieces(blocks, max_chars)]
    sections = _to_sections(blocks, title, label, max_chars)
    return Document(label, frozenset(DOCUMENT_FIELDS + SECTION_FIELDS), tuple(passages), sections, tuple(skipped))


def _to_passage(piece: list[_Block], title: _Block | None, label: str) -> Passage:
    """A piece has the document's title only where it holds it: the rest of a long text says little about its title."""
    fields = {
        "title": title.heading if title and title in piece else "",
        "first_paragraph": next((block.paragraph for block in piece if block.paragraph), ""),
        "body": _join(block for block in piece if block is not title),
        "text": _join(piece),
    }
    return Passage(f"{label}:{piece[0].line}", fields["text"], fields)


def _to_sections(blocks: list[_Block], title: _Block | None, label: str, max_chars: int) -> tuple[Passage, ...]:
    """What follows each heading but the title, up to the next heading of any level."""
    starts = [index for index, block in enumerate(blocks) if block.level]
    sections: list[Passage] = []
    for start, end in itertools.pairwise([*starts, len(blocks)]):
        heading = blocks[start]
        for piece in _pieces(blocks[start:end], max_chars) if heading is not title else ():
            fields = {
                "title": title.heading if title else "",
                "section_title": heading.heading if heading in piece else "",
                "section": _join(block for block in piece if block is not heading),
            }
            sections.append(Passage(f"{label}:{piece[0].line}", _join(piece), fields))
    return tuple(sections)


def _pieces(blocks: Sequence[_Block], max_chars: int) -> Iterator[list[_Block]]:
    """Blocks in as few pieces as max_chars allows, in order; a block that is longer by itself ends a piece."""
    piece: list[_Block] = []
    for block in blocks:
        if piece and len(_join([*piece, block])) > max_chars:
            yield piece
            piece = []
        if len(block.text) <= max_chars:
            piece.append(block)
    if piece:
        yield piece


def _join(blocks: Iterable[_Block]) -> str:
    return "\n\n".join(block.text for block in blocks)
