"""A what-if pool as a planner's link model: arrays say what single links say."""

from __future__ import annotations

import itertools

import numpy as np

from fusionai.owner.pool_file import parse_pool
from fusionai.scheduling.links import LinkModel

POOL = """
[owner]
gpu = "RTX 3060"
up_mbps = 40
down_mbps = 100
region = "here"

[[machines]]
gpu = "RTX 3080"
count = 2
up_mbps = 10
down_mbps = 250
region = "here"

[[machines]]
gpu = "RTX 4090"
up_mbps = 500
down_mbps = 900
region = "there"

[[regions]]
name = "here"

[[regions]]
name = "there"

[[routes]]
between = ["here", "there"]
mbps = 30
"""


def test_arrays_agree_with_single_links() -> None:
    pool = parse_pool(POOL)
    model: LinkModel = pool
    places = range(len(pool.machines))
    for one, other in itertools.permutations(places, 2):
        link = pool.link(one, other)
        assert model.bandwidths_bytes_per_s(np.asarray([one]), np.asarray([other])) == link.bandwidth_bytes_per_s
        assert model.rtts_s(np.asarray([one]), np.asarray([other])) == link.rtt_s
    everyone = np.arange(len(pool.machines))
    assert model.bandwidths_bytes_per_s(everyone[:, None], everyone[None]).shape == (4, 4)
