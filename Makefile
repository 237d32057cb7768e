# Two commands for a fresh machine: `make demo` and `make test`. Everything else is a part of them.
PYTHON ?= python3
VENV := .venv
ifeq ($(OS),Windows_NT)
BIN := $(VENV)/Scripts
else
BIN := $(VENV)/bin
endif
STAMP := $(VENV)/.installed
# A worker more than cores, because tests of pools wait much of their time; at most four, because each holds torch, a
# fork server and pools. A worker that is done takes over half of what another one has left.
WORKERS := --numprocesses $(shell $(PYTHON) -c "import os; print(min(4, os.cpu_count() + 1))") --dist worksteal

.PHONY: demo test lint types unit slow fuzz format clean

demo: $(STAMP)
	$(BIN)/fusionai demo

test: lint types unit

# torch comes first and by itself: constraints.txt pins it, so that nothing else pulls another build of it.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(BIN)/python -c "import pathlib; pathlib.Path('$(STAMP)').touch()"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

unit: $(STAMP)
	$(BIN)/python -m pytest $(WORKERS)

slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

# Property tests with examples that no run had before; a failure prints what reproduces it.
fuzz: $(STAMP)
	$(BIN)/python -m pytest --hypothesis-profile random -k "$(shell grep -rl '@given' tests | xargs -n1 basename -s .py | paste -sd, | sed 's/,/ or /g')"

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
