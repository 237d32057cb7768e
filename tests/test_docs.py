"""The documentation against the code: links, job files, fields, commands, and the examples themselves."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec
import pytest

import fusionai
from fusionai.cli.main import _parser
from fusionai.errors import ConfigError
from fusionai.training.config import JobConfig, job_from, parse_job, read_job
from quick_pool import PATIENCE_S, QuickPool

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*.md")])
EXAMPLES = sorted(ROOT.glob("examples/*.py"))

LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"^ {4}(?:>>> )?(fusionai .*)$", re.MULTILINE)
INLINE = re.compile(r"`(fusionai [^`]+)`")
# A path to a file of this project, as prose names it.
SOURCE = re.compile(r"`((?:src|tests|docs|benchmarks|examples)/[\w/.-]*\w)`")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


# --- links ----------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """Return the names under which a page's headings can be linked to."""
    titles = re.findall(r"^#+ (.+)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(text_of(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{name_of(page)} links to {target}, which does not exist"
        assert not anchor or anchor in anchors(found), f"{name_of(page)} links to {target}; it has {anchors(found)}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_are_named_exist(page: Path) -> None:
    for path in SOURCE.findall(text_of(page)):
        assert (ROOT / path).exists() or "NAME" in path or "<" in path, f"{name_of(page)} names {path}"


def test_every_page_is_found_from_the_readme() -> None:
    seen: set[Path] = set()
    waiting = [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in seen:
            continue
        seen.add(page)
        for target in LINK.findall(text_of(page)):
            found = (page.parent / target.partition("#")[0]).resolve()
            if found.is_dir() and (found / "README.md").exists():
                found = found / "README.md"
            if found.suffix == ".md" and found.exists():
                waiting.append(found)
    assert sorted(map(name_of, set(PAGES) - seen)) == []


# --- lines ----------------------------------------------------------------------------------------------------------

LONGEST_LINE = 160


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_lines_of_prose_fit_into_an_editor(page: Path) -> None:
    """Tables and code may be wider: they cannot be wrapped."""
    prose = FENCE.sub(lambda block: "\n" * block[0].count("\n"), text_of(page))
    lines = [(number, line) for number, line in enumerate(prose.splitlines(), 1) if not line.startswith(("|", "    "))]
    long = [number for number, line in lines if len(line) > LONGEST_LINE]
    assert not long, f"{name_of(page)}: lines {long} are longer than {LONGEST_LINE} characters; wrap them"


# --- job files ------------------------------------------------------------------------------------------------------


def toml_blocks() -> list[Any]:
    return [
        pytest.param(block, id=f"{name_of(page)}-{number}")
        for page in PAGES
        for number, (language, block) in enumerate(FENCE.findall(text_of(page)))
        if language == "toml" and page.name != "pool-file.md"  # tests/owner/test_pool_file.py reads that one
    ]


@pytest.mark.parametrize("block", toml_blocks())
def test_job_files_in_the_text_are_job_files(block: str) -> None:
    assert parse_job(block).name


def test_the_readme_has_a_job_file() -> None:
    assert any("README.md" in str(each.id) for each in toml_blocks())


@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/jobs/*.toml")), ids=name_of)
def test_example_jobs_are_job_files(path: Path) -> None:
    job = read_job(path)
    longest = (job.model.config or {})["max_position_embeddings"]
    assert job.data.sequence_length <= longest


# --- docs/job-file.md -----------------------------------------------------------------------------------------------

KINDS = {str: "text", int: "integer", float: "number", bool: "true or false"}


def written_kind(kind: Any) -> str:
    """Return a field's type as the page writes it."""
    options = [each for each in get_args(kind) if each is not type(None)]
    if get_origin(kind) is Literal:
        words = [f'`"{each}"`' for each in options]
        return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
    if get_origin(kind) is tuple:
        return f"{written_kind(options[0])}s"
    if get_origin(kind) is dict or (isinstance(kind, type) and issubclass(kind, msgspec.Struct)):
        return "table"
    if len(options) == 1:
        return written_kind(options[0])
    if type(None) in get_args(kind):
        return written_kind(options[0])
    return KINDS[kind]


def written_default(field: msgspec.structs.FieldInfo) -> str:
    """Return a field's default as the page writes it."""
    default = field.default
    if field.required:
        return "required"
    if default is None:
        return "none"
    if isinstance(default, msgspec.Struct):
        return f"`[{field.name}]`"
    return f"`{json.dumps(default)}`" if not isinstance(default, float) else f"`{default!r}`"


def fields(kind: type[msgspec.Struct], table: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Yield (table, field, type, default) of a job file, as docs/job-file.md should have them."""
    hints = get_type_hints(kind)
    for field in msgspec.structs.fields(kind):
        yield table, field.name, written_kind(hints[field.name]), written_default(field)
        if isinstance(hints[field.name], type) and issubclass(hints[field.name], msgspec.Struct):
            yield from fields(hints[field.name], field.name)


def documented() -> list[tuple[str, str, str, str, str, str]]:
    """Return (table, field, type, default, meaning, error) of every row of docs/job-file.md."""
    rows, table = [], ""
    for line in text_of(ROOT / "docs/job-file.md").splitlines():
        if match := re.fullmatch(r"## (?:`\[(\w+)\]`|Top level)", line):
            table = match[1] or ""
        elif match := re.fullmatch(r"\| `(\w+)` \| (.*) \|", line):
            kind, default, meaning, error = (cell.strip() for cell in re.split(r" \|(?: |$)", match[2]))
            rows.append((table, match[1], kind, default, meaning, error))
    return rows


def test_every_field_is_documented_as_it_is() -> None:
    found = [row[:4] for row in documented()]
    assert sorted(found) == sorted(fields(JobConfig))
    assert all(row[4] for row in documented()), "a field has no meaning"


GOOD: dict[str, Any] = {"name": "t", "model": {"config": {"model_type": "llama"}}}


@pytest.mark.parametrize("row", documented(), ids=lambda row: f"{row[0]}.{row[1]}")
def test_errors_of_values_are_as_documented(row: tuple[str, ...]) -> None:
    """A documented "... must be X, got Y" is what the loader says to Y."""
    table, field, _, _, _, errors = row
    for said in re.findall(r"`([\w.]+ must be [^`]*, got [^`]*)`", errors):
        value = said.rpartition(", got ")[2]
        wrong = tomllib.loads(f"value = {value}")["value"]
        job = {**GOOD, table: {field: wrong}}
        with pytest.raises(ConfigError, match=re.escape(said) + "$"):
            job_from(job, source="job.toml")


def test_the_error_column_is_tested() -> None:
    said = [row for row in documented() if " must be " in row[5] and ", got " in row[5]]
    assert len(said) >= 20


# --- commands -------------------------------------------------------------------------------------------------------


def commands() -> list[Any]:
    found = []
    for page in PAGES:
        text = text_of(page)
        blocks = "".join(f"    {line}\n" for _, block in FENCE.findall(text) for line in block.splitlines())
        lines = [*INDENTED.findall(text), *INDENTED.findall(blocks), *INLINE.findall(FENCE.sub("", text))]
        found += [pytest.param(line, id=f"{name_of(page)}: {line[:50]}") for line in lines]
    return found


@pytest.mark.parametrize("line", commands())
def test_commands_are_commands(line: str) -> None:
    words = shlex.split(line, comments=True)[1:]
    if words[0] != "--help" and all(word.startswith("--") for word in words[1:]):
        # Prose such as `fusionai train --json`, with arguments left out: command and options must exist.
        (choices,) = (each.choices for each in _parser()._actions if isinstance(each.choices, dict))
        assert set(words[1:]) <= choices[words[0]]._option_string_actions.keys()
        return
    if words == ["--help"]:
        return
    arguments = _parser().parse_args(words)
    for override in getattr(arguments, "overrides", []):
        name, equals, _ = override.partition("=")
        assert equals
        assert tuple(name.split(".")) in {(table, field) for table, field, *_ in fields(JobConfig)}


def test_every_command_is_shown() -> None:
    from fusionai.cli.main import COMMANDS

    shown = {shlex.split(str(each.values[0]), comments=True)[1] for each in commands()}
    assert shown - {"--help"} <= set(COMMANDS)
    assert set(COMMANDS) - shown <= {"demo"}, "demo is shown as `make demo`"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_in_the_text_is_python(page: Path) -> None:
    for language, block in FENCE.findall(text_of(page)):
        if language == "python":
            tree = ast.parse(block if not block.startswith("*") else f"({block})")
            for each in ast.walk(tree):
                if isinstance(each, ast.ImportFrom) and (each.module or "").split(".")[0] == "fusionai":
                    module = importlib.import_module(each.module or "")
                    for alias in each.names:
                        there = getattr(module, alias.name, None)
                        assert there is not None, f"{name_of(page)} imports {alias.name} from {each.module}"


# --- examples -------------------------------------------------------------------------------------------------------


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", EXAMPLES, ids=name_of)
def test_examples_import_and_use_the_public_api_only(path: Path) -> None:
    assert callable(load(path).main)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert not (node.module or "").startswith("fusionai"), f"line {node.lineno} imports from inside the package"
        if isinstance(node, ast.Import):
            assert all(not each.name.startswith("fusionai.") for each in node.names), f"line {node.lineno}"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "fusionai":
            assert node.attr in fusionai.__all__


def assert_trained(folder: Path, said: str) -> None:
    assert "trained on" in said
    records = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2]
    assert (folder / "run/checkpoints/step-000002/model.safetensors").exists()


def test_an_example_runs(tmp_path: Path) -> None:
    """As users run it: in a process of its own, which starts those of its pool."""
    result = subprocess.run(
        [sys.executable, str(ROOT / "examples/train_cnn.py"), "--steps", "2", "--run", str(tmp_path / "run")],
        cwd=tmp_path,
        env={**os.environ, "HOME": str(tmp_path), "XDG_DATA_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert_trained(tmp_path, result.stdout)


@pytest.mark.parametrize("path", [each for each in EXAMPLES if each.stem != "train_cnn"], ids=name_of)
def test_the_other_examples_run(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fusionai, "local_pool", QuickPool, raising=False)
    monkeypatch.setattr(sys, "argv", [str(path), "--steps", "2", "--run", str(tmp_path / "run")])
    load(path).main()
    assert_trained(tmp_path, capsys.readouterr().out)
