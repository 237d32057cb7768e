"""The gradients of tied weights, exchanged among all machines that hold a copy, so that the copies stay equal."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from fusionai.errors import ProtocolError
from fusionai.execution.program import RoundProgram
from fusionai.graph.model import WeightKey
from fusionai.network.identity import PeerId
from fusionai.pool.job_wire import JobWire
from fusionai.tensor import TensorData
from fusionai.training.compute import Compute
from fusionai.training.messages import TiedGradient
from fusionai.training.roster import Roster
from fusionai.training.share import Share


class GradientExchange:
    """This machine's side of the exchange: what has come of the round in progress, and the sums."""

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
        self._here: dict[tuple[WeightKey, str], TensorData] = {}
        self._types = {key: weight.type for key, weight in share.weights().items() if weight.trainable}
        self._arrived = asyncio.Event()

    def __len__(self) -> int:
        """How many gradients of other holders are kept."""
        return len(self._here)

    def check(self, roster: Roster, peer: PeerId, header: TiedGradient, tensor: TensorData) -> None:
        """Raise ProtocolError unless a gradient is of a tied weight that the peer holds too, in its dtype and shape."""
        if not roster.sums_with(peer, header.key) or header.key not in self._types:
            raise ProtocolError(f"{peer[:12]} holds no tied weight {header.key[:80]!r}")
        declared = self._types[header.key]
        if (tensor.dtype, tensor.shape) != (declared.dtype, declared.shape):
            raise ProtocolError(
                f"the gradient of {header.key!r} came as {tensor.dtype}{list(tensor.shape)}, but the weight is "
                f"{declared.dtype}{list(declared.shape)}"
            )

    def keep(self, peer: PeerId, header: TiedGradient, tensor: TensorData) -> None:
        """Take in a checked gradient of the round in progress; a repetition changes nothing."""
        self._here.setdefault((header.key, peer), tensor)
        self._arrived.set()

    def clear(self) -> None:
        """Forget what has come: a round begins, or this part ends."""
        self._here.clear()

    async def sum(self, roster: Roster, number: int) -> None:
        """Replace the gradient of each tied weight by the sum over its holders, last stage first as in one process.

        `number` is the round's.
        """
        me = self._wire.me
        tied = roster.sums
        mine: dict[WeightKey, TensorData] = {}
        for key, holders in tied.items():
            gradient = await self._compute.call(lambda key=key: self._program.read_gradient(key))  # type: ignore[misc]
            mine[key] = gradient
            header = TiedGradient(roster.job, roster.epoch, number, key, gradient.dtype, gradient.shape)
            for holder in holders:
                if holder != me:
                    self._count_sent(holder, gradient.nbytes)
                    await self._wire.send(PeerId(holder), header, gradient)
        for key, holders in tied.items():
            due = [(key, holder) for holder in holders if holder != me]
            while not all(slot in self._here for slot in due):
                self._arrived.clear()
                await self._arrived.wait()
            parts = [mine[key] if holder == me else self._here[key, holder] for holder in reversed(holders)]
            await self._compute.call(lambda key=key, parts=parts: self._program.set_gradient(key, parts))  # type: ignore[misc]
        self._here.clear()
