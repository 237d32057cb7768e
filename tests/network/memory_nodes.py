"""Endpoints for tests that are linked inside this process, without sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from network_nodes import Node, until

from fusionai.network.identity import Identity
from fusionai.network.lab import LabConfig
from fusionai.network.memory import MemoryNetwork


@asynccontextmanager
async def linked(lab: LabConfig | None = None) -> AsyncIterator[tuple[MemoryNetwork, Node, Node, Any]]:
    """A network of a and b, and a's link to b."""
    network = MemoryNetwork(lab)
    nodes = []
    for name in "ab":
        identity = Identity.ephemeral()
        nodes.append(await Node(name, identity, transport=network.transport(name, identity.peer_id)).listen())
    a, b = nodes
    link = await a.connect(b)
    await until(lambda: b.got.links)
    try:
        yield network, a, b, link
    finally:
        network.on_send = network.on_arrival = None
        await asyncio.gather(*(node.endpoint.close() for node in nodes))
