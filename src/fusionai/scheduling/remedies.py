"""What would help when no plan is possible. It depends on where the machines come from.

A machine that joins a broker is started in another way; one of a pool file is described in another way.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Remedies:
    """What to do about each thing that can be missing, as parts of sentences."""

    first_machine: str
    more_machines: str
    more_memory: str
    """What gives compnodes more memory."""
    dialable: str
    """So that two machines can be linked."""


JOINED = Remedies(
    first_machine="run `fusionai join TOKEN` on each machine that is to take part",
    more_machines="run `fusionai join TOKEN` on more machines",
    more_memory="raise their --memory",
    dialable="start `fusionai join` with --listen HOST:PORT, and --advertise behind a router",
)
"""For machines that joined a broker."""

DESCRIBED = Remedies(
    first_machine="add [[machines]] to the pool file",
    more_machines="add machines to the pool file",
    more_memory="raise their `memory` in the pool file",
    dialable="set `dialable = true` in the pool file for one of each two",
)
"""For machines of a pool file."""
