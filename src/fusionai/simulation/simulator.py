"""Entry to the simulator: takes a plan, a graph, machines and links, and returns a report.

It reads no clock and no files; chance comes from seeds.
"""

from __future__ import annotations

from collections.abc import Mapping

from fusionai.graph.model import OpDag
from fusionai.scheduling.plan import Plan
from fusionai.scheduling.profile import DeviceProfile
from fusionai.simulation.job_run import JobRun
from fusionai.simulation.link_rates import LinkRates
from fusionai.simulation.scenario import Scenario
from fusionai.simulation.simulation_report import SimulationReport
from fusionai.simulation.workload import Workload
from fusionai.simulation.workload_of_plan import workload_of


def simulate(
    plan: Plan,
    graph: OpDag,
    links: LinkRates,
    devices: Mapping[str, DeviceProfile],
    scenario: Scenario,
    *,
    precision: str,
    optimizer_states: int,
) -> SimulationReport:
    """Execute a plan and return what happened.

    Args:
        plan: of any number of pipelines.
        graph: the one that the plan was made for, as arranged.
        links: `links_of_what_if`, or any other; `LinkRates(pool.link)` for those of a measured pool.
        devices: profiles by peer, the owner's among them. Those that the plan leaves out are the backup pool.
        scenario: steps, codecs, churn, recovery, jitter and prices.
        precision: "fp32" or "bf16", as planned.
        optimizer_states: tensors that the optimizer keeps for each weight (AdamW: 2).

    Raises:
        ConfigError: the plan, the graph and the devices do not belong together.
        ValueError: a stage of the plan may hold no microbatch in flight.
    """
    workload = workload_of(plan, graph, devices, precision=precision, optimizer_states=optimizer_states)
    return simulate_workload(
        workload, links, scenario, offers_bytes={peer: device.memory_bytes for peer, device in devices.items()}
    )


def simulate_workload(
    workload: Workload, links: LinkRates, scenario: Scenario, *, offers_bytes: Mapping[str, int] | None = None
) -> SimulationReport:
    """Execute a workload whose seconds and bytes are given; `offers_bytes` names the machines of the backup pool too.

    Raises ValueError as `simulate`.
    """
    return JobRun(workload, links, scenario, offers_bytes).run()
