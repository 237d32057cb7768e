"""Random modules train on two compnodes as in a plain loop of torch: some seeds of `benchmarks/differential.py`.

One command shows a seed's module and repeats it: `python benchmarks/differential.py --seed 17`.
"""

from __future__ import annotations

import pytest
from random_modules import draw_case
from trained_twice import TOLERANCE, compare

from fusionai.owner.local_pool import LocalPool

SEEDS = (0, 10, 11, 16, 20, 30, 31, 42, 61, 71, 79, 81, 92, 98, 108, 110, 123, 124, 258, 263)
"""Equal ones that have most of the operators and kinds of blocks between them."""


@pytest.mark.filterwarnings("ignore")  # torch's, about what the modules do
@pytest.mark.parametrize("seed", SEEDS)
def test_a_random_module(pool: LocalPool, seed: int) -> None:
    found = compare(seed, pool.token)
    shown = f"{found.text}\nto see it again: python benchmarks/differential.py --seed {seed}"
    assert found.outcome == "equal", shown
    assert found.rounding or found.deviation <= TOLERANCE, shown


def test_a_seed_draws_one_module() -> None:
    assert draw_case(17) == draw_case(17)
    assert draw_case(17).source != draw_case(18).source
