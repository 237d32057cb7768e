"""Links estimated from few probes: closed forms, sites, lies, and errors on made-up internets."""

from __future__ import annotations

import numpy as np
import pytest
from decoder_graph import decoder, member
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_internet import Internet
from training_problems import problem_of

from fusionai.broker.link_estimation import EstimatedLinks, LinkProbes, estimate_links
from fusionai.broker.network_coordinates import fit_coordinates
from fusionai.scheduling.links import PoolLinks
from fusionai.scheduling.planner import plan
from fusionai.scheduling.profile import UNMEASURED, AccessProfile, LinkProfile, Pool


def link(rtt_s: float, bandwidth: float) -> LinkProfile:
    return LinkProfile(rtt_s, bandwidth)


def symmetric(one: int, other: int, rtt_s: float, bandwidth: float) -> tuple[int, int, LinkProfile, LinkProfile]:
    return one, other, link(rtt_s, bandwidth), link(rtt_s, bandwidth)


def everyone(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return all ordered pairs of different machines."""
    source, target = np.nonzero(~np.eye(count, dtype=bool))
    return source, target


def test_coordinates_of_points_that_fit_exactly() -> None:
    """Round trips made from points in a plane and heights are found again, those left out of the probes too."""
    draw = np.random.default_rng(3)
    count = 40
    points, heights = draw.uniform(0, 0.1, (count, 2)), draw.uniform(0.002, 0.02, count)
    source, target = (each[np.less(*everyone(count))] for each in everyone(count))
    rtts = np.linalg.norm(points[source] - points[target], axis=1) + heights[source] + heights[target]
    kept = draw.random(len(rtts)) < 0.4
    found = fit_coordinates(source[kept], target[kept], rtts[kept], count)
    errors = np.abs(found.rtts_s(source[~kept], target[~kept]) / rtts[~kept] - 1)
    assert np.median(errors) < 0.01
    # Springs have local minima: of 40 machines, one or two may be caught on the wrong side.
    assert np.quantile(errors, 0.95) < 0.12
    assert (found.heights_N >= 0).all()


rates = st.floats(1e5, 1e9)


@given(st.lists(st.tuples(rates, rates), min_size=2, max_size=12))
@settings(deadline=None, max_examples=40)
def test_one_wide_partner_tells_all_bandwidths(lines: list[tuple[float, float]]) -> None:
    """Measured with a partner that is faster than everybody, min(up, down) of every unmeasured pair is exact."""
    count = len(lines)
    probes = LinkProbes.of([(each, count, link(0.05, up), link(0.05, down)) for each, (up, down) in enumerate(lines)])
    # The partner has a wide link with another wide one, so that its own rates are known to be larger.
    wide = LinkProbes.of([*zip_pairs(probes), symmetric(count, count + 1, 0.05, 1e11)])
    found = estimate_links(wide, count + 2)
    source, target = everyone(count)
    up, down = np.asarray(lines).T
    expected = np.minimum(up[source], down[target])
    np.testing.assert_allclose(found.bandwidths_bytes_per_s(source, target), expected)


def zip_pairs(probes: LinkProbes) -> list[tuple[int, int, LinkProfile, LinkProfile]]:
    return [
        (int(a), int(b), link(r, there), link(r, back))
        for a, b, r, there, back in zip(
            probes.sources,
            probes.targets,
            probes.rtts_s,
            probes.there_bytes_per_s,
            probes.back_bytes_per_s,
            strict=True,
        )
    ]


def test_slow_partners_bound_from_below() -> None:
    """A machine seen only through slow partners is taken for a typical one of those known to be faster."""
    pairs = [symmetric(each, 9, 0.05, 1e6 * (1 + each)) for each in range(8)]  # 9 is wide: 1 to 8 MB/s are known
    pairs += [symmetric(8, 0, 0.05, 1e6), symmetric(9, 10, 0.05, 1e9)]
    found = estimate_links(LinkProbes.of(pairs), 11)
    assert found.up_N[:8] == pytest.approx(np.arange(1, 9) * 1e6)
    assert 2e6 <= found.up_N[8] <= 8e6


def test_a_site_has_its_own_rates() -> None:
    """0, 1, 2 share a network, 0 and 2 were never probed; 3 is elsewhere; 4 is the broker."""
    pairs = [symmetric(0, 1, 5e-4, 1e8), symmetric(1, 2, 7e-4, 3e7)]
    pairs += [(each, 4, link(0.03, 2e6), link(0.03, 2e7)) for each in (0, 1, 2, 3)]
    pairs += [symmetric(4, 5, 0.03, 1e9)]
    found = estimate_links(LinkProbes.of(pairs), 6, anchor=4)
    assert found.site_N[0] == found.site_N[1] == found.site_N[2] >= 0
    assert found.site_N[3] == -1
    assert found.bandwidths_bytes_per_s(np.asarray(0), np.asarray(2)) == 3e7
    assert found.rtts_s(np.asarray(0), np.asarray(2)) == pytest.approx(6e-4)
    assert found.bandwidths_bytes_per_s(np.asarray(0), np.asarray(3)) == 2e6, "not what it sends to its neighbour"
    assert found.access(0).link_to(found.access(2)) == LinkProfile(pytest.approx(6e-4), 3e7, estimated=True)


def test_a_lie_makes_no_site() -> None:
    """Machine 0 says that it is next to 1 and 2; but 1 and 2 are 30 and 90 ms from the broker, and it 5."""
    pairs = [symmetric(each, 3, rtt_s, 1e6) for each, rtt_s in enumerate((0.005, 0.03, 0.09))]
    pairs += [symmetric(0, each, 1e-6, 1e11) for each in (1, 2)]
    assert (estimate_links(LinkProbes.of(pairs), 4).site_N[:3] >= 0).all(), "without an anchor it is believed"
    found = estimate_links(LinkProbes.of(pairs), 4, anchor=3)
    assert (found.site_N == -1).all()
    assert found.bandwidths_bytes_per_s(np.asarray(1), np.asarray(2)) <= 1e11


def test_nothing_known() -> None:
    found = estimate_links(LinkProbes.of([]), 3)
    assert found.bandwidths_bytes_per_s(*everyone(3)) == pytest.approx(UNMEASURED.bandwidth_bytes_per_s)
    assert not found.is_measured(*everyone(3)).any()


def internet_links(count: int, seed: int, probes: int) -> tuple[Internet, EstimatedLinks, LinkProbes]:
    net = Internet(count, seed)
    draw = np.random.default_rng(seed)
    ends = draw.integers(0, count, (count * probes, 2))
    pairs = np.concatenate([ends[ends[:, 0] != ends[:, 1]], [(each, count) for each in range(count)]])
    measured = net.probe(pairs, seed)
    return net, estimate_links(measured, net.count, anchor=count), measured


def test_pools_and_arrays_say_the_same() -> None:
    """The estimate as a `LinkModel`, by pairs of `AccessProfile` in a `Pool`, and as the links of that pool."""
    net, found, measured = internet_links(30, 1, 3)
    peers = [f"p{each}" for each in range(net.count)]
    access = {peer: found.access(index) for index, peer in enumerate(peers)}
    links = {
        f"p{source}>p{target}": LinkProfile(float(rtt), float(bandwidth))
        for sources, targets, rates in (
            (measured.sources, measured.targets, measured.there_bytes_per_s),
            (measured.targets, measured.sources, measured.back_bytes_per_s),
        )
        for source, target, rtt, bandwidth in zip(sources, targets, measured.rtts_s, rates, strict=True)
    }
    pool = Pool((), links, access)
    source, target = everyone(net.count)
    one_by_one = [pool.link(peers[one], peers[other]) for one, other in zip(source, target, strict=True)]
    dense = PoolLinks(pool, peers)
    np.testing.assert_allclose(dense.rtts_s(source, target), found.rtts_s(source, target))
    np.testing.assert_allclose(
        dense.bandwidths_bytes_per_s(source, target), found.bandwidths_bytes_per_s(source, target)
    )
    np.testing.assert_allclose(found.rtts_s(source, target), [each.rtt_s for each in one_by_one])
    np.testing.assert_allclose(
        found.bandwidths_bytes_per_s(source, target), [each.bandwidth_bytes_per_s for each in one_by_one]
    )
    assert [not each for each in found.is_measured(source, target)] == [each.estimated for each in one_by_one]
    assert pool.link("p0", "stranger") == UNMEASURED


@pytest.mark.parametrize("seed", [0, 1])
def test_errors_on_a_made_up_internet(seed: int) -> None:
    """Four probes of each machine: a sixth of the bandwidth error of the constant, a third of its round trips'."""
    net, found, _ = internet_links(200, seed, 4)
    source, target = everyone(200)
    other = ~found.is_measured(source, target)
    source, target = source[other], target[other]
    for estimate, truth, constant, share in (
        (found.rtts_s, net.rtts_s, UNMEASURED.rtt_s, 1 / 3),
        (found.bandwidths_bytes_per_s, net.bandwidths_bytes_per_s, UNMEASURED.bandwidth_bytes_per_s, 1 / 6),
    ):
        actual = truth(source, target)
        error = np.median(np.abs(estimate(source, target) / actual - 1))
        assert error < share * np.median(np.abs(constant / actual - 1))


def test_pipelines_are_planned_on_estimates() -> None:
    """Two fast sites far from each other and one slow machine in the middle: the pipeline stays in one site."""
    probes = [symmetric(each, 6, 0.04, 1e6) for each in range(6)]
    probes += [symmetric(0, 1, 5e-4, 1e9), symmetric(1, 2, 5e-4, 1e9), symmetric(3, 4, 5e-4, 1e9)]
    probes += [symmetric(4, 5, 5e-4, 1e9), symmetric(6, 7, 0.04, 1e9)]
    links = estimate_links(LinkProbes.of(probes), 8, anchor=6)
    members = [member(f"m{each}", memory_bytes=3_000_000) for each in range(6)]
    graph = decoder(4)
    made = plan(problem_of(graph, microbatches=4, members=tuple(members), links=links))
    sites = [{int(stage.peer[-1]) // 3 for stage in pipeline.stages} for pipeline in made.pipelines]
    assert any(len(pipeline.stages) > 1 for pipeline in made.pipelines)
    assert all(len(each) == 1 for each in sites)


def test_link_between_unlike_lines() -> None:
    one = AccessProfile(1e6, 9e6, (0.0, 0.0), 0.01)
    other = AccessProfile(5e6, 2e6, (0.03, 0.04), 0.02)
    assert one.link_to(other) == LinkProfile(pytest.approx(0.08), 1e6, estimated=True)
    assert other.link_to(one) == LinkProfile(pytest.approx(0.08), 5e6, estimated=True)
