"""Plans of real (hand-made) OP-DAGs: constraints are met, nothing better exists, errors say what is missing."""

from __future__ import annotations

import itertools
import re
import time
from typing import Any

import msgspec
import pytest
from decoder_graph import GB, SIZES, decoder, member, pool
from every_plan import OWNER, every_plan
from training_problems import one_pipeline

from fusionai.errors import ConfigError, PlacementError
from fusionai.graph.cost import stage_cost
from fusionai.graph.cuts import boundary_bytes, cut, cut_points
from fusionai.graph.model import OpDag
from fusionai.graph.privacy import arrange_private
from fusionai.graph.verify import verify
from fusionai.scheduling import planner
from fusionai.scheduling.estimator import update_s
from fusionai.scheduling.explain import holding, shortage_texts
from fusionai.scheduling.plan import Plan
from fusionai.scheduling.profile import LinkProfile, Member, Pool
from fusionai.scheduling.segments import MEMORY_MARGIN, make_segments


def plan(graph: OpDag, pool: Pool, *, owner: Member = OWNER, **options: Any) -> Plan:
    return planner.plan(one_pipeline(graph, pool, owner, **options))


def peers(made: Plan) -> list[str]:
    return [stage.peer.removeprefix("p-") for stage in made.stages]


def test_the_graph_of_these_tests_is_valid() -> None:
    verify(decoder(3, fillers=2))
    verify(decoder(3, tied=True))


def test_stages_cover_the_graph_once() -> None:
    graph = decoder(6)
    made = plan(graph, pool(member("a"), member("b")), compnodes=2)
    bounds = [(stage.start, stage.stop) for stage in made.stages]
    assert bounds[0][0] == 0
    assert bounds[-1][1] == len(graph.nodes)
    assert all(one[1] == other[0] for one, other in itertools.pairwise(bounds))
    assert len(cut(graph, made.cuts)) == len(made.stages) == 2
    assert {stage.peer for stage in made.stages} == {"p-a", "p-b"}


def test_work_follows_speed() -> None:
    graph = decoder(24)
    made = plan(graph, pool(member("slow", gflops=25), member("fast", gflops=75)), compnodes=2, microbatches=64)
    shares = {stage.peer: stage.stop - stage.start for stage in made.stages}
    assert shares["p-fast"] / len(graph.nodes) == pytest.approx(0.75, abs=0.06)


def test_private_jobs_pin_the_ends_to_the_owner() -> None:
    graph, front, back = arrange_private(decoder(6))
    made = plan(decoder(6), pool(member("a"), member("b"), owner=OWNER), private=True, compnodes=2)
    assert peers(made)[0] == peers(made)[-1] == "owner"
    assert set(peers(made)[1:-1]) == {"a", "b"}
    assert made.cuts[0] == front
    assert made.cuts[-1] == back
    subdags = cut(graph, made.cuts)
    for subdag in subdags[1:-1]:
        assert not subdag.inputs
    assert subdags[-1].loss == graph.loss
    assert [len(made.stages_of(peer)) for peer in ("p-owner", "p-a", "p-b")] == [2, 1, 1]


def test_the_owner_updates_a_weight_of_both_its_stages_once() -> None:
    graph = decoder(6, tied=True)
    made = plan(graph, pool(member("a"), owner=OWNER), private=True, compnodes=1)
    untied = plan(decoder(6), pool(member("a"), owner=OWNER), private=True, compnodes=1)

    def updating_s(made: Plan) -> float:
        return sum(stage.predicted.update_s for stage in made.stages_of("p-owner"))

    table_bytes = 256 * 64 * 4
    assert updating_s(untied) - updating_s(made) == pytest.approx(update_s(table_bytes, OWNER.device, 2))


@pytest.mark.parametrize(("rtt_s", "bytes_per_s"), [(1e-4, 1e10), (5e-3, 1e8), (5e-2, 2e6)])
@pytest.mark.parametrize("microbatches", [1, 4, 16])
def test_nothing_is_faster_by_the_schedule_itself(rtt_s: float, bytes_per_s: float, microbatches: int) -> None:
    """Every set, order and cut, each worked through as a schedule: the plan is within 2 % of the best."""
    graph = decoder(5)
    members = [member("a", gflops=40), member("b", gflops=100), member("c", gflops=70)]
    offered = pool(*members, rtt_s=rtt_s, bytes_per_s=bytes_per_s, owner=OWNER)
    every = every_plan(one_pipeline(graph, offered, OWNER, microbatches=microbatches), cut_points(graph, SIZES))
    best = min(each.step_s for each in every)
    assert plan(graph, offered, microbatches=microbatches).predicted_step_s <= 1.02 * best


@pytest.mark.parametrize("microbatches", [1, 2, 3])
def test_what_ends_the_step_is_seen_where_microbatches_are_few(microbatches: int) -> None:
    """A stage of one operator before the others would hide their last products, were they not to end the step."""
    members = [member("a", gflops=20), member("b", gflops=100), member("c", gflops=50)]
    offered = pool(*members, rtt_s=5e-3, bytes_per_s=1e8, owner=OWNER)
    made, alone = (
        plan(decoder(2, hidden=512), offered, microbatches=microbatches, compnodes=compnodes) for compnodes in (0, 1)
    )
    assert made.predicted_step_s <= alone.predicted_step_s


def test_slow_compnodes_and_slow_links_are_left_out() -> None:
    graph = decoder(12)
    made = plan(graph, pool(member("a"), member("b"), member("snail", gflops=0.1)))
    assert set(peers(made)) == {"a", "b"}
    assert any("snail" in line for line in made.explanation)
    far = pool(member("a"), member("b"), rtt_s=0.2, bytes_per_s=1e5)
    assert len(plan(graph, far).stages) == 1
    assert len(plan(graph, far, compnodes=2).stages) == 2, "the job's own number is obeyed"


def test_the_chain_avoids_the_slow_link() -> None:
    near, far = LinkProfile(1e-4, 1e9), LinkProfile(0.1, 1e6)
    members = [member(name) for name in "abcd"]
    links = {}
    for one, other in itertools.permutations("abcd", 2):
        same_city = {one, other} in ({"a", "c"}, {"b", "d"})
        joined = {one, other} == {"c", "b"}
        links[f"p-{one}>p-{other}"] = near if same_city or joined else far
    made = plan(decoder(12), Pool(tuple(members), links), compnodes=4)
    assert "".join(peers(made)) in ("acbd", "dbca")


def test_slow_links_get_more_in_flight() -> None:
    members = member("a"), member("b")
    graph = decoder(12)
    near = plan(graph, pool(*members, rtt_s=0.0, bytes_per_s=1e12), compnodes=2, microbatches=32)
    far = plan(graph, pool(*members, rtt_s=0.02, bytes_per_s=1e9), compnodes=2, microbatches=32)
    assert [stage.in_flight for stage in near.stages] == [2, 1]
    assert far.stages[0].in_flight > 2
    assert far.stages[1].in_flight == 1
    for made in (near, far):
        held = [stage.in_flight for stage in made.stages]
        assert held == sorted(held, reverse=True), "a rise would lock the pipeline"


def whole_need_bytes(graph: OpDag, in_flight: int) -> float:
    # On a CPU the heap holds one microbatch's activations more.
    return stage_cost(cut(graph, [])[0], SIZES).training_bytes(in_flight + 1, 2) * MEMORY_MARGIN


def test_memory_is_respected() -> None:
    graph = decoder(16, hidden=128)
    need = whole_need_bytes(graph, 2)
    offer = int(0.62 * need)
    for fast in ("a", "b"):
        members = [member(name, memory_bytes=offer, gflops=500 if name == fast else 20) for name in "ab"]
        made = plan(graph, pool(*members))
        assert len(made.stages) == 2, "the fast one alone would be faster, but cannot hold it"
        for stage in made.stages:
            assert stage.predicted.memory_bytes * MEMORY_MARGIN <= offer


def test_predicted_memory_is_that_of_the_stages() -> None:
    graph = decoder(8)
    made = plan(graph, pool(member("a"), member("b", device="cuda:0"), member("c")), compnodes=3)
    for stage, subdag in zip(made.stages, cut(graph, made.cuts), strict=True):
        held = stage.in_flight + (stage.peer != "p-b")  # a CPU's heap holds one microbatch more
        assert stage.predicted.memory_bytes == stage_cost(subdag, SIZES).training_bytes(held, 2)


def test_less_is_held_in_flight_where_memory_is_short() -> None:
    graph = decoder(8, hidden=32)
    sizes = {"b": 16, "t": 256}  # activations outweigh weights
    members = [member("a"), member("b")]
    roomy = plan(graph, pool(*members), compnodes=2, sizes=sizes, microbatches=16)
    assert roomy.stages[0].in_flight >= 2
    halves = [stage_cost(subdag, sizes) for subdag in cut(graph, roomy.cuts)]
    offer = int(max(cost.training_bytes(2, 2) for cost in halves) * MEMORY_MARGIN * 1.1)
    tight = [member("a", memory_bytes=offer), member("b", memory_bytes=offer)]
    made = plan(graph, pool(*tight), compnodes=2, sizes=sizes, microbatches=16)
    assert made.stages[0].in_flight == 1
    assert made.predicted_step_s > roomy.predicted_step_s


@pytest.mark.parametrize("tied", [False, True])
def test_sums_over_segments_match_the_stages_they_stand_for(tied: bool) -> None:
    graph = decoder(6, tied=tied)
    points = cut_points(graph, SIZES)
    positions = [0, *points, len(graph.nodes)]
    segments = make_segments(graph, SIZES, positions, optimizer_states=2)
    for first, last in itertools.combinations(range(len(positions)), 2):
        inner = [positions[place] for place in (first, last) if 0 < positions[place] < len(graph.nodes)]
        subdag = cut(graph, inner)[1 if positions[first] > 0 else 0]
        exact = stage_cost(subdag, SIZES)
        weights = 4 * exact.trainable_bytes + exact.other_bytes + exact.fixed_bytes + exact.transient_bytes
        # The working set of a range is not that of any of its segments: a guide, which the evaluation corrects.
        assert segments.fixed_bytes_PP[first, last] == pytest.approx(weights, rel=0.2)
        assert segments.flight_bytes_PP[first, last] == pytest.approx(exact.saved_bytes, rel=0.1)
    for place, position in enumerate(positions[1:-1], start=1):
        forward, gradient = boundary_bytes(cut(graph, [position]), SIZES)[0, 1]
        assert (segments.forward_bytes_P[place], segments.gradient_bytes_P[place]) == (forward, gradient)


def test_given_cuts_are_taken() -> None:
    graph = decoder(6)
    middle = cut_points(graph, SIZES)[2]
    made = plan(graph, pool(member("a"), member("b", gflops=10)), cuts=[middle])
    assert made.cuts == (middle,)
    heavy = max(made.stages, key=lambda stage: stage.stop - stage.start)
    assert heavy.peer == "p-a", "who runs which part is still the planner's"
    assert len(plan(graph, pool(member("a"), member("b")), cuts=[]).stages) == 1


def test_unlinkable_pairs_are_not_neighbours() -> None:
    members = [member("a", dialable=False), member("b", dialable=False), member("c")]
    made = plan(decoder(9), pool(*members), compnodes=3)
    assert peers(made)[1] == "c"


def test_bf16_rates_go_first() -> None:
    device = member("a").device
    both = {"matmul.bf16": 10 * device.flops_per_s["matmul"], **device.flops_per_s}
    quick = msgspec.structs.replace(member("a"), device=msgspec.structs.replace(device, flops_per_s=both))
    graph = decoder(4, hidden=256)
    slow_s = plan(graph, pool(quick), precision="fp32").predicted_step_s
    assert plan(graph, pool(quick), precision="bf16").predicted_step_s < 0.5 * slow_s


def test_a_plan_survives_the_wire() -> None:
    made = plan(decoder(6), pool(member("a"), member("b"), owner=OWNER), private=True)
    assert msgspec.json.decode(msgspec.json.encode(made), type=Plan) == made


def test_the_explanation_names_machines_layers_and_the_limit() -> None:
    made = plan(decoder(8), pool(member("alice"), member("bob"), owner=OWNER), private=True, compnodes=2)
    text = "\n".join(made.explanation)
    assert "stage 0 on owner: embed" in text
    assert "layers.0-" in text
    assert "alice" in text
    assert "bob" in text
    assert made.bottleneck in text
    assert "computing on" in made.bottleneck
    slow_links = plan(decoder(8), pool(member("alice"), member("bob"), bytes_per_s=1e5), compnodes=2)
    assert "the link from" in slow_links.bottleneck


@pytest.mark.parametrize(
    ("need_bytes", "offered_bytes", "texts"),
    [
        (104_166_999.5, 104_000_000, ("104.17 MB", "104 MB", "167 kB")),
        (13_421_100, 13_400_000, ("13.422 MB", "13.4 MB", "21.1 kB")),
        (25_605_000_000, 16_000_000_000, ("25.7 GB", "16 GB", "9.61 GB")),
        (1_000_000_001, 999_999_999, ("1.000000001 GB", "999.999999 MB", "2 bytes")),
        (2_300_000, 8, ("2.3 MB", "8 bytes", "2.3 MB")),
        (104_010_000, 104_050_000, ("104.01 MB", "104.05 MB", "0 bytes")),  # enough, and reads so
    ],
)
def test_small_shortages_show_in_the_digits(need_bytes: float, offered_bytes: int, texts: tuple[str, ...]) -> None:
    assert shortage_texts(need_bytes, offered_bytes) == texts


def test_holding_prefers_parts_over_wholes() -> None:
    graph = decoder(3)
    assert holding(graph.nodes) == "layers.0-2, embed, head, loss"


class TestErrors:
    """Every impossible job says what was asked, what was found, and what helps."""

    def test_no_compnodes(self) -> None:
        with pytest.raises(PlacementError, match="fusionai join TOKEN"):
            plan(decoder(2), pool())

    def test_too_few_compnodes(self) -> None:
        with pytest.raises(PlacementError, match="asks for 3 compnodes, but only 2"):
            plan(decoder(4), pool(member("a"), member("b")), compnodes=3)

    def test_part_too_large(self) -> None:
        small = [member("a", memory_bytes=10_000), member("best", memory_bytes=20_000)]
        with pytest.raises(PlacementError, match=r"needs .*B, but the best compnode, best, offers 20 kB.*--memory"):
            plan(decoder(4), pool(*small))

    def test_pool_too_small(self) -> None:
        graph = decoder(16)
        offer = int(whole_need_bytes(graph, 1) / 6)
        with pytest.raises(
            PlacementError, match=r"needs at least .*2 compnodes .* offer .* are missing; add compnodes"
        ):
            plan(graph, pool(*(member(name, memory_bytes=offer) for name in "ab")))

    def test_how_many_more_like_the_best_would_do(self) -> None:
        graph = decoder(16)
        offer = int(whole_need_bytes(graph, 1) / 6)

        def members(count: int) -> list[Member]:
            return [member(f"m{number}", memory_bytes=offer) for number in range(count)]

        with pytest.raises(PlacementError) as refused:
            plan(graph, pool(*members(2)))
        found = re.search(r"add compnodes \((\d+) like m0 could hold it\)", str(refused.value))
        assert found is not None
        enough = int(found[1])
        assert len(plan(graph, pool(*members(enough))).stages) == enough
        with pytest.raises(PlacementError, match=f"{enough} like m0"):
            plan(graph, pool(*members(enough - 1)))

    def test_both_shortages_are_said_at_once_and_the_advice_suffices(self) -> None:
        graph = decoder(16)
        with pytest.raises(PlacementError) as refused:
            plan(graph, pool(member("a", memory_bytes=20_000), member("b", memory_bytes=20_000)))
        found = re.search(
            r"^with a margin of 15 %, .* largest part needs (\S+) (.B), but the best compnode, a, offers 20 kB, and "
            r"training .* needs at least .*2 compnodes .* offer 40 kB: .* are missing; add compnodes, one with at "
            r"least \1 \2 \((\d+) with \1 \2 each could hold the model\)",
            str(refused.value),
        )
        assert found is not None, refused.value
        offer = int(float(found[1]) * {"kB": 1e3, "MB": 1e6}[found[2]])
        members = [member(f"m{number}", memory_bytes=offer) for number in range(int(found[3]))]
        assert plan(graph, pool(*members)).stages

    def test_a_part_is_too_large_for_machines_that_hold_enough_together(self) -> None:
        graph, members = decoder(2, hidden=256), [member(f"m{number}", memory_bytes=9_500_000) for number in range(20)]
        with pytest.raises(PlacementError) as refused:
            plan(graph, pool(*members))
        found = re.search(r"offers 9.5 MB; add a compnode that offers at least (\S+) MB, raise", str(refused.value))
        assert found is not None, refused.value
        assert "are missing" not in str(refused.value)
        with pytest.raises(PlacementError) as again:
            plan(graph, pool(*members, member("more", memory_bytes=int(float(found[1]) * 1e6))))
        assert "largest part" not in str(again.value)

    def test_the_memory_that_an_error_asks_for_suffices(self) -> None:
        graph, offer = decoder(4), 1000
        with pytest.raises(PlacementError) as refused:
            plan(graph, pool(member("a", memory_bytes=offer)))
        needs = re.findall(r"needs (?:at least )?([\d.]+) ([kM])B", str(refused.value))
        assert len(needs) == 2, refused.value
        offer = max(round(float(each) * {"k": 1e3, "M": 1e6}[unit]) for each, unit in needs)
        assert plan(graph, pool(member("a", memory_bytes=offer))).stages

    def test_owner_too_small(self) -> None:
        owner = member("owner", memory_bytes=50_000)
        with pytest.raises(PlacementError, match=r"owner's own stages.*need .*offers 50 kB.*privacy = \"open\""):
            plan(decoder(4), pool(member("a"), owner=owner), private=True, owner=owner)

    def test_owner_cannot_be_linked(self) -> None:
        owner = member("owner", dialable=False)
        with pytest.raises(PlacementError, match=r"^the only free compnode, a, cannot be linked with .*--listen"):
            plan(decoder(4), pool(member("a", dialable=False)), owner=owner)

    def test_compnodes_cannot_be_linked(self) -> None:
        members = [member("a", dialable=False), member("b", dialable=False)]
        with pytest.raises(PlacementError, match=r"1 pair of compnodes cannot be linked.*--listen"):
            plan(decoder(4), pool(*members), compnodes=2)

    def test_model_too_short(self) -> None:
        with pytest.raises(PlacementError, match=r"asks for 40 compnodes, but the model can be cut into \d+ parts"):
            plan(decoder(1), pool(*(member(f"m{k}") for k in range(40))), compnodes=40)

    def test_cuts_outside(self) -> None:
        with pytest.raises(ConfigError, match="must rise strictly between"):
            plan(decoder(4), pool(member("a"), member("b")), cuts=[10_000])

    def test_cuts_and_compnodes_disagree(self) -> None:
        with pytest.raises(ConfigError, match=r"placement.cuts makes 2 stages.*placement.compnodes is 3"):
            plan(decoder(4), pool(*(member(name) for name in "abc")), cuts=[5], compnodes=3)

    def test_unmeasured_device(self) -> None:
        device = msgspec.structs.replace(member("a").device, flops_per_s={})
        with pytest.raises(PlacementError, match="--remeasure"):
            plan(decoder(2), pool(msgspec.structs.replace(member("a"), device=device)))


def test_a_70b_graph_over_eight_machines_takes_seconds() -> None:
    graph = decoder(80, hidden=8192, fillers=57)
    assert len(graph.nodes) > 4900
    members = [member(f"gpu{k}", gflops=1e4 * (1 + k % 4), memory_bytes=400 * GB, device="cuda:0") for k in range(8)]
    begin_s = time.process_time()  # on a busy machine the clock on the wall says little
    made = plan(graph, pool(*members, rtt_s=0.02, bytes_per_s=1e8))
    assert time.process_time() - begin_s < 30
    assert len(made.stages) >= 2


def test_machines_take_given_parts_in_their_order() -> None:
    graph = decoder(4)
    points = cut_points(graph, SIZES, within=(0, len(graph.nodes)))
    cuts = (points[2], points[7])
    machines = [member("slow", gflops=10), member("fast", gflops=90), member("middle", gflops=40)]
    offered = pool(*machines, owner=member("owner"))
    planned = plan(graph, offered, owner=member("owner"), microbatches=4, cuts=cuts, in_order=True)
    assert [stage.peer for stage in planned.stages] == [each.peer for each in machines]
    assert planned.cuts == cuts
