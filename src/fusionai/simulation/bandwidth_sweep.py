"""One plan simulated over faster and slower links, which shows where its throughput stops depending on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from fusionai.errors import ConfigError
from fusionai.scheduling.profile import LinkProfile
from fusionai.simulation.link_rates import LinkRates
from fusionai.simulation.simulation_report import SimulationReport


class SweepPoint(msgspec.Struct, frozen=True):
    """One run of a sweep."""

    factor: float
    """On the bandwidth of every link, uplink and downlink; latencies stay."""
    microbatches_per_s: float
    median_step_s: float
    utilisation: float


def scaled(links: LinkRates, factor: float) -> LinkRates:
    """Return links of `factor` times the bandwidth. Raises ConfigError unless the factor is positive."""
    if not factor > 0:
        raise ConfigError(f"bandwidths can be multiplied by a positive factor only, got {factor}")

    def link(source: str, target: str) -> LinkProfile:
        profile = links.link(source, target)
        return LinkProfile(profile.rtt_s, profile.bandwidth_bytes_per_s * factor)

    return LinkRates(
        link,
        {peer: rate * factor for peer, rate in links.up_bytes_per_s.items()},
        {peer: rate * factor for peer, rate in links.down_bytes_per_s.items()},
    )


def sweep_bandwidth(
    run: Callable[[LinkRates], SimulationReport],
    links: LinkRates,
    factors: Sequence[float] = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 10.0),
) -> tuple[SweepPoint, ...]:
    """Return what `run` reports over links of each factor. Raises ConfigError as `scaled`."""
    found = []
    for factor in factors:
        report = run(scaled(links, factor))
        found.append(SweepPoint(factor, report.microbatches_per_s, report.median_step_s, report.utilisation))
    return tuple(found)
