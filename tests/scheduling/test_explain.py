"""Plans in words: names in runs."""

from __future__ import annotations

import pytest

from fusionai.scheduling.explain import brief_names


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ([], ""),
        (["a-1", "a-2", "b"], "a-1, a-2, b"),
        ([f"a-{number}" for number in range(1, 31)], "a-1 to a-30, 30 in all"),
        ([*(f"a-{number}" for number in range(1, 31)), "b-3"], "a-1 to a-30, b-3, 31 in all"),
        (["a-9", "a-10", "a-11", "a-13", "x", "y"], "a-9 to a-11, a-13, x, y, 6 in all"),
        (list("abcdefg"), "a, b, c, d, e and 2 more, 7 in all"),
        (["k08", "k09", "k10", "k11", "x", "y"], "k08 to k09, k10 to k11, x, y, 6 in all"),
    ],
)
def test_names_are_listed_in_runs(names: list[str], text: str) -> None:
    assert brief_names(names) == text
