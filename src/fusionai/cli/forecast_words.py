"""Writes a forecast as sentences, for people who have never read a plan."""

from __future__ import annotations

from collections.abc import Iterator

from fusionai.scheduling.plan import PRIVATE_LINE
from fusionai.simulation.forecast.alone import Alone
from fusionai.simulation.forecast.forecast import USD_PER_KWH, Assumed, Change, Forecast
from fusionai.simulation.forecast.offload import BUS_BYTES_PER_S
from fusionai.simulation.forecast.rented import SEEN_BY_CLOUD, Rented
from fusionai.units.byte_counts import bytes_text
from fusionai.units.durations import duration_text, seconds_text
from fusionai.units.money import usd_text
from fusionai.units.token_rates import rate_text

_AS_FAST = 0.02
"""Relative difference below which two speeds are called equally fast. Predictions are not more accurate than that."""

_IDLE = 0.5
"""If the busiest machine or link is busy for a smaller share of a step than this, it does not really limit the
speed."""

_MOST_NAMED = 5
"""Most machines that a sentence names."""


def sentences(found: Forecast) -> Iterator[str]:
    """Yield a forecast, one sentence on each line."""
    yield ""
    yield (
        f"A step takes about {seconds_text(found.predicted_step_s)}: {rate_text(found.tokens_per_s)}. "
        f"What limits it: {found.bottleneck}."
    )
    steps = f"All {found.job_steps:,} steps" if found.job_steps > 1 else "The one step"
    yield f"{steps} of the job: about {duration_text(found.job_s)}, if nobody leaves."
    whose = "these machines" if found.plan.privacy == "private" else "the compnodes"
    yield (
        f"No plan on {whose} could take less than {seconds_text(found.bound_step_s)} (all their computing added "
        f"up, links for free); this one reaches {_percent(found.bound_share)} of that speed. "
        f"It took {seconds_text(found.planning_s)} to plan."
    )
    if found.considered < found.offered:
        yield (
            f"One pipeline was sought among the {found.considered} machines that make the best single chains: a search "
            f"among all {found.offered:,} would take too long."
        )
    yield from _pipelines(found)
    links = [found.what_if.get(name) for name in ("uplinks_doubled", "bottleneck_link_doubled")]
    faster_links = any(each is not None and each.speedup > 1 + 10 * _AS_FAST for each in links)
    if found.busiest_share < _IDLE and len(found.stages) > 1 and not faster_links:
        yield (
            f"Nothing is busy for more than {_percent(found.busiest_share)} of a step: microbatches wait for each "
            "other's way through the machines. More of them a step (training.microbatches), more memory to hold them "
            "or fewer machines (placement.compnodes) may help more than a faster one."
        )
    if found.plan.privacy == "private":
        yield f"{PRIVATE_LINE.capitalize()}."
    yield from _left_out(found)
    if found.alone:
        yield _alone(found)
        yield from _offloaded(found)
    yield from _rented(found)
    yield from (_change(change) for change in found.what_if.values())
    yield ""
    yield from (assumed_line(each) for each in found.assumed)


def assumed_line(each: Assumed) -> str:
    """Return an assumption in a sentence."""
    whose = f" ({named(each.machines)})" if each.machines else ""
    return f"Assumed, not measured: {each.figure}{whose}: {each.note}."


def _left_out(found: Forecast) -> Iterator[str]:
    """Yield the machines that the plan does not use, and why. For a pool that was searched in part, yield counts."""
    lines = [line.removeprefix("left out: ") for line in found.plan.explanation if line.startswith("left out: ")]
    if found.considered < found.offered:
        unused = found.offered - len({stage.peer for stage in found.plan.stages} - {found.plan.owner})
        apart = f"{found.offered - found.considered:,} that were not searched for one pipeline"
        lines = [f"{unused:,} of {found.offered:,} machines: {', and '.join([apart, *lines])}"]
    yield from (f"Left out: {line}." for line in lines)


def _pipelines(found: Forecast) -> Iterator[str]:
    """Yield the plan of many pipelines, if it is faster."""
    count, step_s = len(found.pipelines), found.pipelines_step_s
    if step_s is None or not count or found.predicted_step_s < (1 + _AS_FAST) * step_s:
        return
    assert found.pipelines_tokens_per_s is not None
    machines = {stage.machine for pipeline in found.pipelines for stage in pipeline.stages}
    if count == 1:
        yield (
            f"The planner of many pipelines finds one pipeline, on {named(tuple(sorted(machines)))}, whose step would "
            f"take {seconds_text(step_s)}: {_times(found.predicted_step_s / step_s)} faster. A broker's planner "
            "searches otherwise and does not find it."
        )
        return
    lengths = sorted({len(pipeline.stages) for pipeline in found.pipelines})
    stages = f"{lengths[0]}" if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]}"
    yield (
        f"With {count} pipelines of {stages} stage{'' if lengths[-1] == 1 else 's'} each, on {len(machines)} machines, "
        f"a step would take {seconds_text(step_s)}: {rate_text(found.pipelines_tokens_per_s)}, "
        f"{_times(found.predicted_step_s / step_s)} faster. What would limit it: {found.pipelines_bottleneck}. "
        "Training runs one pipeline today, so this is not what a broker would do yet; `fusionai simulate --pipelines` "
        "executes it."
    )


def _alone(found: Forecast) -> str:
    """Return a sentence about the best single machine: whether it would be as fast as the pool."""
    fitting = [each for each in found.alone if each.speedup is not None]
    if not fitting:
        return "No machine could train this job alone: it fits into none of them."
    best = fitting[0]
    assert best.speedup is not None
    who = _alone_name(best)
    used = {stage.machine for stage in found.stages}
    if best.speedup > 1 + _AS_FAST:
        return f"Train on {who}: {_times(best.speedup)} faster than this pool ({_rate(best)})."
    if best.speedup < 1 - _AS_FAST:
        return f"The pool is {_times(1 / best.speedup)} faster than the best machine alone, {who} ({_rate(best)})."
    if len(used) == 1 or (best.with_owner and len(used) == 2):
        others = "; the others of this pool would not make it faster" if found.offered > 1 else ""
        return f"This plan uses one machine: train on {who}{others}."
    return f"Train on {who}: as fast as this pool ({_rate(best)})."


def _offloaded(found: Forecast) -> Iterator[str]:
    """Yield the speed of the best machine with too little memory, if it kept weights and states in main memory."""
    best = next((each for each in found.alone if each.offload is not None), None)
    alone_s = min((each.predicted_step_s for each in found.alone if each.predicted_step_s is not None), default=None)
    if best is None or best.offload is None or (alone_s is not None and alone_s < best.offload.step_s):
        return
    step_s = best.offload.step_s
    ratio = step_s / found.predicted_step_s
    than_it = (
        f"the pool is {_times(ratio)} faster"
        if ratio > 1 + _AS_FAST
        else f"{_times(1 / ratio)} faster than this pool"
        if ratio < 1 - _AS_FAST
        else "as fast as this pool"
    )
    yield (
        f"With its weights and optimizer states in main memory ({bytes_text(best.offload.main_memory_bytes)} of it), "
        f"{_alone_name(best)} would reach about {rate_text(found.tokens_per_s / ratio)}, limited by "
        f"{best.offload.limit}: {than_it}. (Assumed: {BUS_BYTES_PER_S / 1e9:.0f} GB/s to main memory each way. This "
        "system does not offload; others do, and report up to 2.8 times that.)"
    )


def _rented(found: Forecast) -> Iterator[str]:
    """Yield the speeds and prices of the cheapest and the fastest rented card, and the pool's cost of electricity."""
    if not found.rented:
        return
    cheapest, fastest = found.rented[0], max(found.rented, key=lambda each: each.tokens_per_s)
    words = f"Rented instead, the cheapest by token is {_rented_card(cheapest)}"
    if fastest is not cheapest:
        words += f"; the fastest is {_rented_card(fastest)}"
    if cheapest.main_memory_bytes or fastest.main_memory_bytes:
        words += ". The prices may be of machines with less main memory"
    if found.plan.privacy == "private":
        words += f". {SEEN_BY_CLOUD}"
    yield f"{words}."
    if found.electricity_usd_per_million_tokens is not None:
        yield (
            "The boards of this plan's machines would use at most "
            f"{usd_text(found.electricity_usd_per_million_tokens)} of electricity per million tokens "
            f"({found.board_w:,.0f} W, {USD_PER_KWH:g} USD a kWh assumed)."
        )


def _rented_card(each: Rented) -> str:
    state = f", its state in main memory ({bytes_text(each.main_memory_bytes)})" if each.main_memory_bytes else ""
    than_it = (
        f"{_times(each.speedup)} the pool's speed" if each.speedup >= 0.1 else f"{_percent(each.speedup)} of the pool's"
    )
    return (
        f"one {each.hardware} ({usd_text(each.usd_per_hour)} an hour in {each.priced[:7]}){state}: "
        f"{rate_text(each.tokens_per_s)}, {than_it}, {usd_text(each.usd_per_million_tokens)} per million tokens"
    )


def _alone_name(best: Alone) -> str:
    others = f" (or another of the {best.alike} like it)" if best.alike > 1 else ""
    return f"{best.machine} alone{others}" + (", with the owner's machine for its data" if best.with_owner else "")


def _rate(each: Alone) -> str:
    return f"{rate_text(each.tokens_per_s or 0.0)} alone"


def _change(change: Change) -> str:
    what = f"{change.what[0].upper()}{change.what[1:]}"
    if change.speedup < 1 + _AS_FAST / 10:
        return f"{what}: no faster."
    return f"{what}: {change.speedup - 1:.1%} faster ({rate_text(change.tokens_per_s)})."


def named(names: tuple[str, ...]) -> str:
    """Return the first few names, and how many more there are."""
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.1 else f"{share:.2%}"


def _times(factor: float) -> str:
    return f"{factor:,.0f}x" if factor >= 10 else f"{factor:.1f}x" if factor >= 1.1 else f"{factor:.2f}x"
