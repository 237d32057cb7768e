"""A plan in words: who holds what, and what limits the speed."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fusionai.graph.model import Node
from fusionai.scheduling.plan import PipelinePlan, StagePlan
from fusionai.scheduling.profile import Member
from fusionai.scheduling.segments import MEMORY_MARGIN
from fusionai.units.byte_counts import bytes_text
from fusionai.units.durations import seconds_text

_MOST_LISTED = 5
"""Names that a sentence lists one by one, and then runs of names."""

_MOST_EXPLAINED = 12
"""Pipelines whose stages an explanation lists."""

_NUMBERED = re.compile(r"^(?P<prefix>.*?)(?P<number>0|[1-9]\d*)$")

_BLOCK = re.compile(r"^(?P<list>.*?)\.(?P<index>\d+)(?:\.|$)")


WITH_MARGIN = f"with a margin of {100 * (MEMORY_MARGIN - 1):.0f} %"
"""What is said once in every text that compares what is needed to what is offered."""


def holding(nodes: Iterable[Node]) -> str:
    """Return the modules that operators came from, such as "model.layers.0-5, model.norm"."""
    blocks: dict[str, list[int]] = {}
    others: list[str] = []
    count = 0
    for node in nodes:
        count += 1
        if match := _BLOCK.match(node.scope):
            blocks.setdefault(match["list"], []).append(int(match["index"]))
        elif node.scope and node.scope not in others:
            others.append(node.scope)
    names = [*blocks, *others]
    # An enclosing module's name says nothing that its parts do not say better.
    inner = [name for name in others if not any(each.startswith(f"{name}.") for each in names)]
    parts = [f"{name}.{_span(indices)}" for name, indices in blocks.items()] + inner
    return ", ".join(parts) or f"{count} operator{'s' if count != 1 else ''}"


def _span(indices: Sequence[int]) -> str:
    low, high = min(indices), max(indices)
    return str(low) if low == high else f"{low}-{high}"


def stage_lines(
    stages: Sequence[StagePlan],
    nodes: Sequence[Node],
    names: Mapping[str, str],
    offers_bytes: Mapping[str, int],
    busy: Mapping[str, float],
) -> tuple[str, ...]:
    """Return a line for each stage; `busy` is the fraction of a step that a machine computes."""
    return tuple(
        f"stage {stage.stage} on {names[stage.peer]}: {holding(nodes[stage.start : stage.stop])}; "
        f"{bytes_text(stage.predicted.memory_bytes)} of {bytes_text(offers_bytes[stage.peer])}, "
        f"{seconds_text(stage.predicted.forward_s + stage.predicted.backward_s)} a microbatch, "
        f"{stage.in_flight} in flight; machine busy {busy.get(stage.peer, 0.0):.0%} of a step"
        for stage in stages
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Bottleneck:
    """The seconds of a step for which everything that may limit it is busy."""

    computing_s: Mapping[str, float]
    """By the name of the machine."""
    links_s: Mapping[tuple[str, str], float]
    """By the names of source and target."""
    lines_s: Mapping[tuple[str, str], float]
    """Seconds of uplinks and downlinks that links share, by the name of the machine and "up" or "down"."""
    summed_s: float
    """Seconds that summing gradients takes when all passes are done."""
    committed_s: float
    """Seconds that reporting and updating take after that."""
    pipelines: int
    driver: str
    """Name of the machine that commits the step."""

    def words(self, step_s: float) -> str:
        """Name what is busy longest, and the share of the step for which it is."""
        machine, busy_s = max(self.computing_s.items(), key=lambda item: item[1])
        words = f"computing on {machine}"
        if self.links_s:
            (source, target), link_s = max(self.links_s.items(), key=lambda item: item[1])
            if link_s > busy_s:
                words, busy_s = f"the link from {source} to {target}", link_s
        if self.lines_s:
            (machine, direction), line_s = max(self.lines_s.items(), key=lambda item: item[1])
            if line_s > busy_s:
                words, busy_s = f"the {direction}link of {machine}", line_s
        if (end_s := self.summed_s + self.committed_s) > busy_s:
            words, busy_s = self._end(), end_s
        return f"{words} (busy {busy_s / step_s:.0%} of it)"

    def _end(self) -> str:
        if self.summed_s <= self.committed_s:
            return f"reporting to {self.driver} and updating, when all passes are done"
        if self.pipelines > 1:
            return f"summing gradients over {self.pipelines} pipelines"
        return "exchanging gradients of tied weights, when all passes are done"


def explanation(
    pipelines: Sequence[PipelinePlan],
    nodes: Sequence[Node],
    machines: Mapping[str, Member],
    busy: Sequence[Mapping[str, float]],
    step_s: float,
    end_s: float,
    bottleneck: str,
) -> tuple[str, ...]:
    """Return a plan in lines: its stages, and what limits it.

    Args:
        pipelines: of the plan.
        nodes: of the graph.
        machines: all of the problem's, by peer.
        busy: by pipeline, the fraction of a step that each machine computes, by peer.
        step_s: seconds of a step.
        end_s: seconds of the step after the last backward.
        bottleneck: what limits it, in words.
    """
    names = {peer: each.name for peer, each in machines.items()}
    offers = {peer: each.device.memory_bytes for peer, each in machines.items()}
    if len(pipelines) == 1:
        lines = stage_lines(pipelines[0].stages, nodes, names, offers, busy[0])
        return (*lines, f"a step takes about {seconds_text(step_s)}; {bottleneck} limits it")
    found: list[str] = []
    for index, (pipeline, shares) in enumerate(zip(pipelines[:_MOST_EXPLAINED], busy, strict=False)):
        found.append(f"pipeline {index}: {pipeline.microbatches} microbatches in {seconds_text(pipeline.predicted_s)}")
        found += stage_lines(pipeline.stages, nodes, names, offers, shares)
    if len(pipelines) > _MOST_EXPLAINED:
        found.append(f"and {len(pipelines) - _MOST_EXPLAINED} pipelines more")
    return (
        *found,
        f"a step takes about {seconds_text(step_s)}, {seconds_text(end_s)} of it after the last backward; "
        f"{bottleneck} limits it",
    )


def shortage_texts(need_bytes: float, offered_bytes: int) -> tuple[str, str, str]:
    """Return what is needed, what is offered, and how much less that is, for people.

    The first two get digits enough to show a small difference, either way. Needs are rounded up and offers down: who
    offers what the text says offers enough.
    """
    need = math.ceil(need_bytes)
    missing = need - offered_bytes
    # The last digit is worth at most a tenth of the difference.
    digits = max(3, len(str(need)) - len(str(abs(missing))) + 2)
    up = bytes_text(-_floored(-need, digits), digits)
    return up, bytes_text(_floored(offered_bytes, digits), digits), bytes_text(max(0, -_floored(-missing, 3)))


def _floored(size_bytes: int, digits: int) -> int:
    """Return the next integer towards minus infinity that has so many significant digits."""
    step: int = 10 ** max(0, len(str(abs(size_bytes))) - digits)
    return size_bytes // step * step


def brief_names(names: Sequence[str]) -> str:
    """Return names for a sentence: a few one by one, many in runs: "a-1 to a-30, b-3, 31 in all"."""
    if len(names) <= _MOST_LISTED:
        return ", ".join(names)
    runs = _runs(names)
    shown = [first if first == last else f"{first} to {last}" for first, last, _ in runs[:_MOST_LISTED]]
    rest = sum(count for _, _, count in runs[_MOST_LISTED:])
    return f"{', '.join(shown)}{f' and {rest:,} more' if rest else ''}, {len(names):,} in all"


def _runs(names: Sequence[str]) -> list[tuple[str, str, int]]:
    """Return runs of names numbered one after the other, each as its first, its last and their count."""
    found: list[tuple[str, str, int]] = []
    following = ""
    for name in names:
        if name == following:
            first, _, count = found.pop()
            found.append((first, name, count + 1))
        else:
            found.append((name, name, 1))
        numbered = _NUMBERED.match(name)
        following = f"{numbered['prefix']}{int(numbered['number']) + 1}" if numbered else ""
    return found


def left_out_line(spare: Sequence[str], unlinked: Sequence[str], *, chosen: bool) -> tuple[str, ...]:
    """Return lines on the compnodes without a part; `chosen`: the job says how many to use."""
    lines = []
    if spare:
        why = "the job asks for fewer" if chosen else "with more compnodes a step would not be shorter"
        lines.append(f"left out: {brief_names(spare)} ({why})")
    if unlinked:
        lines.append(
            f"left out: {brief_names(unlinked)} (no link with the owner's machine: neither side can be dialled)"
        )
    return tuple(lines)
