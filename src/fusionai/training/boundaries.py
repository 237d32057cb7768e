"""Boundary tensors on their way: checked when they come, queued when they go."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from fusionai.errors import JobError, PeerLost, ProtocolError
from fusionai.graph.model import Sizes, SubDag
from fusionai.graph.sizes import concrete
from fusionai.network.identity import PeerId
from fusionai.pool.job_wire import JobWire
from fusionai.tensor import FLOATING, TensorData
from fusionai.training.messages import Boundary
from fusionai.training.roster import DRIVER, Roster

log = logging.getLogger(__name__)


class Outgoing:
    """Tensors that wait to be sent, in order for each peer; what waits is bounded by the microbatches in flight."""

    def __init__(self, wire: JobWire, limit_bytes: int, start: Callable[[Coroutine[Any, Any, None]], None]) -> None:
        """`start` runs a coroutine in the background, and ends the job's part here when it fails."""
        self._wire = wire
        self.limit_bytes = limit_bytes
        self._start = start
        self._queues: dict[PeerId, asyncio.Queue[tuple[Boundary, TensorData]]] = {}
        self._waiting_bytes = 0

    def post(self, peer: PeerId, header: Boundary, tensor: TensorData) -> None:
        """Queue a tensor for another machine."""
        if peer not in self._queues:
            self._queues[peer] = asyncio.Queue()
            self._start(self._send_all(peer, self._queues[peer]))
        self._queues[peer].put_nowait((header, tensor))
        self._waiting_bytes += tensor.nbytes
        if self._waiting_bytes > self.limit_bytes:
            # Training is bounded by what is in flight; an evaluation only by those who take its tensors.
            self._start(self._refuse(self._waiting_bytes))

    async def _refuse(self, waiting_bytes: int) -> None:
        raise JobError(f"{waiting_bytes:,} bytes wait to be sent, and the next compnode takes them too slowly")

    async def _send_all(self, peer: PeerId, queue: asyncio.Queue[tuple[Boundary, TensorData]]) -> None:
        while True:
            header, tensor = await queue.get()
            try:
                await self._wire.send(peer, header, tensor)
                self._waiting_bytes -= tensor.nbytes
            except PeerLost:
                # The driver hears of the lost machine from the broker and from its own link, and names it.
                log.info("job %s: %s is gone; a tensor for it is dropped", header.job, peer[:12])
                return


def check_source(roster: Roster, peer: PeerId, header: Boundary) -> None:
    """Refuse a tensor that does not come from the machine that has its stage. Raises ProtocolError."""
    expected = roster.sender(header.source)
    if expected is None:
        raise ProtocolError(f"stage {header.source} does not exist; the job has {roster.stages}")
    if peer != expected:
        raise ProtocolError(f"a tensor of stage {header.source} came from {peer[:12]}, which has other stages")


def check_type(subdag: SubDag, header: Boundary, tensor: TensorData, sizes: Sizes) -> None:
    """Refuse a tensor whose shape or kind is not the declared one."""
    if header.source == DRIVER:
        declared = next((item.type for item in subdag.inputs if item.name == header.value), None)
    else:
        transfers = subdag.sends if header.gradient else subdag.receives
        declared = next((item.type for item in transfers if item.value == header.value), None)
    if declared is None:
        return  # the ledger names it: it is not due
    shape = concrete(declared, sizes)
    # Under autocast an activation may travel in another floating dtype than the graph declares.
    same_kind = tensor.dtype == declared.dtype or (tensor.dtype in FLOATING and declared.dtype in FLOATING)
    if tensor.shape != shape or not same_kind:
        raise ProtocolError(
            f"{header.value!r} came as {tensor.dtype}{list(tensor.shape)}, "
            f"but the OP-DAG says {declared.dtype}{list(shape)}"
        )
