"""The driver's side of weights: it sends them, has machines hand them over, and collects them.

The machines' side is `weight_traffic`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Protocol

import msgspec

from fusionai.errors import JobError, ProtocolError
from fusionai.graph.model import WeightKey
from fusionai.network.identity import PeerId
from fusionai.pool.identifiers import Epoch, JobEpoch
from fusionai.pool.job_wire import JobWire
from fusionai.scheduling.job_events import Stalled
from fusionai.scheduling.recovery import PATIENCE
from fusionai.tensor import TensorData
from fusionai.training.job_watch import JobWatch
from fusionai.training.machine import Machine
from fusionai.training.messages import (
    FinishLoading,
    HandOverWeights,
    InheritWeights,
    PulledWeight,
    PullWeights,
    WeightsHandedOver,
    WeightTensor,
)

READY_TIMEOUT_S = 120.0
"""How long all machines may take to load their last weights and link to each other."""

PULL_TIMEOUT_S = PATIENCE.tensor_s
"""How long one machine's weights may take to be sent."""

WeightSink = Callable[[WeightKey, str | None, TensorData], Awaitable[None]]
"""Takes a weight, or with the name of a state the optimizer's state of a weight."""


class WeightSource(Protocol):
    """Where the weights that training starts from come from."""

    def read(self, name: str) -> TensorData:
        """Return a weight by its key. Blocks."""


class WeightOrders:
    """What a driver has the machines of one plan do with weights."""

    def __init__(self, plan: JobEpoch, wire: JobWire, watch: JobWatch) -> None:
        self._job, self._epoch = plan.job, plan.epoch
        self._wire = wire
        self._watch = watch
        self._machines = watch.machines
        self._sink: Callable[[PeerId, PulledWeight, TensorData], Awaitable[None]] | None = None

    # --- to the machines ------------------------------------------------------------------------------------------

    async def load(self, weights: WeightSource, states: Sequence[str], *, optimizer_step: int) -> None:
        """Send every machine its weights (and optimizer states when resuming), and have all link to each other."""

        async def load(machine: Machine) -> None:
            count = await self._send_all(machine, weights, states)
            await self._finish(machine, count, optimizer_step)

        await self._by_all(load)

    async def _send_all(self, machine: Machine, weights: WeightSource, states: Sequence[str]) -> int:
        """Send a machine its tensors; return how many."""
        count = 0
        trainable = {weight.key for subdag in machine.subdags for weight in subdag.weights if weight.trainable}
        for key in machine.keys:
            for state in (None, *(states if key in trainable else ())):
                name = key if state is None else f"{key}::{state}"
                tensor = await asyncio.to_thread(weights.read, name)
                header = WeightTensor(self._job, self._epoch, key, state, tensor.dtype, tensor.shape)
                await self._wire.send(machine.peer, header, tensor)
                count += 1
        return count

    async def _finish(self, machine: Machine, tensors: int, optimizer_step: int) -> None:
        message = FinishLoading(self._job, self._epoch, tensors, optimizer_step)
        await self._watch.ask(machine, message, timeout_s=READY_TIMEOUT_S)

    # --- from machine to machine ----------------------------------------------------------------------------------

    async def inherit(self, sources: Mapping[str, Mapping[WeightKey, str]]) -> None:
        """Tell each machine whence its weights come, instead of sending them: see `handing_over`."""

        async def tell(machine: Machine) -> None:
            message = InheritWeights(self._job, self._epoch, dict(sources[machine.peer]))
            await self._watch.ask(machine, message, timeout_s=READY_TIMEOUT_S)

        await self._by_all(tell)

    async def give(self, to: Epoch, targets: Mapping[str, Mapping[WeightKey, tuple[str, ...]]]) -> int:
        """Have each machine send its weights and states to those of the new plan `to`; return the bytes sent."""
        total_bytes = 0

        async def send(machine: Machine) -> None:
            nonlocal total_bytes
            if not targets.get(machine.peer):
                return
            message = HandOverWeights(self._job, self._epoch, to, dict(targets[machine.peer]))
            answer = await self._watch.ask(machine, message, timeout_s=PULL_TIMEOUT_S)
            try:
                sent = msgspec.msgpack.decode(answer, type=WeightsHandedOver).bytes_sent
            except msgspec.MsgspecError as error:
                raise JobError(f"compnode {machine.name} tells nothing sensible of its hand-over: {error}") from error
            total_bytes += sum(sent.values())

        await self._by_all(send)
        return total_bytes

    async def settle(self, tensors: Mapping[str, int], *, optimizer_step: int) -> None:
        """Wait until each machine has so many tensors by peer, and is linked to its neighbours."""
        await self._by_all(lambda machine: self._finish(machine, tensors[machine.peer], optimizer_step))

    # --- from the machines ----------------------------------------------------------------------------------------

    async def pull(self, states: Sequence[str], sink: WeightSink) -> None:
        """Hand every weight that some machine holds, and with it its optimizer states, to `sink`, each once.

        One tensor at a time comes from each machine, so no more than that is ever in memory.
        """
        seen: set[WeightKey] = set()
        missing: set[tuple[WeightKey, str | None]] = set()
        arrived = asyncio.Event()
        asked = self._wire.me

        async def take(peer: PeerId, header: PulledWeight, tensor: TensorData) -> None:
            if peer != asked or (header.key, header.state) not in missing:
                raise ProtocolError(f"{header.key!r} was not asked for, or came twice")
            await sink(header.key, header.state, tensor)
            missing.discard((header.key, header.state))
            arrived.set()

        async def all_here() -> None:
            # Bulk and control are not ordered against each other: an answer may overtake its tensors.
            while missing:
                arrived.clear()
                await self._watch.patiently(arrived, Stalled((asked,), "tensor", 0.0))

        self._sink = take
        try:
            for machine in self._machines:
                asked = machine.peer
                wanted: list[tuple[WeightKey, str | None]] = []
                for subdag in machine.subdags:
                    for weight in subdag.weights:
                        if weight.key not in seen and weight.kind != "constant":
                            seen.add(weight.key)
                            wanted.append((weight.key, None))
                            wanted += [(weight.key, state) for state in states if weight.trainable]
                missing.update(wanted)
                message = PullWeights(self._job, self._epoch, tuple(wanted))
                await self._watch.guard(self._watch.ask(machine, message, timeout_s=PULL_TIMEOUT_S))
                await self._watch.guard(all_here())
        finally:
            self._sink = None

    async def take(self, machine: Machine, header: object, tensor: TensorData) -> None:
        """Take a tensor from a machine. Raises ProtocolError when none was asked for, or not this one."""
        if not isinstance(header, PulledWeight) or self._sink is None or header.key not in machine.keys:
            raise ProtocolError(f"compnode {machine.name} sent a tensor that was not asked for")
        await self._sink(machine.peer, header, tensor)

    async def _by_all(self, work: Callable[[Machine], Awaitable[None]]) -> None:
        """Do something with every machine, side by side, unless the job ends meanwhile."""
        await self._watch.guard(asyncio.gather(*(work(each) for each in self._machines)))
