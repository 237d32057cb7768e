"""Weights and optimizer states that come to a stage and leave it: loading, pulling, and handing over to a new plan.

A job that is planned anew while it runs has two plans for a while, told apart by their epochs: the running one, and the
new one, whose programs are made and linked but empty. Between two steps the machines of the running plan send what they
hold straight to its new holders; a machine that keeps a weight hands it over in memory.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable

from fusionai.errors import GraphError, JobError, ProtocolError
from fusionai.execution.program import RoundProgram
from fusionai.graph.model import WeightKey
from fusionai.network.identity import PeerId
from fusionai.pool.job_wire import JobWire
from fusionai.tensor import TensorData
from fusionai.training.compute import Compute
from fusionai.training.messages import (
    FinishLoading,
    HandOverWeights,
    InheritWeights,
    PulledWeight,
    PullWeights,
    WeightTensor,
)
from fusionai.training.roster import Roster
from fusionai.training.share import Share

LOAD_TIMEOUT_S = 100.0
"""How long the last weights may be on their way once the driver has sent them; less than the driver waits."""


class WeightTraffic:
    """The weights of one machine's share of a job."""

    def __init__(
        self,
        share: Share,
        wire: JobWire,
        compute: Compute,
        program: RoundProgram,
        count_sent: Callable[[str, int], None],
    ) -> None:
        self._wire = wire
        self._compute = compute
        self._program = program
        self._count_sent = count_sent
        self._weights = share.weights()
        self._optimizer_states = share.options.optimizer.states
        self._sources: dict[WeightKey, str] | None = None
        """Who may send which weight; None: the driver sends all of them."""
        self._inherited: set[tuple[WeightKey, str | None]] = set()
        self._loaded = 0
        self._arrived = asyncio.Event()
        self._pulling = asyncio.Lock()

    # --- coming -------------------------------------------------------------------------------------------------

    def inherit(self, roster: Roster, message: InheritWeights) -> None:
        """Take weights from the machines named from now on, each from one. Raises ProtocolError."""
        if self._sources is not None or self._loaded:
            raise ProtocolError("weights have been sent or announced here already")
        if message.sources.keys() != self._weights.keys():
            raise ProtocolError(
                f"sources of {len(message.sources)} weights are named, but {len(self._weights)} are held here"
            )
        unknown = {peer for peer in message.sources.values() if peer != self._wire.me and not roster.knows(peer)}
        if unknown:
            raise ProtocolError(f"{min(unknown)[:12]} is to send weights, but is no machine of this job")
        self._sources = dict(message.sources)

    async def take(self, roster: Roster, peer: PeerId, header: WeightTensor, tensor: TensorData) -> None:
        """Load a weight or an optimizer state.

        Raises ProtocolError when it is not this peer's to send, came before, or is not of the declared dtype and shape.
        """
        if self._sources is None:
            if not roster.is_driver(peer):
                raise ProtocolError(f"a weight came from {peer[:12]}, which is not the driver")
        else:
            if self._sources.get(header.key) != peer:
                raise ProtocolError(f"the weight {header.key[:80]!r} is not {peer[:12]}'s to send")
            if (header.key, header.state) in self._inherited:
                raise ProtocolError(f"the weight {header.key[:80]!r} was handed over twice")
            self._inherited.add((header.key, header.state))
        try:
            await self._compute.call(lambda: self._program.load(header.key, tensor, header.state))
        except GraphError as error:
            raise ProtocolError(f"a weight from {peer[:12]}: {error}") from error
        self._loaded += 1
        self._arrived.set()

    async def ready(self, message: FinishLoading) -> None:
        """Return once all weights are here, and set the optimizer's step. Raises JobError when some are missing."""
        # Bulk and control are not ordered against each other: the last weights may still be on their way.
        try:
            async with asyncio.timeout(LOAD_TIMEOUT_S):
                while self._loaded < message.tensors:
                    self._arrived.clear()
                    await self._arrived.wait()
        except TimeoutError:
            raise JobError(
                f"only {self._loaded} of {message.tensors} weights and states came within {LOAD_TIMEOUT_S:.0f} s"
            ) from None
        missing = [str(key) for key in self._program.missing()]
        if self._sources is not None:
            # Each once, so their number would tell; but a state that lacks trains on silently, and wrong.
            missing += [
                str(key) if state is None else f"{key}::{state}"
                for key in self._weights
                for state in self._states(key)
                if (key, state) not in self._inherited
            ]
        if missing:
            raise JobError(f"{len(missing)} weights were not sent, such as {missing[0]!r}")
        await self._compute.call(lambda: self._program.set_optimizer_step(message.optimizer_step))

    # --- leaving ------------------------------------------------------------------------------------------------

    async def hand_over(self, message: HandOverWeights) -> dict[str, int]:
        """Send weights with their states to machines of the new plan; return the bytes by receiving peer."""
        unknown = message.targets.keys() - self._weights.keys()
        if unknown:
            raise ProtocolError(f"the weight {min(unknown)[:80]!r} is not held here")
        sent: dict[str, int] = defaultdict(int)
        async with self._pulling:
            for key, targets in message.targets.items():
                for state in self._states(key):
                    tensor = await self._read(key, state)
                    header = WeightTensor(message.job, message.to, key, state, tensor.dtype, tensor.shape)
                    for target in targets:
                        await self._wire.send(PeerId(target), header, tensor)
                        if target != self._wire.me:
                            sent[target] += tensor.nbytes
                            self._count_sent(target, tensor.nbytes)
                    del tensor
        return dict(sent)

    async def pull(self, roster: Roster, message: PullWeights) -> None:
        """Send the driver the tensors that it asks for."""
        async with self._pulling:  # one copy of one tensor at a time, however many requests there are
            for key, state in message.tensors:
                tensor = await self._read(key, state)
                header = PulledWeight(message.job, message.epoch, key, state, tensor.dtype, tensor.shape)
                await self._wire.send(PeerId(roster.driver), header, tensor)
                del tensor

    async def _read(self, key: WeightKey, state: str | None) -> TensorData:
        return await self._compute.call(lambda: self._program.read(key, state))

    def _states(self, key: WeightKey) -> tuple[str | None, ...]:
        """Return what a weight consists of: itself (None), and the optimizer's states of one that trains."""
        return (None, *(self._optimizer_states if self._weights[key].trainable else ()))
