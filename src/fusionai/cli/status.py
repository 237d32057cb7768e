"""`fusionai status`: show a pool's compnodes, links and jobs."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from fusionai.units.byte_counts import bytes_text
from fusionai.units.machine_rates import bit_rate_text, byte_rate_text, flop_rate_text

if TYPE_CHECKING:
    from rich.console import Console

    from fusionai.pool.messages import Status
    from fusionai.scheduling.profile import AccessProfile, Availability, DiskProfile


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = subparsers.add_parser("status", help="show a pool's compnodes, links and jobs")
    parser.add_argument("--broker", required=True, metavar="TOKEN", help="join token of the pool")
    parser.add_argument("--measure", action="store_true", help="measure the links of idle compnodes again first")
    parser.set_defaults(run_command=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from fusionai.cli.console import console, print_result
    from fusionai.network.loop import run as run_loop

    status = run_loop(_ask(arguments.broker, measure=arguments.measure))
    if not arguments.json:
        _show(console(arguments), status)
    if arguments.json:
        import msgspec

        print_result(arguments, msgspec.structs.asdict(status))
    return 0


async def _ask(token: str, *, measure: bool) -> Status:
    from fusionai.network.identity import Identity
    from fusionai.pool.member import MemberConfig, PoolMember
    from fusionai.pool.messages import MeasureLinks, Status, StatusQuery

    member = PoolMember(Identity.ephemeral(), token, "observer", MemberConfig(name="observer", listen=None))
    await member.start()
    try:
        return await member.request(
            MeasureLinks() if measure else StatusQuery(), Status, timeout_s=60.0 if measure else 15.0
        )
    finally:
        await member.close()


def _show(screen: Console, status: Status) -> None:
    from rich.table import Table

    if not status.compnodes:
        screen.print("the pool has no compnodes: run `fusionai join TOKEN` on each machine that is to take part")
    else:
        table = Table("compnode", "state", "device", "speed", "offers", "uses", "busy", "holds", "seen", box=None)
        columns = (
            "disk free",
            "disk write / read",
            "sends / receives",
            "member for",
            "there",
            "losses",
            "between losses",
        )
        machines = Table("machine", *columns, box=None)
        for each in status.compnodes:
            device = each.device
            table.add_row(
                each.name + (" (lab)" if each.lab else ""),
                each.state,
                f"{device.name} ({device.device})" if device else "",
                flop_rate_text(device.flops_per_s.get("matmul", 0.0)) if device else "",
                bytes_text(device.memory_bytes) if device else "",
                bytes_text(each.memory_bytes),
                f"{each.busy:.0%}",
                "; ".join(held.line for held in each.holds),
                f"{each.last_seen_s:.0f} s ago",
            )
            machines.add_row(each.name, *_disk(each.disk), _access(each.access), *_history(each.availability))
        screen.print(table)
        screen.print(machines)
    if status.links:
        table = Table("link", "round trip", "bandwidth", "by", "sent", box=None)
        for link in status.links:
            profile = link.profile
            table.add_row(
                f"{link.source} -> {link.target}",
                f"{profile.rtt_s * 1e3:.1f} ms" if profile else "cannot connect",
                bit_rate_text(profile.bandwidth_bytes_per_s) if profile else "",
                "estimated" if profile and profile.estimated else "measured",
                bytes_text(link.bytes_sent),
            )
        screen.print(table)
    if status.jobs:
        table = Table("job", "name", "state", "step", "loss", "tokens/s", "owner", "compnodes", "reason", box=None)
        for job in status.jobs:
            table.add_row(
                job.job,
                job.name,
                job.state,
                f"{job.step}/{job.steps}" if job.steps else "",
                f"{job.loss:.4f}" if job.loss is not None else "",
                f"{job.tokens_per_s:,.0f}" if job.tokens_per_s else "",
                job.owner,
                ", ".join(job.compnodes),
                job.reason,
            )
        screen.print(table)


def _disk(disk: DiskProfile | None) -> tuple[str, str]:
    if disk is None:
        return "", ""
    write, read = (
        "not measured" if speed is None else byte_rate_text(speed)
        for speed in (disk.write_bytes_per_s, disk.read_bytes_per_s)
    )
    return bytes_text(disk.free_bytes), f"{write} / {read}"


def _access(access: AccessProfile | None) -> str:
    """Return the estimated bandwidth of a machine's access to the network, up and down."""
    return (
        "" if access is None else f"{bit_rate_text(access.up_bytes_per_s)} / {bit_rate_text(access.down_bytes_per_s)}"
    )


def _history(known: Availability | None) -> tuple[str, str, str, str]:
    if known is None:
        return "", "", "", ""
    share = known.present_s / known.member_s if known.member_s > 0 else 1.0
    return (
        f"{known.member_s / 3600:,.1f} h",
        f"{share:.0%}",
        str(known.losses),
        f"{known.mean_time_between_losses_s / 3600:,.0f} h",
    )
