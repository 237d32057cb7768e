"""Everything that the headline's analysis says, as plain frozen data: the JSON of `fusionai paper`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import msgspec

from fusionai.simulation.codecs import Codec, Dense, TopK
from fusionai.simulation.headline.card_clusters import Cluster, consumer, datacentre
from fusionai.simulation.headline.costs import Costs, Model, ModelUse, costs_of
from fusionai.simulation.headline.plan_search import PlanSearch, UniformPlan
from fusionai.simulation.headline.reconstruction import Check, checks, peak_tflops
from fusionai.simulation.headline.simulated_pipelines import best_worked
from fusionai.simulation.prices import Prices

TOP_K = 100.0
"""One element in so many is sent: a what-if in time, which says nothing about convergence."""

STEPS: dict[ModelUse, tuple[int, ...]] = {"inference": (512,), "training": (512, 8192)}
"""Samples of a step, or of a stream to infer from."""

COMPARABLE = 0.8
"""Ratio from which throughputs are called comparable here; of the peaks it is 0.98 to PCIe and 0.75 to SXM."""

USD_PER_KWH = 0.15
"""Assumed."""


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One model in one task on one pool."""

    model: str
    task: ModelUse
    pool: str
    link: str
    link_mbps: float
    """What a machine sends, and what it receives, in Mbit/s."""
    codec: str
    samples: int
    """Samples of a step in training, of the stream in inference; a sample is one sequence."""
    samples_per_s: float
    tokens_per_s: float
    throughput: float
    """In tokens/s."""
    latency_s: float
    """One sample through all stages of this plan; in training there and back."""
    ratio_to_4xh100: float = msgspec.field(name="ratio_to_4xH100")
    """Throughput over that of 4 H100 PCIe: the cards whose peak that of 50 RTX 3080 equals."""
    ratio_to_4xh100_pcie: float
    ratio_to_4xh100_sxm: float
    compute_only_reference: bool
    """Whether 4 H100 could not hold it either, so that their figure counts computing and links only."""
    kwh_per_million_tokens: float
    """Cards only: board power while they compute, 0.3 of it while they wait; machines left out draw nothing."""
    electricity_usd_per_million_tokens: float
    rent_usd_per_million_tokens: float | None
    """At the catalogue's rent on demand; None where it has none."""
    purchase_usd: float | None
    """Price of the whole pool's cards, at list prices of their launch; None where the catalogue has none."""
    plan: str
    pipelines: int
    stages: int
    batch: int
    """Samples of a microbatch."""
    machines: int
    """That take part."""
    limit: str
    fits: bool
    missing: str
    """Why it does not fit; the figures then count computing and links only."""
    simulated_over_formula: float | None
    """Seconds of the plan's passes by the simulator over those by the formula; throughput uses the simulator's."""


class Peaks(msgspec.Struct, frozen=True, kw_only=True):
    """Peaks of datasheets in half precision, TFLOP/s."""

    consumer: float
    pcie: float
    sxm: float


class Headline(msgspec.Struct, frozen=True, kw_only=True):
    """The whole analysis."""

    peaks: Peaks
    reconstruction: tuple[Check, ...]
    """By closed formulas; a reconstruction, not the paper's words."""
    rows: tuple[Row, ...]
    comparable: float = COMPARABLE
    top_k: float = TOP_K
    usd_per_kwh: float = USD_PER_KWH


def headline(models: Iterable[Callable[[], Model]], rates_mbps: Sequence[float]) -> Headline:
    """Return the analysis of models, each made only when its turn comes. Blocks for seconds for each."""
    rows: list[Row] = []
    for make in models:
        model = make()
        for task in STEPS:
            rows += _rows(costs_of(model, task), rates_mbps)
    return Headline(
        peaks=Peaks(
            consumer=peak_tflops("RTX 3080", 50), pcie=peak_tflops("H100 PCIe", 4), sxm=peak_tflops("H100 SXM", 4)
        ),
        reconstruction=checks(),
        rows=tuple(rows),
    )


def _rows(costs: Costs, rates_mbps: Sequence[float]) -> list[Row]:
    references = [(each, PlanSearch(costs, each)) for each in datacentre()]
    pools = [consumer(rate) for rate in rates_mbps]
    searcher = PlanSearch(costs, pools[0]) if pools else None
    rows: list[Row] = []
    for samples in STEPS[costs.task]:
        made = [_planned(searched, each, Dense(), samples) for each, searched in references]
        speeds = (made[0][2], made[1][2])
        together = not all(fits for _, fits, _, _ in made)
        for (cluster, searched), plan in zip(references, made, strict=True):
            rows.append(_row(searched, cluster, Dense(), samples, plan, speeds, together))
        for cluster in pools if searcher is not None else ():
            for codec in (Dense(), _top_k(cluster)):
                assert searcher is not None
                plan = _planned(searcher, cluster, codec, samples)
                rows.append(_row(searcher, cluster, codec, samples, plan, speeds, together))
    return rows


def _top_k(cluster: Cluster) -> TopK:
    return TopK(
        ratio=TOP_K, value_bytes=2, index_bytes=4, memory_bytes_per_s={"any": cluster.device.memory_bytes_per_s}
    )


_Planned = tuple[UniformPlan, bool, float, float | None]


def _planned(searcher: PlanSearch, cluster: Cluster, codec: Codec, samples: int) -> _Planned:
    """Return a plan, whether it fits, samples per second, and in training the simulator's factor on its pipelines."""
    ranked = searcher.ranked(cluster, codec, samples)
    fits = bool(ranked)
    if not fits:
        ranked = searcher.ranked(cluster, codec, samples, memory=False)
    assert ranked, "without memory to heed, something is always found"
    if searcher.costs.task == "inference":
        return ranked[0], fits, samples / ranked[0].step_s, None
    found, factor = best_worked(searcher, ranked, cluster, codec)
    return found, fits, samples / found.step_s, factor


def _row(
    searcher: PlanSearch,
    cluster: Cluster,
    codec: Codec,
    samples: int,
    plan: _Planned,
    speeds: tuple[float, float],
    compute_only_reference: bool,
) -> Row:
    found, fits, speed, factor = plan
    tokens_per_s = speed * searcher.costs.model.tokens
    step_s, million_s = samples / speed, 1e6 / tokens_per_s
    busy = min(1.0, found.busy_s / (found.machines * step_s))
    power_w = cluster.hardware.power_w or 0.0
    share = busy + Prices().idle_share * (1 - busy)
    kwh = found.machines * power_w * share * million_s / 3.6e6
    rent, buy = cluster.hardware.rent_per_hour, cluster.hardware.buy
    return Row(
        model=searcher.costs.model.name,
        task=searcher.costs.task,
        pool=cluster.name,
        link=cluster.rate,
        link_mbps=cluster.bytes_per_s * 8 / 1e6,
        codec="dense" if isinstance(codec, Dense) else f"top-k 1/{TOP_K:g}",
        samples=samples,
        samples_per_s=speed,
        tokens_per_s=tokens_per_s,
        throughput=tokens_per_s,
        latency_s=searcher.one_sample_s(found, cluster, codec),
        ratio_to_4xh100=speed / speeds[0],
        ratio_to_4xh100_pcie=speed / speeds[0],
        ratio_to_4xh100_sxm=speed / speeds[1],
        compute_only_reference=compute_only_reference,
        kwh_per_million_tokens=kwh,
        electricity_usd_per_million_tokens=kwh * USD_PER_KWH,
        rent_usd_per_million_tokens=None if rent is None else cluster.count * rent.usd * million_s / 3600,
        purchase_usd=None if buy is None else cluster.count * buy.usd,
        plan=(
            f"{found.pipelines} x {found.stages} stages, microbatches of {found.batch}, {found.machines} "
            f"card{'s' if found.machines > 1 else ''}"
        ),
        pipelines=found.pipelines,
        stages=found.stages,
        batch=found.batch,
        machines=found.machines,
        limit=found.limit,
        fits=fits,
        missing="" if fits else searcher.missing(cluster),
        simulated_over_formula=factor,
    )
