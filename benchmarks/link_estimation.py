"""How wrong estimated links are, by the number of probes, and what a plan loses by them.

    python benchmarks/link_estimation.py [--machines 200] [--nets 5] [--plans 5] [--json]

On made-up internets (tests/broker/synthetic_internet.py), every machine joining in turn, probed with the broker
and a few others: at random, or as the broker chooses (`broker.probe_choice`). Errors are relative, over unprobed pairs
drawn at random ("far"), and over all pairs within sites, probed or not ("site"). Plans are of `planner.plan`, made with
measured and estimated links and worked through on the true ones; the ratio is that of the step to the step planned with
the truth. "measured" plans again with the links that the plan uses measured, at most twice, as the broker does.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from fusionai.broker.link_estimation import EstimatedLinks, LinkProbes, estimate_links
from fusionai.broker.probe_choice import FIRST, first_partners, next_partner
from fusionai.scheduling.links import LinkModel
from fusionai.scheduling.plan import Plan
from fusionai.scheduling.planner import plan
from fusionai.scheduling.problem import TrainingProblem
from fusionai.scheduling.profile import UNMEASURED
from fusionai.scheduling.search.chain import Chain
from fusionai.scheduling.search.segment_tables import costs_in_segments
from fusionai.scheduling.search.worked_chains import evaluated_chains, worked_chain

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "scheduling"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "broker"))

from decoder_graph import GB, SIZES, decoder, member
from synthetic_internet import Internet

ROUNDS = 32
AGAIN = 2


class Alike:
    """Every pair as `UNMEASURED`: a `LinkModel`."""

    def bandwidths_bytes_per_s(self, sources: Any, targets: Any) -> Any:
        return np.full(np.broadcast(sources, targets).shape, UNMEASURED.bandwidth_bytes_per_s)

    def rtts_s(self, sources: Any, targets: Any) -> Any:
        return np.full(np.broadcast(sources, targets).shape, UNMEASURED.rtt_s)


def random_pairs(net: Internet, probes: int, seed: int) -> np.ndarray:
    """Return each machine's pair with the broker, and with `probes` of those that joined before it."""
    draw = random.Random(seed)
    pairs = [(machine, net.count - 1) for machine in range(net.count - 1)]
    joined: list[int] = []
    for machine in draw.sample(range(net.count - 1), net.count - 1):
        pairs += [(machine, other) for other in draw.sample(joined, min(probes, len(joined)))]
        joined.append(machine)
    return np.asarray(pairs)


def chosen_pairs(net: Internet, probes: int, seed: int) -> np.ndarray:
    """Return the same with partners as the broker chooses them."""
    draw = random.Random(seed)
    broker = net.count - 1
    # The broker sees machines behind one router at one address.
    network = {str(machine): str(net.site[machine]) for machine in range(broker)}
    pairs = [(machine, broker) for machine in range(broker)]
    rtts: dict[str, dict[str, float]] = {str(machine): {} for machine in range(broker)}
    joined: list[str] = []
    widths: dict[str, float] = {}
    for machine in map(str, draw.sample(range(broker), broker)):
        allowed = {each: network[each] for each in joined}
        chosen = first_partners(network[machine], allowed, widths, draw, most=min(FIRST, probes))
        for step in range(probes):
            if step >= len(chosen):
                near = next_partner(rtts[machine], rtts.__getitem__, allowed) or next(iter(allowed), None)
                if near is None:
                    break
                chosen.append(near)
            other = chosen[step]
            pairs.append((int(machine), int(other)))
            rtt_s = float(net.rtts_s(np.asarray(int(machine)), np.asarray(int(other))))
            rtts[machine][other] = rtts[other][machine] = rtt_s
            allowed.pop(other)
        joined.append(machine)
        if len(joined) & (len(joined) - 1) == 0:
            known = estimate_links(net.probe(np.asarray(pairs), seed), net.count, anchor=broker)
            widths = {each: float(min(known.up_N[int(each)], known.down_N[int(each)])) for each in joined}
    return np.asarray(pairs)


def errors(net: Internet, links: LinkModel, known: EstimatedLinks, *, within_sites: bool) -> dict[str, Any]:
    """Return relative errors over pairs that no probe measured, or of all pairs within sites: medians and 9 of 10."""
    draw = np.random.default_rng(1)
    count = net.count - 1
    source, target = draw.integers(0, count, (2, 20_000))
    if within_sites:
        source, target = (each.ravel() for each in np.meshgrid(np.arange(count), np.arange(count)))
    same = net.site[source] == net.site[target]
    use = (source != target) & (same == within_sites)
    if not within_sites:
        use &= ~known.is_measured(source, target)
    source, target = source[use], target[use]
    if not len(source):
        return {"rtt_median": None, "rtt_90": None, "bandwidth_median": None, "bandwidth_90": None}
    rtt = np.abs(links.rtts_s(source, target) / net.rtts_s(source, target) - 1)
    bandwidth = np.abs(links.bandwidths_bytes_per_s(source, target) / net.bandwidths_bytes_per_s(source, target) - 1)
    return {
        "rtt_median": float(np.median(rtt)),
        "rtt_90": float(np.quantile(rtt, 0.9)),
        "bandwidth_median": float(np.median(bandwidth)),
        "bandwidth_90": float(np.quantile(bandwidth, 0.9)),
    }


def error_rows(machines: int, nets: int) -> list[dict[str, Any]]:
    """Return errors by number of probes and way to choose them: means over nets."""
    rows = []
    for probes in (0, 2, 4, 8, 16):
        for name, choose in (("random", random_pairs), ("chosen", chosen_pairs)):
            found: list[dict[str, Any]] = []
            for seed in range(nets):
                net = Internet(machines, seed)
                known = estimate_links(net.probe(choose(net, probes, seed), seed), net.count, anchor=machines)
                row = {"far": errors(net, known, known, within_sites=False)}
                row["site"] = errors(net, known, known, within_sites=True)
                row["unmeasured"] = errors(net, Alike(), known, within_sites=False)
                found.append({f"{kind}_{key}": value for kind, part in row.items() for key, value in part.items()})
            mean = {key: _mean([each[key] for each in found]) for key in found[0]}
            rows.append({"probes": probes, "choice": name, **mean})
            print(rows[-1], flush=True)
    return rows


def _mean(values: list[float | None]) -> float | None:
    given = [each for each in values if each is not None]
    return round(statistics.fmean(given), 3) if given else None


def plan_rows(count: int, machines: int = 64) -> list[dict[str, Any]]:
    """Return, by net, what plans lose by links that are estimated or assumed."""
    graph = decoder(24, hidden=1024)
    rows = []
    for seed in range(count):
        draw = random.Random(seed)
        net = Internet(machines, 100 + seed)
        members = tuple(
            member(f"m{k}", gflops=draw.uniform(2000, 20_000), memory_bytes=int(draw.uniform(0.4, 1.5) * GB))
            for k in range(machines)
        )

        def task(links: LinkModel, members: Any = members) -> TrainingProblem:
            return TrainingProblem(
                graph=graph,
                graph_hash="benchmark",
                sizes=SIZES,
                microbatches=ROUNDS,
                optimizer_states=2,
                precision="fp32",
                members=members,
                owner=None,
                links=links,
                privacy="open",
                front=0,
                back=len(graph.nodes),
            )

        truth = task(net)
        best_s = worked_through(truth, plan(truth))
        row: dict[str, Any] = {"net": seed, "true_step_s": best_s}
        row["unmeasured"] = worked_through(truth, plan(task(Alike()))) / best_s
        for probes in (2, 4, 8):
            pairs = chosen_pairs(net, probes, seed)
            made = plan(task(estimate_links(net.probe(pairs), net.count, anchor=machines)))
            row[f"estimated_{probes}"] = worked_through(truth, made) / best_s
            for _ in range(AGAIN):
                pairs = np.concatenate([pairs, used_pairs(made, members)])
                made = plan(task(estimate_links(net.probe(pairs), net.count, anchor=machines)))
            row[f"measured_{probes}"] = worked_through(truth, made) / best_s
        rows.append(row)
        print(row, flush=True)
    return rows


def used_pairs(made: Plan, members: Any) -> np.ndarray:
    """Return the pairs of machines that follow each other in a plan."""
    place = {each.peer: index for index, each in enumerate(members)}
    chains = [[place[stage.peer] for stage in pipeline.stages] for pipeline in made.pipelines]
    return np.asarray([pair for chain in chains for pair in itertools.pairwise(chain)]).reshape(-1, 2)


def worked_through(truth: TrainingProblem, made: Plan) -> float:
    """Return the seconds of a plan's step on the true links."""
    work = costs_in_segments(truth)
    place = {each.peer: index for index, each in enumerate(truth.members)}
    index = {position: number for number, position in enumerate(work.positions)}
    runs = []
    for pipeline in made.pipelines:
        bounds = (*(index[stage.start] for stage in pipeline.stages), work.count)
        machines = tuple(place[stage.peer] for stage in pipeline.stages)
        most = pipeline.stages[0].in_flight
        runs.append(worked_chain(work, Chain(machines, bounds, 0.0, 0.0, max(most, 1)), pipeline.microbatches))
    return evaluated_chains(work, runs).step_s


def at_scale(machines: int = 10_000, probes: int = 8) -> dict[str, Any]:
    """Return the seconds of an estimate for a large pool, its bytes, and its errors."""
    net = Internet(machines, 0)
    measured: LinkProbes = net.probe(random_pairs(net, probes, 0))
    start_s = time.perf_counter()
    known = estimate_links(measured, net.count, anchor=machines)
    seconds = time.perf_counter() - start_s
    kept = sum(value.nbytes for value in vars(known).values() if isinstance(value, np.ndarray))
    kept += known.coordinates.points_ND.nbytes + known.coordinates.heights_N.nbytes
    found = {"machines": machines, "pairs": len(measured.sources), "estimate_s": seconds, "megabytes": kept / 1e6}
    return {**found, **errors(net, known, known, within_sites=False)}


def main() -> None:
    """Measure and print; the last line is one JSON object with --json."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--machines", type=int, default=200)
    parser.add_argument("--nets", type=int, default=5)
    parser.add_argument("--plans", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = error_rows(options.machines, options.nets)
    scale = at_scale()
    print(scale, flush=True)
    plans = plan_rows(options.plans)
    names = [name for name in (plans[0] if plans else {}) if name not in ("net", "true_step_s")]
    report = {
        "errors": rows,
        "scale": scale,
        "plans": plans,
        "plan_ratio_median": {name: statistics.median(row[name] for row in plans) for name in names},
        "plan_ratio_worst": {name: max(row[name] for row in plans) for name in names},
    }
    print(json.dumps(report) if options.json else json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
