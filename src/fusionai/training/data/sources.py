"""Text sources: a file, a folder, a .jsonl file, or the source of Python's standard library.

Documents come one at a time and in the same order on every machine, so a corpus larger than memory can be used.
"""

from __future__ import annotations

import codecs
import io
import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from fusionai.errors import DataError

STANDARD_LIBRARY = "stdlib"

TEXT_SUFFIXES = frozenset(
    {".c", ".cpp", ".go", ".h", ".htm", ".html", ".java", ".jl", ".js", ".jsonl", ".md", ".ndjson", ".py"}
    | {".rs", ".rst", ".sh", ".sql", ".tex", ".text", ".ts", ".txt", ".xml"}
)
"""Endings of the files of a folder that are read. Other files (images, archives) are skipped."""

JSON_LINES_SUFFIXES = frozenset({".jsonl", ".ndjson"})

PIECE_CHARACTERS = 1 << 18
"""A text file longer than this becomes several documents, cut at line ends, so that none of them fills the memory."""

LINE_BYTES = 16 << 20
"""The longest line of a .jsonl file."""

_BLOCK_BYTES = 1 << 20
_TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})


def text_documents(source: str, *, field: str = "text") -> Iterator[str]:
    """Return the documents of a source: a text file, a folder (recursive), a .jsonl file or "stdlib".

    Files are read as UTF-8 and line ends become "\\n"; `field` is the field of each JSON object that holds the text.
    Files of a folder come in the order of their paths. Names with a leading dot are skipped, and so are documents of
    white space only. Raises DataError at once when the source does not exist. Raises it while reading when a file
    cannot be decoded (the error names file and line), and when the source has no text at all.
    """
    if source == STANDARD_LIBRARY:
        return _documents(_standard_library_files(), "the standard library", field)
    path = Path(source).expanduser()
    if path.is_dir():
        return _documents(_folder_files(path), f"the folder {path}", field)
    if path.is_file():
        return _documents([path], str(path), field)
    found = "is neither a file nor a folder" if path.exists() else "does not exist"
    raise DataError(f'data.text: {path} {found}; give a text file, a folder, a .jsonl file, or "{STANDARD_LIBRARY}"')


def _documents(files: list[Path], source: str, field: str) -> Iterator[str]:
    empty = True
    for path in files:
        pieces = _json_lines(path, field) if path.suffix.lower() in JSON_LINES_SUFFIXES else _text_pieces(path)
        try:
            for piece in pieces:
                if piece and not piece.isspace():
                    empty = False
                    yield piece
        except OSError as error:
            raise DataError(f"data.text: {path} cannot be read: {error.strerror or error}") from error
    if empty:
        raise DataError(f"data.text: {source} holds no text")


def _folder_files(folder: Path) -> list[Path]:
    def readable(path: Path) -> bool:
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        return not hidden and path.suffix.lower() in TEXT_SUFFIXES and path.is_file()

    # Sorted by parts: the order of Path objects depends on the system's path separator and case rules.
    files = sorted(filter(readable, folder.rglob("*")), key=lambda path: path.relative_to(folder).parts)
    if not files:
        raise DataError(
            f"data.text: the folder {folder} has no text files; their names must end in one of "
            + " ".join(sorted(TEXT_SUFFIXES))
        )
    return files


def _standard_library_files() -> list[Path]:
    """Return the library's modules, without tests and without files that a distribution adds or builds."""
    folder = Path(sysconfig.get_path("stdlib"))

    def part_of_library(path: Path) -> bool:
        parts = path.relative_to(folder).parts
        top = parts[0].removesuffix(".py")
        return top in sys.stdlib_module_names and _TEST_FOLDERS.isdisjoint(parts) and path.is_file()

    files = sorted(filter(part_of_library, folder.rglob("*.py")), key=lambda path: path.relative_to(folder).parts)
    if not files:
        raise DataError(
            f"data.text: this Python keeps no source of its standard library in {folder}; "
            "set data.text to a file or folder"
        )
    return files


def _text_pieces(path: Path) -> Iterator[str]:
    """Yield a file's text in pieces of about PIECE_CHARACTERS; a smaller file is one piece."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")(), translate=True)
    lines, held = 1, ""
    with path.open("rb") as file:
        while True:
            block = file.read(_BLOCK_BYTES)
            try:
                held += decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                # The decoder may still hold some bytes of the block before. They contain no line end.
                line = lines + error.object[: error.start].count(b"\n")
                raise DataError(_not_utf8(path, line, error)) from error
            if not block:
                break
            lines += block.count(b"\n")
            while len(held) > PIECE_CHARACTERS:
                end = held.rfind("\n", 0, PIECE_CHARACTERS) + 1 or PIECE_CHARACTERS
                yield held[:end]
                held = held[end:]
    if held:
        yield held


def _json_lines(path: Path, field: str) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(LINE_BYTES + 1), b""), 1):
            if len(line) > LINE_BYTES:
                raise DataError(f"{path}, line {number}: longer than {LINE_BYTES:,} bytes; is it JSON Lines?")
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(_not_utf8(path, number, error)) from error
            if text.strip():
                yield _field_of(text, field, f"{path}, line {number}")


def _field_of(text: str, field: str, place: str) -> str:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not valid JSON: {error}") from error
    if not isinstance(record, dict):
        raise DataError(f"{place}: must be a JSON object with a field {field!r}, is a {type(record).__name__}")
    if field not in record:
        fields = ", ".join(map(repr, list(record)[:20])) or "none"
        raise DataError(f"{place}: has no field {field!r}; its fields are: {fields}. Set data.field to one")
    value = record[field]
    if not isinstance(value, str):
        raise DataError(f"{place}: the field {field!r} must be text, is a {type(value).__name__}")
    # JSON can contain half of a surrogate pair, which no tokenizer accepts.
    return value.encode("utf-8", "replace").decode() if "\\u" in text else value


def _not_utf8(path: Path, line: int, error: UnicodeDecodeError) -> str:
    byte = error.object[error.start]
    return f"{path}, line {line}: byte 0x{byte:02x} is not UTF-8 text; convert the file to UTF-8, or leave it out"
