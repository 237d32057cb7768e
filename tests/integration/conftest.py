"""One pool of four compnodes, as real processes, for all integration tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fusionai.owner.local_pool import LocalPool
from quick_capture import remembered_captures
from quick_pool import QuickPool

sys.path.insert(0, str(Path(__file__).resolve().parent))


@pytest.fixture(scope="module", autouse=True)
def captures() -> Iterator[None]:
    """Capture each model once."""
    with remembered_captures():
        yield


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalPool]:
    """A broker and four compnodes with one thread each."""
    torch.set_num_threads(1)
    with QuickPool(4, folder=tmp_path_factory.mktemp("pool")) as pool:
        yield pool
