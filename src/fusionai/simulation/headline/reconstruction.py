"""The headline by closed formulas: a cross-check of the planned figures, not the paper's words.

The formulas are our reconstruction, in the style of Paleo (ICLR 2017), of how the headline could be analysed:

    computing of an operator     C = FLOPs / (lambda * peak)
    receiving over a link        R = alpha + bytes / bandwidth
    one sample through it all    T_lat = sum over stages of C_k + R_k
    n samples in a pipeline      T_pipe = T_lat + (n - 1) * max over stages of max(C_k, R_k)

In training each sample goes there and back: three times the computing, and each boundary is crossed twice. Updates,
gradient sums and memory do not count.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import msgspec

from fusionai.simulation.hardware.catalogue import lookup

SAMPLES = 512
LAMBDA = 0.5
"""Share of the peak that operators reach, on both sides."""

HALF_BYTES = 2
CONSUMER_CARDS, DATACENTRE_CARDS = 50, 4
REFERENCE_LINK = (5e-6, 64e9)
"""Between H100 in one box: seconds of latency, bytes per second. Assumed (PCIe 5 x16); it decides nothing here."""

LINKS = {0.1: 20e-3, 1.0: 10e-3, 10.0: 1e-3, 100.0: 0.1e-3}
"""One-way latency in seconds by bandwidth in Gbit/s."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A transformer reduced to sizes: gated or grouped variants are not covered."""

    name: str
    layers: int
    width: int
    tokens: int
    """Tokens of a sample."""
    vocabulary: int = 0
    """Vocabulary of a head that counts; 0 for none."""


GPT3 = ModelShape(name="GPT-3 175B", layers=96, width=12288, tokens=2048, vocabulary=50257)
BERT_WITHOUT_HEAD = ModelShape(name="BERT-Large without head", layers=24, width=1024, tokens=512)


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One cell of the table: 50 RTX 3080 over 4 H100 PCIe by the closed formulas."""

    model: str
    task: str
    link_gbps: float
    stages: int
    ratio: float
    latency_s: float
    """Seconds that one sample takes through the consumer cards."""
    reference_latency_s: float


def operators(shape: ModelShape) -> list[tuple[float, float]]:
    """Return (forward FLOPs, bytes that cross behind it) of each operator of one sample, the residual included."""
    width, tokens = float(shape.width), float(shape.tokens)
    product = 2 * tokens * width * width
    unit = tokens * width * HALF_BYTES
    layer = [
        (3 * product, 4 * unit),  # queries, keys and values
        (4 * tokens * tokens * width, 2 * unit),  # scores and their use; causal masks save nothing
        (product, unit),  # back into the residual
        (4 * product, 5 * unit),
        (4 * product, unit),
    ]
    head = [(2 * tokens * width * shape.vocabulary, 0.0)] if shape.vocabulary else []
    return layer * shape.layers + head


def partition(computing_s: Sequence[float], receiving_s: Sequence[float], stages: int) -> list[int]:
    """Return the cuts of a min-max partition over `stages` equal machines.

    First the least bottleneck of computing and links; then, links of that bottleneck allowed and in any case the
    cheapest ones, the least largest share of computing. So machines are used even where leaving them out would be
    faster: this is the question that the formulas ask, not good advice.

    Args:
        computing_s: seconds of each operator.
        receiving_s: seconds of sending what crosses behind each operator.
        stages: at most so many.
    """
    sums = [0.0, *accumulate(computing_s)]

    def reached(limit_s: float, allowed: Sequence[int]) -> list[int] | None:
        cuts, start = [0], 0
        while sums[-1] - sums[start] > limit_s:
            stop = bisect_right(sums, sums[start] + limit_s) - 1
            place = bisect_right(allowed, stop) - 1
            if place < 0 or allowed[place] <= start or len(cuts) == stages:
                return None
            start = allowed[place]
            cuts.append(start)
        return cuts[1:]

    def least(allowed_within: float | None) -> tuple[float, list[int]]:
        low, high, found = 0.0, sums[-1], list[int]()
        for _ in range(60):
            middle = (low + high) / 2
            limit = middle if allowed_within is None else allowed_within
            allowed = [place for place in range(1, len(computing_s)) if receiving_s[place - 1] <= limit]
            if (cuts := reached(middle, allowed)) is None:
                low = middle
            else:
                high, found = middle, cuts
        return high, found

    return least(max(least(None)[0], min(receiving_s[:-1], default=0.0)) * (1 + 1e-9))[1]


def pipelined_s(
    shape: ModelShape,
    *,
    training: bool,
    flops_per_s: float,
    stages: int,
    alpha_s: float,
    bytes_per_s: float,
    samples: int,
) -> tuple[float, float, int]:
    """Return T_pipe and T_lat in seconds, and the stages used, for equal machines in a chain."""
    work = operators(shape)
    computing_s = [(3 if training else 1) * flops / flops_per_s for flops, _ in work]
    receiving_s = [(2 if training else 1) * (alpha_s + crossing / bytes_per_s) for _, crossing in work]
    cuts = partition(computing_s, receiving_s, stages)
    sums = [0.0, *accumulate(computing_s)]
    bounds = [0, *cuts, len(work)]
    shares = [sums[stop] - sums[start] for start, stop in pairwise(bounds)]
    hops = [receiving_s[cut - 1] for cut in cuts]
    latency_s = sum(shares) + sum(hops)
    return latency_s + (samples - 1) * max(*shares, *hops, 0.0), latency_s, len(shares)


def check(shape: ModelShape, *, training: bool, link_gbps: float, stages: int = CONSUMER_CARDS) -> Check:
    """Return one cell: the throughput of 50 RTX 3080 over that of 4 H100 PCIe, half precision."""
    consumer, reference = (lookup(name).flops_per_s["fp16"] for name in ("RTX 3080", "H100 PCIe"))
    slow_s, latency_s, used = pipelined_s(
        shape,
        training=training,
        flops_per_s=LAMBDA * consumer,
        stages=stages,
        alpha_s=LINKS[link_gbps],
        bytes_per_s=link_gbps * 1e9 / 8,
        samples=SAMPLES,
    )
    alpha_s, bytes_per_s = REFERENCE_LINK
    fast_s, reference_s, _ = pipelined_s(
        shape,
        training=training,
        flops_per_s=LAMBDA * reference,
        stages=DATACENTRE_CARDS,
        alpha_s=alpha_s,
        bytes_per_s=bytes_per_s,
        samples=SAMPLES,
    )
    return Check(
        model=shape.name,
        task="training, computing only" if training else "inference",
        link_gbps=link_gbps,
        stages=used,
        ratio=fast_s / slow_s,
        latency_s=latency_s,
        reference_latency_s=reference_s,
    )


def checks() -> tuple[Check, ...]:
    """Return the whole table: GPT-3's shape in both tasks, and BERT-Large without a head in 48 stages."""
    cells = ((GPT3, False, 50), (GPT3, True, 50), (BERT_WITHOUT_HEAD, False, 48))
    return tuple(
        check(shape, training=training, link_gbps=gbps, stages=stages)
        for shape, training, stages in cells
        for gbps in LINKS
    )


def peak_tflops(name: str, count: int) -> float:
    """Return the peak of several cards in half precision, 10^12 FLOP/s: datasheets, not what work reaches."""
    return count * lookup(name).flops_per_s["fp16"] / 1e12
