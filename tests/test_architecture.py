"""The walls of the house: imports point down, files stay small, and the graph and the planner stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parent.parent / "src" / "fusionai"
FILES = sorted(SOURCE.rglob("*.py"))

ROOT = {"errors", "tensor"}
MAY_IMPORT: dict[str, set[str]] = {
    "units": set(),
    "graph": {"units"},
    "network": {"units"},
    "execution": {"units", "graph"},
    "scheduling": {"units", "graph"},
    "simulation": {"units", "graph", "scheduling"},
    "pool": {"units", "graph", "network", "execution", "scheduling"},
    "training": {"units", "graph", "network", "execution", "scheduling", "pool"},
    "broker": {"units", "graph", "network", "execution", "scheduling", "pool", "training"},
    "compnode": {"units", "graph", "network", "execution", "scheduling", "pool", "training"},
    "owner": {"units", "graph", "network", "execution", "scheduling", "simulation", "pool", "training"},
    "cli": {
        *("units", "graph", "network", "execution", "scheduling", "simulation"),
        *("pool", "training", "broker", "compnode", "owner"),
    },
}
"""Which folders a folder may import; `errors` and `tensor` are for all.

The three roles (`broker`, `compnode`, `owner`) import no code of each other: what they share is in `pool` and below.
"""

MOST_LINES = 600
VAGUE = {"utils", "util", "helpers", "common", "manager", "misc"}


def imports(path: Path) -> set[str]:
    """Return the full names of the modules that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the full name"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def folder(path: Path) -> str:
    """Return the top folder of a source file, or "" for the files of the package itself."""
    parts = path.relative_to(SOURCE).parts
    return parts[0] if len(parts) > 1 else ""


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_source_file(path: Path) -> None:
    own = folder(path)
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "fusionai" or len(parts) < 2:
            continue
        target = parts[1]
        if own in MAY_IMPORT and target in MAY_IMPORT:
            allowed = MAY_IMPORT[own] | {own}
            assert target in allowed, f"{own} may import {sorted(allowed)}, but imports {name}"
        elif path.stem in ROOT and own == "":
            assert target in ROOT, f"{path.stem} is at the bottom and may not import {name}"
    assert path.stem not in VAGUE, "name the file after what it does"
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES, "two things in one file?"


def test_planning_and_simulating_stay_small() -> None:
    """What plans and simulates once was nearly half of the package, most of it for what the runtime cannot do."""
    lines = {
        path: len(path.read_text(encoding="utf-8").splitlines())
        for path in FILES
        if folder(path) in ("scheduling", "simulation")
    }
    assert max(lines.values()) <= 400
    assert sum(lines.values()) <= 15_000


def test_one_class_name_has_one_meaning() -> None:
    places: dict[str, list[Path]] = {}
    for path in FILES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(path)
    assert {name: paths for name, paths in places.items() if len(paths) > 1} == {}


def test_every_folder_has_a_place() -> None:
    folders = {path.name for path in SOURCE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == MAY_IMPORT.keys()


def test_only_execution_touches_autograd_and_devices() -> None:
    """Capture needs torch.export and fake tensors; nothing but execution differentiates or moves tensors.

    Only `unseen` names torch.autograd, to refuse modules that have their own backward passes.
    """
    for path in FILES:
        if folder(path) == "execution":
            continue
        text = path.read_text(encoding="utf-8")
        if path.name == "unseen.py":
            text = text.replace("torch.autograd.Function", "")
        for forbidden in ("torch.autograd", ".backward(", "torch.cuda", "torch.backends", 'device="cuda'):
            if forbidden == ".backward(" and "program.backward(" in text:
                text = text.replace("program.backward(", "")
            assert forbidden not in text, f"{path}: {forbidden}"


@pytest.mark.parametrize("package", ["graph", "scheduling", "simulation", "network"])
def test_imports_without_torch(package: str) -> None:
    """The IR, the planner and the network load on a machine without torch."""
    modules = [
        ".".join(("fusionai", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")
        for path in FILES
        if folder(path) == package and "capture" not in path.parts
    ]
    script = (
        "import sys, importlib\n"
        "for name in ('torch', 'transformers'): sys.modules[name] = None\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=250)
