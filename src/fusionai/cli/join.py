"""`fusionai join`: give this machine to a pool."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fusionai.compnode.agent import Joined
    from fusionai.execution.plane import Plane
    from fusionai.pool.messages import HeldShare


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = subparsers.add_parser("join", help="give this machine to a pool, until Ctrl-C")
    parser.add_argument("token", help="join token, as the broker printed it")
    parser.add_argument("--device", help="device to give, such as cuda:0 or cpu (default: the best)")
    parser.add_argument("--threads", type=int, help="most CPU threads to use (default: all cores)")
    parser.add_argument("--memory", help="most memory to give, such as 8GB (default: a safe share of what is free)")
    parser.add_argument("--name", help="name in the pool (default: this machine's)")
    parser.add_argument(
        "--listen",
        default="127.0.0.1:0",
        metavar="HOST:PORT",
        help="where other machines may connect (default: 127.0.0.1:0, this machine only; 0.0.0.0:PORT: all)",
    )
    parser.add_argument(
        "--advertise",
        action="append",
        default=[],
        metavar="HOST:PORT",
        help="address by which others reach --listen, where it differs; may be given several times",
    )
    parser.add_argument("--remeasure", action="store_true", help="measure the device even if that was done before")
    parser.add_argument("--state-dir", type=Path, help="folder of this compnode's key and measurements")
    parser.add_argument(
        "--slowdown", type=float, metavar="FACTOR", help="emulate a device slower by this factor (lab mode)"
    )
    parser.add_argument("--lab", type=Path, metavar="FILE", help="emulate links and speeds (TOML; lab mode)")
    parser.add_argument(
        "--drain",
        default="5min",
        metavar="DURATION",
        help="when stopped with a part in a job: how long others may take to take it over (default: 5min; 0: leave at "
        "once, as a second Ctrl-C does)",
    )
    parser.add_argument("--exit-with-parent", action="store_true", help=argparse.SUPPRESS)
    parser.set_defaults(run_command=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from fusionai.cli.data_folder import data_folder
    from fusionai.compnode.state_folder import StateFolder
    from fusionai.network.loop import run as run_loop

    own = arguments.state_dir
    with StateFolder(own) if own else StateFolder.first_free(data_folder() / "compnodes") as folder:
        return run_loop(_serve(arguments, folder.path))


async def _serve(arguments: argparse.Namespace, folder: Path) -> int:
    from fusionai.cli.console import console, print_result
    from fusionai.cli.lab_file import read_lab
    from fusionai.cli.stopping import stop_event
    from fusionai.compnode.agent import MOST_DRAIN_S, Agent, AgentConfig
    from fusionai.errors import ConfigError
    from fusionai.units.byte_counts import bytes_text, parse_memory
    from fusionai.units.durations import parse_duration
    from fusionai.units.machine_rates import flop_rate_text

    nothing = re.fullmatch(r"\s*0+(\.0*)?\s*(ms|s|min|h|d)?\s*", arguments.drain)
    drain_s = 0.0 if nothing else parse_duration(arguments.drain, name="--drain")
    if drain_s > MOST_DRAIN_S:
        raise ConfigError(
            f"--drain {arguments.drain!r} is longer than a day; write such as 5min, or 0 to leave at once"
        )
    stop = stop_event()
    screen = console(arguments)
    name = arguments.name or _machine_name()
    lab = read_lab(arguments.lab) if arguments.lab else None
    slowdown = arguments.slowdown
    if slowdown is None:
        slowdown = lab.slowdown.get(name, 1.0) if lab else 1.0
    agent = Agent(
        AgentConfig(
            token=arguments.token,
            name=name,
            state_folder=folder,
            device=arguments.device,
            threads=arguments.threads,
            memory_bytes=parse_memory(arguments.memory) if arguments.memory else None,
            listen=arguments.listen,
            advertise=tuple(arguments.advertise),
            remeasure=arguments.remeasure,
            slowdown=slowdown,
            throttle=lab.throttle.get(name) if lab else None,
            lab=lab.network if lab else None,
            drain_s=drain_s,
        ),
        _torch_plane,
    )

    def joined(member: Joined) -> None:
        device = member.device
        speed = flop_rate_text(device.flops_per_s.get("matmul", 0.0))
        screen.print(
            f"joined as {member.name}: {device.name} ({device.device}, {device.threads} threads), "
            f"{speed} in matrix products, offers {bytes_text(device.memory_bytes)}",
            highlight=False,
            soft_wrap=True,
        )
        if member.lab:
            screen.print("lab mode: this machine's speed or links are emulated", style="yellow")
        screen.print("Ctrl-C leaves the pool")
        print_result(arguments, member)

    def draining(held: Sequence[HeldShare]) -> bool:
        if stop.orphaned:
            return False
        what = ", ".join(each.line for each in held) or "its part"
        screen.print(
            f"leaving: others take {what} over first; Ctrl-C again leaves at once",
            highlight=False,
            soft_wrap=True,
        )
        return True

    await agent.run(stop, joined, draining)
    screen.print("left the pool")
    return 0


def _torch_plane() -> Plane:
    from fusionai.execution.planes import plane

    return plane("torch")


def _machine_name() -> str:
    """Return this machine's name in the letters that names may have."""
    import platform
    import re

    return re.sub(r"[^A-Za-z0-9._-]", "-", platform.node()).strip("-._")[:40] or "compnode"
