"""Pictures of a simulation as SVG: the timeline of passes, and throughput against bandwidth.

They need matplotlib, which nothing else does; it is loaded when a picture is asked for. The same data gives the same
text, so pictures can be compared and kept under version control.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from fusionai.errors import ConfigError
from fusionai.simulation.bandwidth_sweep import SweepPoint
from fusionai.simulation.simulation_report import PassReport, SimulationReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = {"forward": "#4c8bc0", "backward": "#e39a3b"}
_AGAIN, _LOST = "#8f6bb3", "#c64a4a"
_MOST_MACHINES = 60
"""Rows of a timeline: more are not told apart on a page."""
_MOST_LABELS = 400
"""Passes up to which each carries its microbatch's number."""


def timeline_svg(report: SimulationReport, names: Mapping[str, str] | None = None) -> str:
    """Return the passes of a report's timeline, a row for each machine.

    Machines stand in the order of pipelines and stages, the first `_MOST_MACHINES` of them.

    Raises:
        ConfigError: matplotlib is not installed, or the report has no timeline.
    """
    if not report.timeline:
        raise ConfigError("the report has no timeline; simulate with timeline_steps of at least 1")
    figure = _figure()
    peers = list(dict.fromkeys(each.peer for each in sorted(report.timeline, key=_place)))
    rows = {peer: row for row, peer in enumerate(peers[:_MOST_MACHINES])}
    shown = [each for each in report.timeline if each.peer in rows]
    figure.set_size_inches(12, 1.2 + 0.32 * len(rows))
    axes = figure.add_subplot()
    kinds: dict[str, tuple[str, list[PassReport]]] = {
        "forward": (_COLOURS["forward"], []),
        "backward": (_COLOURS["backward"], []),
        "computed again": (_AGAIN, []),
        "lost": (_LOST, []),
    }
    for each in shown:
        kinds["lost" if each.lost else "computed again" if each.again else each.direction][1].append(each)
    for label, (colour, passes) in kinds.items():
        if passes:
            axes.barh(
                [rows[each.peer] for each in passes],
                [each.end_s - each.start_s for each in passes],
                left=[each.start_s for each in passes],
                height=0.8,
                color=colour,
                edgecolor="white",
                linewidth=0.4,
                label=label,
            )
    if len(shown) <= _MOST_LABELS:
        for each in shown:
            middle_s = (each.start_s + each.end_s) / 2
            axes.text(middle_s, rows[each.peer], str(each.microbatch), ha="center", va="center", fontsize=6)
    axes.set_yticks(range(len(rows)), [(names or {}).get(peer, peer) for peer in rows])
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    if len(peers) > len(rows):
        axes.set_title(f"{len(rows)} of {len(peers):,} machines", fontsize=9)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12 - 0.4 / len(rows)), ncols=4, frameon=False, fontsize=8)
    return _svg(figure)


def throughput_svg(points: Sequence[SweepPoint]) -> str:
    """Return throughput and utilisation against bandwidth.

    Raises:
        ConfigError: matplotlib is not installed, or there are no points.
    """
    if not points:
        raise ConfigError("there is nothing to draw: the sweep has no points")
    figure = _figure()
    figure.set_size_inches(7, 4)
    axes = figure.add_subplot()
    factors = [each.factor for each in points]
    axes.plot(factors, [each.microbatches_per_s for each in points], marker="o", color=_COLOURS["forward"])
    axes.set_xscale("log")
    axes.set_xticks(factors, [f"x {factor:g}" for factor in factors])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("bandwidth of all links")
    axes.set_ylabel("microbatches per second")
    axes.grid(alpha=0.3)
    return _svg(figure)


def _place(each: PassReport) -> tuple[int, int]:
    return each.pipeline, each.stage


_MISSING = "pictures need matplotlib; install it: pip install 'fusionai[plots]'"


def require_matplotlib() -> None:
    """Raise ConfigError if pictures cannot be drawn, without loading anything."""
    if find_spec("matplotlib") is None:
        raise ConfigError(_MISSING)


def _figure() -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(_MISSING) from error
    return Figure(layout="constrained")


def _svg(figure: Figure) -> str:
    import matplotlib

    text = io.StringIO()
    # Identifiers and the date would otherwise differ from one call to the next.
    settings: dict[str, Any] = {"svg.hashsalt": "fusionai", "svg.fonttype": "none"}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # Names are written as text, and whoever shows the picture has a font for them; only their width is a guess.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from", category=UserWarning)
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()
