"""What an execution plane can run on one device, as plain data that a planner can read.

The value lies beside the OP-DAG, not beside the planes: the planner and the broker read it, and they import no plane.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from fusionai.errors import PlacementError
from fusionai.graph.evaluation import faces
from fusionai.graph.model import SubDag
from fusionai.tensor import DType

ProgramUse = Literal["training", "decoding"]
"""`training`: rounds of forward, backward and update. `decoding`: sessions that generate tokens."""

_NAMED = 5
"""Operators that an error lists; more of them would bury the first."""


class PlaneAbilities(msgspec.Struct, frozen=True, kw_only=True):
    """What one plane can run on one device.

    It lists the operators that the plane has, because an old installation does not know the names of operators that
    were added later.
    """

    plane: str
    operators: tuple[str, ...]
    """Names from the vocabulary, sorted."""
    dtypes: tuple[DType, ...]
    """Element types that its values may have."""
    training: bool
    """Whether its programs run rounds."""
    decoding: bool
    """Whether its programs run sessions, with a KV cache behind `fusion.attention`."""

    def lacking(self, subdag: SubDag) -> tuple[str, ...]:
        """Return the operators of a sub-DAG that the plane does not have, sorted."""
        needed = {node.op for part in faces(subdag) for node in part.nodes}
        return tuple(sorted(needed.difference(self.operators)))

    def obstacle(self, subdag: SubDag, work: ProgramUse) -> str | None:
        """Return why the plane cannot do this work on a sub-DAG, or None when it can."""
        if work == "training" and not self.training:
            return f"its plane {self.plane!r} does not train"
        if work == "decoding" and not self.decoding:
            return f"its plane {self.plane!r} does not decode"
        if operators := self.lacking(subdag):
            return f"its plane {self.plane!r} lacks the operators {_listed(operators)}"
        types = [type for part in faces(subdag) for type in part.types.values()]
        types += [given.type for part in faces(subdag) for given in part.inputs]
        types += [weight.type for weight in subdag.weights]
        if dtypes := sorted({type.dtype for type in types}.difference(self.dtypes)):
            return f"its plane {self.plane!r} does not compute in {', '.join(dtypes)}"
        return None


def check_can_run(machine: str, abilities: PlaneAbilities, subdags: Sequence[SubDag], work: ProgramUse) -> None:
    """Refuse to give a machine stages that its plane cannot run.

    Args:
        machine: its name, for the error.
        abilities: the abilities that the machine declared.
        subdags: the stages that the machine shall hold.
        work: the work that it shall do with them.

    Raises:
        PlacementError: it cannot run one of them; the text names the machine, the stage and what is missing.
    """
    for subdag in subdags:
        obstacle = abilities.obstacle(subdag, work)
        if obstacle is not None:
            raise PlacementError(
                f"machine {machine!r} cannot run stage {subdag.index}: {obstacle}; "
                "give the stage to a machine with another plane"
            )


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
