"""The step ledger: what a machine has received and computed in one round, each microbatch exactly once. Pure.

A training step is a transaction over a fixed set of microbatches. The ledger of a machine names, for each of its
stages and each microbatch, the tensors that must arrive and the passes that must run. A delivery that
comes twice counts once; one that was never due is an error; the round is complete when every pass
has finished, and only then may the optimizer apply.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from fusionai.errors import ProtocolError
from fusionai.graph.evaluation import face
from fusionai.graph.model import SubDag, ValueName
from fusionai.tensor import TensorData
from fusionai.training.schedule import StageTurns, Turn


@dataclass(frozen=True, slots=True)
class Slot:
    """One tensor that is due: a value going forward, or a gradient coming back from stage `peer_stage`."""

    stage: int
    index: int
    value: ValueName
    gradient: bool
    peer_stage: int
    """Stage it comes from; -1 for a graph input that the driver feeds."""


@dataclass(frozen=True, slots=True)
class ReadyPass:
    """A pass that can run now, with the tensors it takes; gradients of the last stage first."""

    stage: int
    turn: Turn
    values: dict[ValueName, TensorData]
    gradients: dict[ValueName, tuple[TensorData, ...]]


@dataclass(frozen=True, slots=True)
class _Needs:
    """What one stage waits for before a pass of any microbatch."""

    forward: tuple[tuple[ValueName, int], ...]
    backward: tuple[tuple[ValueName, int], ...]


def _needs(subdag: SubDag) -> _Needs:
    fed = [(item.name, -1) for item in subdag.inputs if item.role != "positions"]
    received = [(item.value, item.source) for item in subdag.receives]
    # The last stage's gradient first: the order in which a single process adds them up.
    returned = sorted(((item.target, item.value) for item in subdag.sends if item.gradient), reverse=True)
    return _Needs(tuple(fed + received), tuple((value, target) for target, value in returned))


class RoundLedger:
    """Tensors due, tensors here, and passes done, of one machine in one round."""

    def __init__(self, subdags: Sequence[SubDag], microbatches: int, in_flight: dict[int, int], *, train: bool) -> None:
        self.microbatches = microbatches
        self.train = train
        self._needs = {subdag.index: _needs(face(subdag, train)) for subdag in subdags}
        if not train:
            self._needs = {stage: _Needs(needs.forward, ()) for stage, needs in self._needs.items()}
        self._turns = {stage: StageTurns(microbatches, in_flight.get(stage, 1), train=train) for stage in self._needs}
        self._running: set[int] = set()
        self._here: dict[Slot, TensorData] = {}
        self._seen: set[Slot] = set()
        self._charged: dict[Slot, int] = {}
        self._charged_bytes = 0
        # Without the microbatch: a driver may ask for many, and what is due of each is the same.
        self._due = {
            (stage, value, gradient, peer_stage)
            for stage, needs in self._needs.items()
            for gradient, pairs in ((False, needs.forward), (True, needs.backward))
            for value, peer_stage in pairs
        }

    def deliver(self, slot: Slot, tensor: TensorData, *, limit_bytes: int | None = None) -> bool:
        """Take a tensor in; False when it had come already.

        Raises ProtocolError when it is not due. Tensors with a limit count towards it while they wait for their pass;
        the one that would exceed it is refused.
        """
        due = (slot.stage, slot.value, slot.gradient, slot.peer_stage) in self._due
        if not due or not 0 <= slot.index < self.microbatches:
            what = "gradient of" if slot.gradient else "value"
            raise ProtocolError(
                f"stage {slot.stage} got {what} {slot.value!r} of microbatch {slot.index} from stage "
                f"{slot.peer_stage}, which is not due in this round of {self.microbatches} microbatches"
            )
        if slot in self._seen:
            return False
        if limit_bytes is not None:
            if self._charged_bytes + tensor.nbytes > limit_bytes:
                raise ProtocolError(
                    f"{self._charged_bytes:,} bytes wait for their turn here and {tensor.nbytes:,} more came; this "
                    f"machine offers {limit_bytes:,}"
                )
            self._charged[slot] = tensor.nbytes
            self._charged_bytes += tensor.nbytes
        self._seen.add(slot)
        self._here[slot] = tensor
        return True

    def take(self, within: Callable[[int], bool] = lambda stage: True) -> ReadyPass | None:
        """Return the most urgent pass whose tensors are all here, and count it as running; None if none is.

        Each stage offers the first of its open turns that can run. Of several stages one that offers a backward goes
        first, since its upstream waits on another machine; among equals the later one.
        """
        offered: dict[int, Turn] = {}
        for stage, turn in self._open_turns():
            if stage not in offered and stage not in self._running and within(stage) and self._has_all(stage, turn):
                offered[stage] = turn
        if not offered:
            return None
        stage, turn = max(offered.items(), key=lambda each: (each[1].direction == "backward", each[0]))
        self._running.add(stage)
        needs = self._needs[stage]
        if turn.direction == "forward":
            values = {
                value: self._pop(Slot(stage, turn.index, value, False, source)) for value, source in needs.forward
            }
            return ReadyPass(stage, turn, values, {})
        gradients: dict[ValueName, tuple[TensorData, ...]] = {}
        for value, target in needs.backward:
            tensor = self._pop(Slot(stage, turn.index, value, True, target))
            gradients[value] = (*gradients.get(value, ()), tensor)
        return ReadyPass(stage, turn, {}, gradients)

    def _pop(self, slot: Slot) -> TensorData:
        self._charged_bytes -= self._charged.pop(slot, 0)
        return self._here.pop(slot)

    def finish(self, task: ReadyPass) -> None:
        """Count a running pass as done."""
        self._running.remove(task.stage)
        self._turns[task.stage].done(task.turn)

    @property
    def complete(self) -> bool:
        """Whether every pass of every stage is done."""
        return all(turns.complete for turns in self._turns.values())

    def _open_turns(self) -> Iterable[tuple[int, Turn]]:
        return ((stage, turn) for stage, turns in self._turns.items() for turn in turns.open())

    def _has_all(self, stage: int, turn: Turn) -> bool:
        backward = turn.direction == "backward"
        pairs = self._needs[stage].backward if backward else self._needs[stage].forward
        return all(Slot(stage, turn.index, value, backward, source) in self._here for value, source in pairs)
