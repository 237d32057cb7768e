"""Text sources: the same documents in the same order anywhere, and errors that name file and line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from fusionai.errors import DataError
from fusionai.training.data.sources import PIECE_CHARACTERS, text_documents


def test_a_file_is_one_document_with_plain_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n\xe2\x82\xac")
    assert list(text_documents(str(path))) == ["one\ntwo\nthree\n€"]


def test_a_long_file_comes_in_pieces_that_lose_nothing(tmp_path: Path) -> None:
    text = "".join(f"line {number} äöü€🙂\n" for number in range(60_000)) + "x" * (2 * PIECE_CHARACTERS + 5)
    path = tmp_path / "long.txt"
    path.write_text(text, encoding="utf-8", newline="")
    pieces = list(text_documents(str(path)))
    assert len(pieces) > 4
    assert max(map(len, pieces)) <= PIECE_CHARACTERS
    assert "".join(pieces) == text
    assert pieces[0].endswith("\n")


def test_a_folder_is_read_in_path_order_without_hidden_and_other_files(tmp_path: Path) -> None:
    files = {"b.txt": "B", "a/z.md": "AZ", "a-b/c.py": "AB", "B.txt": "upper", ".git/x.txt": "no", "i.png": "no"}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "c.jsonl").write_text('{"text": "J"}\n\n{"text": "  "}\n{"text": ""}\n{"text": "K"}\n')
    assert list(text_documents(str(tmp_path))) == ["upper", "AZ", "AB", "B", "J", "K"]


def test_json_lines_take_the_named_field(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text("\n".join(json.dumps({"body": text, "n": 1}) for text in ("é\nx", "two")) + "\n")
    assert list(text_documents(str(path), field="body")) == ["é\nx", "two"]


def test_half_a_surrogate_pair_becomes_text(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text('{"text": "cut \\ud83d emoji, whole \\ud83d\\ude42"}')
    assert list(text_documents(str(path))) == ["cut ? emoji, whole 🙂"]


def test_the_standard_library_is_large_ordered_and_free_of_tests() -> None:
    documents = text_documents("stdlib")
    first = [next(documents) for _ in range(20)]
    library = Path(os.__file__).parent
    assert first[0] == (library / "__future__.py").read_text(encoding="utf-8")
    again = text_documents("stdlib")
    assert first == [next(again) for _ in range(20)]
    rest = list(documents)
    assert sum(map(len, rest)) > 5_000_000
    tests = (library / "test" / "support" / "__init__.py", library / "site-packages" / "pytest" / "__init__.py")
    present = {path.read_text(encoding="utf-8") for path in tests if path.exists()}
    assert present.isdisjoint(rest)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "does not exist"),
        ("empty.txt", b"", "holds no text"),
        ("blank.txt", b" \n\t\n", "holds no text"),
        ("latin.txt", b"one\ntwo\ncaf\xe9\n", r"latin\.txt, line 3: byte 0xe9 is not UTF-8"),
        ("cut.txt", b"one\ntwo \xe2\x82", r"cut\.txt, line 2: byte 0xe2 is not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl, line 2: not valid JSON"),
        ("a.jsonl", b'{"text": "x"}\n[1]\n', r"a\.jsonl, line 2: must be a JSON object.*list"),
        ("a.jsonl", b'{"body": "x", "title": 1}\n', r"a\.jsonl, line 1: has no field 'text'.*'body', 'title'"),
        ("a.jsonl", b'{"text": 3}\n', r"a\.jsonl, line 1: the field 'text' must be text, is a int"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', r"a\.jsonl, line 2: byte 0xff"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl, line 1: not valid JSON"),
        ("a.jsonl", b"\n\n", "holds no text"),
    ],
)
def test_errors_name_file_and_line(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(text_documents(str(path)))


def test_the_line_is_right_far_into_a_file(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    lines = ["some text with ä in it".encode()] * 200_000
    lines[123_455] = b"broken \x80"
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(DataError, match="line 123456:"):
        list(text_documents(str(path)))


def test_errors_of_the_source_itself_come_at_once(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        text_documents(str(tmp_path / "nothing"))
    (tmp_path / "picture.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"no text files; .*\.txt"):
        text_documents(str(tmp_path))
