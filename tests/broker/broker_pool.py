"""A real broker and real members in one process, over real sockets, and a small OP-DAG to give them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from fusionai.broker.broker import Broker, BrokerTimes
from fusionai.compnode.compnode_member import CompnodeMember
from fusionai.compnode.disk_report import DiskReport
from fusionai.execution.plane import OptimizerConfig, Plane, ProgramOptions
from fusionai.graph.encoding import content_hash, encode
from fusionai.graph.model import Input, Node, OpDag, Ref, TensorType, ValueName, Weight, WeightKey
from fusionai.graph.vocabulary import VOCABULARY_VERSION
from fusionai.network.identity import Identity
from fusionai.owner.membership import OwnerMember
from fusionai.pool.identifiers import FIRST_EPOCH, JobEpoch
from fusionai.pool.member import MemberConfig, PoolMember
from fusionai.pool.messages import JobLaunched, Status, StatusQuery, SubmitJob
from fusionai.scheduling.profile import DeviceProfile
from fusionai.training.training_work import TrainingWork

QUICK = BrokerTimes(heartbeat_s=0.1, grace_s=2.0, recovery_s=5.0, probe_s=0.05)
LAYERS, WIDTH = 4, 8

Joined = TypeVar("Joined", bound=PoolMember)


def profile(memory_bytes: int = 1 << 30) -> DeviceProfile:
    """A device's profile, without measuring."""
    return DeviceProfile("test CPU", "cpu", "torch", "2.13", memory_bytes, 1, {"matmul": 1e10}, 1e10, 1e-5)


def plane() -> Plane:
    """The torch plane, on one thread."""
    from fusionai.execution.planes import plane as named

    found = named("torch")
    found.set_threads(1)
    return found


def graph() -> OpDag:
    """A chain of linear layers and the mean squared error: nodes h0, h1, ..., loss."""

    def name(text: str) -> ValueName:
        return ValueName(text)

    hidden = TensorType("float32", ("s0", WIDTH))
    nodes, types, weights, last = [], {}, [], name("x")
    for layer in range(LAYERS):
        weight, out = name(f"w{layer}"), name(f"h{layer}")
        weights.append(
            Weight(
                weight, WeightKey(f"layers.{layer}.weight"), TensorType("float32", (WIDTH, WIDTH)), "parameter", True
            )
        )
        nodes.append(Node(out, "aten.linear.default", (Ref(last), Ref(weight)), {}, (out,), scope=f"layers.{layer}"))
        types[out], last = hidden, out
    nodes.append(Node("loss", "aten.mse_loss.default", (Ref(last), Ref(name("y"))), {}, (name("loss"),)))
    types[name("loss")] = TensorType("float32", ())
    inputs = (Input(name("x"), hidden, "data", True), Input(name("y"), hidden, "labels", True))
    return OpDag(
        VOCABULARY_VERSION, "chain", {"s0": (name("x"), 0)}, inputs, tuple(weights), tuple(nodes), types, name("loss")
    )


@asynccontextmanager
async def broker_at(folder: Path, **options: Any) -> AsyncIterator[Broker]:
    """A broker on a state folder."""
    identity = Identity.load_or_create(folder / "identity.pem")
    broker = Broker(identity, folder, **{"times": QUICK, **options})
    await broker.start()
    try:
        yield broker
    finally:
        await broker.close()


@asynccontextmanager
async def started(member: Joined) -> AsyncIterator[Joined]:
    """A member from when it has joined until it leaves."""
    await member.start()
    try:
        yield member
    finally:
        await member.close()


def member_of(
    token: str,
    name: str,
    *,
    identity: Identity | None = None,
    with_plane: Plane | None = None,
    memory_bytes: int = 1 << 30,
    disk: DiskReport | None = None,
    **config: Any,
) -> AbstractAsyncContextManager[CompnodeMember]:
    """A compnode's member that has joined; `config` are fields of `MemberConfig`."""
    return started(
        CompnodeMember(
            identity or Identity.ephemeral(),
            token,
            MemberConfig(name=name, **config),
            profile=profile(memory_bytes),
            work=[TrainingWork(with_plane)],
            disk=disk,
        )
    )


def owner_of(
    token: str, name: str = "owner", *, with_plane: Plane, identity: Identity | None = None, **config: Any
) -> AbstractAsyncContextManager[OwnerMember]:
    """An owner's member that has joined; `config` are fields of `MemberConfig`."""
    return started(
        OwnerMember(
            identity or Identity.ephemeral(),
            token,
            MemberConfig(name=name, **config),
            profile=profile(),
            plane=with_plane,
        )
    )


def observer_of(token: str, name: str = "observer", **config: Any) -> AbstractAsyncContextManager[PoolMember]:
    """An observer that has joined; `config` are fields of `MemberConfig`."""
    return started(PoolMember(Identity.ephemeral(), token, "observer", MemberConfig(name=name, **config)))


async def status(member: PoolMember) -> Status:
    """Ask the broker."""
    return await member.request(StatusQuery(), Status, timeout_s=60)


def first_plan(launched: JobLaunched) -> JobEpoch:
    """The plan that a job was launched with, as machines call it."""
    return JobEpoch(launched.job, FIRST_EPOCH)


def held(member: CompnodeMember) -> list[JobEpoch]:
    """What a member holds shares of."""
    return [JobEpoch(each.job, each.epoch) for each in member.holds]


async def states(member: PoolMember) -> dict[str, str]:
    """State by name of compnode."""
    return {each.name: each.state for each in (await status(member)).compnodes}


async def until(condition: Callable[[], Any], *, within_s: float = 60.0) -> None:
    """Wait until `condition()`, which may be a coroutine, holds; a busy machine may take long."""
    start_s = time.monotonic()
    while True:
        found = condition()
        if asyncio.iscoroutine(found):
            found = await found
        if found:
            return
        assert time.monotonic() - start_s < within_s, "it did not come about in time"
        await asyncio.sleep(0.02)


async def submit(owner: OwnerMember, dag: OpDag | None = None, **changes: Any) -> JobLaunched:
    """Submit the chain, open, cut in the middle; `changes` are fields of the request."""
    dag = dag or graph()
    fields: dict[str, Any] = {
        "job_name": "chain",
        "config": "",
        "graph_hash": content_hash(dag),
        "front": 0,
        "back": len(dag.nodes),
        "sizes": {"s0": 2},
        "microbatches": 2,
        "privacy": "open",
        "options": ProgramOptions(optimizer=OptimizerConfig(kind="sgd")),
        "compnodes": 2,
    }
    request = SubmitJob(**{**fields, **changes})
    await owner.send_graph(request.graph_hash, encode(dag))
    return await owner.request(request, JobLaunched, timeout_s=60)
