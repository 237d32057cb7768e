"""The analysis as a page of Markdown: what was found, where the claim holds, and what it rests on."""

from __future__ import annotations

import datetime
import textwrap
from collections.abc import Iterable, Iterator

from fusionai.simulation.headline.card_clusters import LATENCY_S
from fusionai.simulation.headline.headline_report import Headline, Row

_WIDTH = 120
"""Characters of a line of prose."""

_CLAIM = "The abstract of FusionAI (arXiv 2309.01172) says that 50 RTX 3080 reach the throughput of 4 H100."


def page(found: Headline, date: datetime.date, *, command: str) -> str:
    """Return the page; it ends with a line break. `command` is what made it."""
    return wrapped(_lines(found, date, command))


def wrapped(lines: Iterable[str]) -> str:
    """Return lines as one text in which prose has at most `_WIDTH` characters a line; tables stay as they are."""
    found: list[str] = []
    for line in lines:
        if len(line) <= _WIDTH or line.startswith("|"):
            found.append(line)
            continue
        indent = "  " if line.startswith("- ") else ""
        found += textwrap.wrap(line, _WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return "\n".join(found) + "\n"


def holds(row: Row, found: Headline) -> bool:
    """Whether a row of consumer cards keeps up with 4 H100 PCIe on hardware that holds the job."""
    return row.fits and row.ratio_to_4xh100_pcie >= found.comparable


def _lines(found: Headline, date: datetime.date, command: str) -> Iterator[str]:
    yield from (
        "# 50 RTX 3080 against 4 H100",
        "",
        f"Made by `{command}` on {date.isoformat()}. All figures are predicted, none is measured.",
        "",
        f"{_CLAIM} Its models, batches and links",
        "were not available to us, so nothing below is the paper's: it is what this project's cost model says.",
        "",
        f"Peaks of datasheets in half precision: 50 RTX 3080 {found.peaks.consumer:,.0f} TFLOP/s, 4 H100 PCIe "
        f"{found.peaks.pcie:,.0f} (ratio {found.peaks.consumer / found.peaks.pcie:.2f}), 4 H100 SXM",
        f"{found.peaks.sxm:,.0f} (ratio {found.peaks.consumer / found.peaks.sxm:.2f}). The claim is peak parity "
        f"with PCIe "
        "cards, so it needs equal efficiency, links that hide, and a model that fits.",
        "",
        "## Where it holds",
        "",
        f"Comparable means at least {found.comparable:g} of the throughput of 4 H100 PCIe, on cards that hold the job.",
        "",
    )
    yield from _verdicts(found)
    yield from ("", "## Best plans on home links", "")
    yield from _home(found)
    yield from ("", "## Every figure", "")
    yield from _tables(found)
    yield from ("", "## Check by closed formulas", "")
    yield from _checks(found)
    yield from ("", "## What it rests on", "")
    yield from _assumptions(found)


def _groups(found: Headline) -> Iterator[tuple[str, list[Row]]]:
    groups: dict[tuple[str, str, int], list[Row]] = {}
    for row in found.rows:
        groups.setdefault((row.model, row.task, row.samples), []).append(row)
    for (model, task, samples), rows in groups.items():
        yield f"{model}, {task}" + (f", {samples:,} sequences a step" if task == "training" else ""), rows


def _consumer(rows: list[Row]) -> list[Row]:
    return [row for row in rows if "RTX 3080" in row.pool]


def _verdicts(found: Headline) -> Iterator[str]:
    for title, rows in _groups(found):
        mine = _consumer(rows)
        if not mine:
            continue
        for codec in dict.fromkeys(row.codec for row in mine):
            of_codec = [row for row in mine if row.codec == codec]
            compute_only = of_codec[0].compute_only_reference
            reference = " 4 H100 could not hold it; their figure is compute-only." if compute_only else ""
            if lacking := next((row.missing for row in of_codec if not row.fits), ""):
                alone = ", ".join(_ratio(row) for row in of_codec)
                words = f"does not hold, as it does not fit: {lacking}. Computing and links alone would give {alone}."
            else:
                good = [_ratio(row) for row in of_codec if holds(row, found)]
                bad = [_ratio(row) for row in of_codec if not holds(row, found)]
                parts = [f"holds at {', '.join(good)}"] if good else []
                words = "; ".join(parts + ([f"does not at {', '.join(bad)}"] if bad else [])) + "."
            yield f"- **{title}, {codec}**: {words}{reference}"


def _ratio(row: Row) -> str:
    return f"{row.link} ({row.ratio_to_4xh100_pcie:.2g})"


def _home(found: Headline) -> Iterator[str]:
    yield from (
        "The best plan found for each task and link from 100 Mbps to 1 Gbps. In inference a model that fits one card",
        "is best replicated, not pipelined: links then count for nothing. In training gradients are summed over",
        "pipelines at the end of each step: over slow links a few long pipelines are best, whose stages have few",
        "weights each, or a single card with nothing to sum; larger steps spread the sum. Cards that a plan leaves out",
        "would slow it down, or are too few for another pipeline.",
        "",
        "| task | link | codec | plan | of 4 H100 PCIe | of SXM | what limits | fits |",
        "|---|---|---|---|---|---|---|---|",
    )
    for title, rows in _groups(found):
        home = [row for row in _consumer(rows) if row.link in ("100 Mbps", "1 Gbps")]
        for link in dict.fromkeys(row.link for row in home):
            for codec in dict.fromkeys(row.codec for row in home):
                row = next(each for each in home if (each.link, each.codec) == (link, codec))
                yield (
                    f"| {title} | {link} | {codec} | {row.plan} | {row.ratio_to_4xh100_pcie:.2g} | "
                    f"{row.ratio_to_4xh100_sxm:.2g} | {row.limit} | {_fits(row)} |"
                )


def _tables(found: Headline) -> Iterator[str]:
    for title, rows in _groups(found):
        yield from (
            f"### {title}",
            "",
            "| pool | link | codec | sequences/s | tokens/s | one sequence, s | of 4 H100 PCIe | of SXM | kWh | "
            "electricity "
            "| rent | pipelines x stages | fits |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
        )
        for row in rows:
            yield (
                f"| {row.pool} | {row.link} | {row.codec} | {row.samples_per_s:,.3g} | {row.tokens_per_s:,.0f} | "
                f"{row.latency_s:.3g} | {row.ratio_to_4xh100_pcie:.2g} | {row.ratio_to_4xh100_sxm:.2g} | "
                f"{row.kwh_per_million_tokens:.3g} | {_usd(row.electricity_usd_per_million_tokens)} | "
                f"{_usd(row.rent_usd_per_million_tokens)} | {row.plan} | {_fits(row)} |"
            )
        yield ""


def _fits(row: Row) -> str:
    return "yes" if row.fits else "no, compute-only"


def _usd(amount: float | None) -> str:
    return "unknown" if amount is None else f"{amount:.3g}"


def _checks(found: Headline) -> Iterator[str]:
    yield from (
        "A reconstruction, not the paper's words: 512 sequences, one in a microbatch, both sides at half of "
        "their peak, stages",
        "balanced operator by operator, all cards in one chain, 4 H100 PCIe as the reference, memory not counted",
        "(`src/fusionai/simulation/headline/reconstruction.py`).",
        "",
        "| model | task | link | stages | ratio | one sequence, s | on 4 H100, s |",
        "|---|---|---|---|---|---|---|",
    )
    for each in found.reconstruction:
        yield (
            f"| {each.model} | {each.task} | {each.link_gbps:g} Gbps | {each.stages} | {each.ratio:.2g} | "
            f"{each.latency_s:.3g} | {each.reference_latency_s:.3g} |"
        )


def _assumptions(found: Headline) -> Iterator[str]:
    factors = [row.simulated_over_formula for row in found.rows if row.simulated_over_formula]
    latencies = ", ".join(f"{rate:g} Mbps {seconds * 1e3:g} ms" for rate, seconds in LATENCY_S.items())
    purchase = next((row.purchase_usd for row in found.rows if row.purchase_usd is not None), None)
    yield from (
        "- Every GPU reaches 60 % of its bf16 peak in matrix products, 35 % in attention and 80 % of its memory "
        "bandwidth, and "
        "starts an operator in 10 us: the same shares for both kinds, none measured. Operators that are not "
        "fused move much "
        "memory, and 50 RTX 3080 have 38 TB/s of bandwidth against 8 (PCIe) and 13.4 (SXM): this is why ratios "
        "above the "
        "peaks' 0.98 appear. Fused kernels would take that away.",
        "- Models are captured from their configurations with bf16 weights and activations. A sample is one "
        "sequence: 512 tokens "
        "(bert-large), 1,024 (gpt2-xl), 2,048 (llama-8b, gpt3-175b). Inference is a forward over whole "
        "sequences, not token by "
        "token.",
        "- Training keeps 16 bytes a parameter (bf16 weights and gradients; fp32 copy and two moments of Adam). "
        "Of each card's "
        "memory 90 % is offered, and an estimate must fit 1.15 times.",
        f"- One-way latencies: {latencies}. A card sends through one uplink. H100 are in one box: 64 GB/s (PCIe "
        f"5 x16) or 450 "
        "GB/s (NVLink). Other rates take the latency of the nearest.",
        "- Gradients are summed over pipelines by a ring, or with Top-K gathered from all, whichever is "
        "shorter, all stages at the same time, after the last "
        "backward and not beside it.",
        "- In a backward the gradients that travel leave before those of linear layers' weights are computed.",
        f"- Top-K sends one element in {found.top_k:g} with a 4-byte index, of activations and gradients alike: "
        f"a what-if in "
        "time. It says nothing about convergence, and such a ratio on activations will cost quality. It holds "
        "for the RTX 3080 "
        "only; H100 send dense.",
        "- What does not fit is planned without regard to each card's memory, in shares of equal "
        "computing, and marked.",
        "- kWh, electricity and rent (US dollars) are per million tokens. kWh: board power while a card "
        "computes, 0.3 of it while "
        f"it waits, hosts and cooling apart. Electricity at {found.usd_per_kwh:g} USD a kWh, assumed. Rent of "
        f"H100: the "
        "catalogue's on-demand price, electricity included; of RTX 3080 it has none"
        + (f". Buying 50 RTX 3080 at their launch price: {purchase:,.0f} USD; " if purchase else "; ")
        + "the catalogue has no purchase price of H100.",
    )
    if factors:
        yield (
            "- In training the best dozen plans by closed formulas are worked through by the simulator, each card's "
            "link shared, and the fastest there is shown; its pipelines took "
            f"{min(factors):.2f} to {max(factors):.2f} times what the formula says."
        )
    yield (
        "- No activations are computed again to save memory. Where memory for microbatches limits (gpt2-xl in "
        "training), that would help, and is not tried."
    )
    yield (
        "- Head and embedding are one operator each. A head with its share of Adam may be larger than a card, and "
        "bounds how many stages are of use."
    )
    yield (
        "- Plans come from a search of this analysis' own (`src/fusionai/simulation/headline/plan_search.py`), not "
        "from the planner of jobs. That one is for unlike machines, plans training only, and lets each link of a "
        "machine carry all that it can. Here machines are alike, inference is planned too, and all links of a card "
        "share its uplink."
    )
    yield (
        "- The pipelines of a plan are alike. Where they are cut is searched for, not proven best; a plan of unlike "
        "pipelines may use cards that are left over here."
    )
    yield "- Churn, loss of packets and data loading are not counted. Cards of one pool are alike and always there."
