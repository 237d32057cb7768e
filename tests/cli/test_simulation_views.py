"""Tables and pictures say what the report says."""

from __future__ import annotations

import io
import sys
import warnings
import xml.etree.ElementTree as ElementTree

import pytest
from rich.console import Console
from workloads import chain, uniform

from fusionai.cli.simulation_pictures import throughput_svg, timeline_svg
from fusionai.cli.simulation_tables import report_view, sweep_table
from fusionai.errors import ConfigError
from fusionai.simulation.availability import Outage, Scripted
from fusionai.simulation.bandwidth_sweep import scaled, sweep_bandwidth
from fusionai.simulation.link_rates import LinkRates
from fusionai.simulation.prices import MachinePrice, Prices
from fusionai.simulation.scenario import Scenario
from fusionai.simulation.simulated_recovery import Replay
from fusionai.simulation.simulation_report import SimulationReport
from fusionai.simulation.simulator import simulate_workload
from fusionai.simulation.workload import Workload

WORKLOAD = Workload((chain("m", 3, microbatches=4, boundary_bytes=2.0, state_bytes=5),), driver="owner")


def run(links: LinkRates) -> SimulationReport:
    scenario = Scenario(
        steps=3,
        churn=Scripted({"m1": (Outage(20.0),)}),
        recovery=Replay(snapshot_steps=1),
        prices=Prices(machines={"m0": MachinePrice(300.0, 0.2)}, usd_per_kwh=0.3),
        timeline_steps=3,
        tokens_per_microbatch=128,
    )
    return simulate_workload(WORKLOAD, links, scenario, offers_bytes={"spare": 1})


def text(renderable: object) -> str:
    screen = Console(file=io.StringIO(), width=200)
    screen.print(renderable)
    assert isinstance(screen.file, io.StringIO)
    return screen.file.getvalue()


def test_tables() -> None:
    shown = text(report_view(run(uniform(bytes_per_s=5.0)), {"m1": "kitchen"}))
    for word in ("tokens/s", "kitchen", "spare", "m0 -> kitchen", "kWh", "all steps are done", "snapshots"):
        assert word in shown
    without = text(report_view(simulate_workload(WORKLOAD, uniform(), Scenario())))
    assert "died" not in without
    assert "kWh" not in without


def test_more_bandwidth_is_never_slower() -> None:
    points = sweep_bandwidth(run, uniform(bytes_per_s=5.0), (0.5, 1.0, 4.0))
    rates = [point.microbatches_per_s for point in points]
    assert rates == sorted(rates)
    assert "x 0.5" in text(sweep_table(points))
    with pytest.raises(ConfigError, match="positive"):
        scaled(uniform(), 0.0)


def test_pictures_are_svg_and_do_not_change() -> None:
    pytest.importorskip("matplotlib")
    report = run(uniform(bytes_per_s=5.0))
    picture = timeline_svg(report, {"m1": "kitchen"})
    assert ElementTree.fromstring(picture).tag.endswith("svg")
    for word in ("kitchen", "spare", "computed again", "seconds"):
        assert word in picture
    assert picture == timeline_svg(report, {"m1": "kitchen"})
    points = sweep_bandwidth(run, uniform(bytes_per_s=5.0), (0.5, 1.0))
    assert "bandwidth of all links" in throughput_svg(points)


def test_names_that_matplotlib_has_no_font_for() -> None:
    pytest.importorskip("matplotlib")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture = timeline_svg(run(uniform(bytes_per_s=5.0)), {"m1": "机器", "m0": "🖥"})
    shown = {text for each in ElementTree.fromstring(picture).iter() for text in each.itertext()}
    assert {"机器", "🖥"} <= {text.strip() for text in shown}


def test_pictures_without_their_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"fusionai\[plots\]"):
        timeline_svg(run(uniform(bytes_per_s=5.0)))


def test_pictures_of_nothing() -> None:
    with pytest.raises(ConfigError, match="timeline_steps"):
        timeline_svg(simulate_workload(WORKLOAD, uniform(), Scenario()))
    with pytest.raises(ConfigError, match="no points"):
        throughput_svg(())
