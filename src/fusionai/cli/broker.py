"""`fusionai broker`: run a pool's broker."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = subparsers.add_parser("broker", help="run a pool's broker; prints the join token")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only; 0.0.0.0: all)"
    )
    parser.add_argument(
        "--port", type=int, default=0, help="port to listen on (default: that of the last start, or any)"
    )
    parser.add_argument(
        "--advertise",
        action="append",
        default=[],
        metavar="HOST:PORT",
        help="address by which others reach this broker, where it differs; may be given several times",
    )
    parser.add_argument("--state-dir", type=Path, help="folder of the broker's key and database")
    parser.add_argument("--token-hours", type=float, default=24.0, help="lifetime of the join token (default: 24)")
    parser.add_argument("--lab", type=Path, metavar="FILE", help="emulate links (TOML; for tests and what-if runs)")
    parser.add_argument("--exit-with-parent", action="store_true", help=argparse.SUPPRESS)
    parser.set_defaults(run_command=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from fusionai.network.loop import run as run_loop

    return run_loop(_serve(arguments))


async def _serve(arguments: argparse.Namespace) -> int:
    import asyncio

    from fusionai.broker.broker import Broker
    from fusionai.cli.console import console, print_result
    from fusionai.cli.data_folder import data_folder
    from fusionai.cli.lab_file import read_lab
    from fusionai.cli.stopping import stop_event
    from fusionai.errors import ConfigError
    from fusionai.network.identity import Identity

    stop = stop_event()
    if not 0 < arguments.token_hours <= 24 * 3650:
        raise ConfigError(f"--token-hours must be above 0, got {arguments.token_hours}")
    if not 0 <= arguments.port <= 65535:
        raise ConfigError(f"--port must be between 0 and 65535, got {arguments.port}")
    lab = read_lab(arguments.lab).network if arguments.lab else None
    folder = arguments.state_dir or data_folder() / "broker"
    identity = await asyncio.to_thread(Identity.load_or_create, folder / "identity.pem")
    broker = Broker(identity, folder, host=arguments.host, port=arguments.port, advertise=arguments.advertise, lab=lab)
    await broker.start()
    try:
        token = broker.token(lifetime_s=arguments.token_hours * 3600)
        screen = console(arguments)
        screen.print(f"broker {identity.peer_id[:12]} listens on {broker.address}", highlight=False)
        screen.print(f"join token, for {arguments.token_hours:g} hours; give it to providers and owners you trust:")
        screen.print(token, style="bold", soft_wrap=True, highlight=False)
        screen.print("a provider runs: fusionai join TOKEN     Ctrl-C stops the broker", highlight=False)
        print_result(arguments, {"token": token, "address": broker.address, "peer": identity.peer_id})
        await stop.wait()
    finally:
        await broker.close()
    console(arguments).print("the broker stopped; members come back when it starts again")
    return 0
