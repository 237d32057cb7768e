"""A job's plan executed in the simulator: what `fusionai simulate` says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import msgspec

from fusionai.errors import ConfigError, PlacementError
from fusionai.scheduling.plan import Plan
from fusionai.scheduling.segments import reachable
from fusionai.simulation.availability import Poisson, Scripted
from fusionai.simulation.bandwidth_sweep import SweepPoint, sweep_bandwidth
from fusionai.simulation.codecs import Codec, Dense, TopK
from fusionai.simulation.forecast.elsewhere import saying_elsewhere
from fusionai.simulation.forecast.forecast import Assumed, assumptions
from fusionai.simulation.forecast.request import Request, best_on, offered, plan_on, searched, setting_of, with_owner
from fusionai.simulation.hardware.what_if_pool import WhatIfPool
from fusionai.simulation.jitter import Jitter
from fusionai.simulation.link_rates import LinkRates, links_of_what_if
from fusionai.simulation.prices import MachinePrice, Prices, price_of
from fusionai.simulation.scenario import Scenario
from fusionai.simulation.simulated_recovery import Recovery, Replay
from fusionai.simulation.simulation_report import SimulationReport
from fusionai.simulation.simulator import simulate


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationOptions:
    """The conditions of a simulation, of which `simulate_on_pool` makes a `Scenario`. Raises ConfigError."""

    steps: int
    """Steps to simulate."""
    seed: int = 0
    mean_up_s: float | None = None
    """For how long a compnode stays, on average; None: nobody leaves."""
    mean_down_s: float = 600.0
    recovery: Recovery = field(default_factory=Replay)
    top_k: float | None = None
    """Tensors are sent with one element in so many; None: as they are."""
    jitter: float = 0.0
    """Standard deviation of machines' speeds from step to step, as a share."""
    drift: float = 0.0
    """The same for a slow drift."""
    usd_per_kwh: float = 0.15
    rented: bool = False
    """Count the catalogue's rent where it has one, too."""
    factors: tuple[float, ...] = ()
    """On the bandwidth of all links: the plan is executed over each."""
    timeline_steps: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"--steps must be at least 1, got {self.steps}")


class WholeJob(msgspec.Struct, frozen=True, kw_only=True):
    """The steps that the job file asks for, at what the simulated steps took on average, recoveries included."""

    steps: int
    elapsed_s: float
    energy_kwh: float
    electricity_usd: float
    rent_usd: float
    sent_bytes: float


class SimulatedJob(msgspec.Struct, frozen=True, kw_only=True):
    """The JSON of `fusionai simulate --json`."""

    plan: Plan
    """What was executed."""
    pipelines: int
    predicted_step_s: float
    """By the planner, for a step without variation and failures."""
    predicted_tokens_per_s: float
    undisturbed_step_s: float
    """Simulated, for a step without variation, failures, snapshots and codecs."""
    disturbed_by: tuple[str, ...]
    """Options that may make the simulated steps take longer or shorter than that."""
    planning_s: float
    names: dict[str, str]
    """Machines by peer, as the pool file names them; the report has peers."""
    report: SimulationReport
    job: WholeJob | None
    """None where the steps simulated were not finished."""
    sweep: tuple[SweepPoint, ...]
    unrented: tuple[str, ...]
    """Machines of the plan whose rent was asked for and is not in the catalogue."""
    seed: int
    assumed: tuple[Assumed, ...]
    lab: bool = False


def simulate_on_pool(
    request: Request,
    what_if: WhatIfPool,
    given: SimulationOptions,
    *,
    job_steps: int,
    pipelines: bool,
    clock_s: Callable[[], float],
) -> SimulatedJob:
    """Plan a job for a pool, execute the plan, and return what happened. Blocks for seconds, or longer with many steps.

    Args:
        request: the job.
        what_if: the pool.
        given: what happens meanwhile.
        job_steps: of the whole job.
        pipelines: whether the best plan of many pipelines is executed, not what a broker would run today.
        clock_s: times the planning.

    Raises:
        ConfigError: the job is private and the pool has no owner, a value is wrong, or the job's cuts are.
        PlacementError: no plan meets the constraints; the text says what is missing, and what else could train the job.
    """
    what_if = offered(request, what_if)
    full = with_owner(what_if, request.problem.privacy)
    if pipelines and request.arranged:
        raise ConfigError(
            "--pipelines: the job says how many machines serve or where it is cut, which is for one pipeline; set "
            "placement.compnodes=0 and leave placement.cuts out, or leave --pipelines out"
        )
    started_s = clock_s()
    try:
        plan = best_on(request, full) if pipelines else plan_on(request, setting_of(searched(request, full)))
    except PlacementError as error:
        raise saying_elsewhere(error, request, what_if) from error
    planning_s = clock_s() - started_s
    prices, unrented = _prices(full, plan, given)
    scenario = _scenario(request, full, plan, given, prices)
    assert full.owner is not None
    devices = {each.peer: each.device for each in full.machines if reachable(each, full.owner)}
    devices[full.owner.peer] = full.owner.device

    def execute(links: LinkRates, scenario: Scenario = scenario) -> SimulationReport:
        return simulate(
            plan,
            request.problem.graph,
            links,
            devices,
            scenario,
            precision=request.problem.precision,
            optimizer_states=request.problem.optimizer_states,
        )

    links = links_of_what_if(full)
    report = execute(links)
    undisturbed = execute(
        links, replace(scenario, steps=1, codec=Dense(), churn=Scripted(), recovery=Replay(), jitter=None)
    )
    plain = replace(scenario, timeline_steps=0)
    return SimulatedJob(
        plan=plan,
        pipelines=len(plan.pipelines),
        predicted_step_s=plan.predicted_step_s,
        predicted_tokens_per_s=request.tokens_per_step / plan.predicted_step_s,
        undisturbed_step_s=undisturbed.median_step_s,
        disturbed_by=_disturbances(given),
        planning_s=planning_s,
        names={each.peer: each.name for each in full.machines},
        report=report,
        job=_whole_job(report, job_steps),
        sweep=sweep_bandwidth(lambda changed: execute(changed, plain), links, given.factors) if given.factors else (),
        unrented=unrented,
        seed=given.seed,
        assumed=assumptions(what_if),
    )


def _scenario(request: Request, what_if: WhatIfPool, plan: Plan, given: SimulationOptions, prices: Prices) -> Scenario:
    codec: Codec = Dense()
    if given.top_k is not None:
        rates = {each.peer: each.device.memory_bytes_per_s for each in what_if.machines}
        codec = TopK(ratio=given.top_k, memory_bytes_per_s=rates)
    return Scenario(
        steps=given.steps,
        codec=codec,
        churn=Scripted()
        if given.mean_up_s is None
        else Poisson(
            seed=given.seed,
            mean_up_s=given.mean_up_s,
            mean_down_s=given.mean_down_s,
            steady=frozenset({plan.owner}),
        ),
        recovery=given.recovery,
        jitter=Jitter(seed=given.seed, spread=given.jitter, drift=given.drift) if given.jitter or given.drift else None,
        prices=prices,
        tokens_per_microbatch=request.tokens_per_step // request.problem.microbatches,
        timeline_steps=given.timeline_steps,
        # What churn keeps from its end is given up within seconds, not minutes.
        most_failures=max(1000, 10 * given.steps, 20 * len(what_if.machines)),
    )


def _disturbances(given: SimulationOptions) -> tuple[str, ...]:
    """Return the options given that change how long a step takes."""
    options = {
        "--churn": given.mean_up_s is not None,
        "--jitter": bool(given.jitter or given.drift),
        "--codec": given.top_k is not None,
    }
    return tuple(option for option, used in options.items() if used)


def _prices(what_if: WhatIfPool, plan: Plan, given: SimulationOptions) -> tuple[Prices, tuple[str, ...]]:
    """Return power and rent of the pool's machines, and those of the plan whose rent is asked for and unknown."""
    used = plan.peers
    found: dict[str, MachinePrice] = {}
    unrented = []
    for machine, hardware in zip(what_if.machines, what_if.hardware, strict=True):
        # The owner's machine is its own.
        rented = given.rented and machine is not what_if.owner
        price = price_of(hardware, rented=rented) if hardware is not None else None
        if price is None and rented:
            price = price_of(hardware, rented=False) if hardware is not None else None
            if machine.peer in used:
                unrented.append(machine.name)
        if price is not None:
            found[machine.peer] = price
    return Prices(machines=found, usd_per_kwh=given.usd_per_kwh), tuple(unrented)


def _whole_job(report: SimulationReport, steps: int) -> WholeJob | None:
    if not report.steps or not report.finished:
        return None
    share = steps / report.steps
    return WholeJob(
        steps=steps,
        elapsed_s=report.elapsed_s * share,
        energy_kwh=report.energy_j / 3.6e6 * share,
        electricity_usd=report.electricity_usd * share,
        rent_usd=report.rent_usd * share,
        sent_bytes=report.sent_bytes * share,
    )
