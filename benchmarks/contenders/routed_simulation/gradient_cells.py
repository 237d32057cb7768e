"""The ledger of a step: which machine has which microbatch at which stage, and whose gradients count.

A cell is one microbatch at one stage. Gradients are kept twice: as flags of cells, which the run decides by, and as
what each machine has added up, which is compared with the flags before a sum (`Ledger.check`).
"""

from __future__ import annotations

from collections import Counter
from enum import IntEnum

NOBODY = -2


class Tensor(IntEnum):
    """Where what a cell needs is."""

    MISSING = 0
    COMING = 1
    THERE = 2


class Redo(IntEnum):
    """Why a cell is computed although its gradient counts already: a neighbour needs its tensors again."""

    NO = 0
    FORWARD = 1
    BOTH = 2


class Cell:
    """One microbatch at one stage."""

    __slots__ = (
        "backward_done",
        "backwards",
        "begun",
        "epoch",
        "forward_done",
        "forwards",
        "generation",
        "gradient",
        "gradient_out",
        "input",
        "lost",
        "machine",
        "microbatch",
        "redo",
        "sender",
        "sent_s",
        "stage",
        "stranded",
    )

    def __init__(self, stage: int, microbatch: int) -> None:
        self.stage, self.microbatch = stage, microbatch
        self.epoch = self.forwards = self.backwards = 0
        self.reset()

    def reset(self) -> None:
        """Begin again, with nobody; whatever was on its way for it is void."""
        self.epoch += 1
        self.machine = self.sender = NOBODY
        self.generation = 0
        """Of the machine, when the cell was given to it: another one now has nothing of the cell."""
        self.sent_s = 0.0
        self.input = self.gradient = Tensor.MISSING
        self.begun = self.forward_done = self.backward_done = False
        self.gradient_out = False
        """Whether the gradient for the stage before has been computed."""
        self.lost = False
        """Its machine is gone, and nobody has done anything about it yet."""
        self.stranded = False
        """It waits for its stage to have a holder."""
        self.redo = Redo.NO


class Ledger:
    """All cells of a step."""

    def __init__(self, stages: int, microbatches: int) -> None:
        self.microbatches = microbatches
        self.cells = [[Cell(stage, each) for each in range(microbatches)] for stage in range(stages)]
        self.done = [0] * stages
        """By stage: cells whose gradient counts."""
        self.summed = [False] * stages
        """Whether every holder has the stage's whole gradient, so that deaths of some no longer matter."""
        self.waived: set[tuple[int, int]] = set()
        """Cells without whose gradient the step goes on (the baseline that forgets)."""
        self._added: dict[tuple[int, int], Counter[int]] = {}

    def count(self, cell: Cell) -> None:
        """Add a cell's gradient to what its machine has added up."""
        self._added.setdefault((cell.stage, cell.machine), Counter())[cell.microbatch] += 1
        self.done[cell.stage] += 1

    def uncount(self, cell: Cell) -> None:
        """Take a cell's gradient out again: its machine is gone, or the microbatch begins anew."""
        self._added[cell.stage, cell.machine][cell.microbatch] -= 1
        self.done[cell.stage] -= 1

    def forget(self, stage: int) -> None:
        """Lose all gradients of a stage, summed or not; what is waived stays so."""
        self.summed[stage] = False
        self.done[stage] = sum(1 for of_stage, _ in self.waived if of_stage == stage)
        for key in [key for key in self._added if key[0] == stage]:
            del self._added[key]

    def waive(self, cell: Cell) -> None:
        """Go on without a cell's gradient."""
        self.waived.add((cell.stage, cell.microbatch))
        self.done[cell.stage] += 1

    def complete(self, stage: int) -> bool:
        """Whether a stage's gradients are all there."""
        return self.done[stage] == self.microbatches

    def check(self, stage: int, living: set[int]) -> None:
        """Assert that living machines have added up every microbatch of a complete stage exactly once."""
        total: Counter[int] = Counter()
        for (of_stage, machine), added in self._added.items():
            if of_stage == stage:
                assert machine in living or not any(added.values()), f"stage {stage} counts on a machine that is gone"
                total.update(added)
        waived = {microbatch for of_stage, microbatch in self.waived if of_stage == stage}
        for microbatch in range(self.microbatches):
            assert total[microbatch] == (0 if microbatch in waived else 1), (
                f"microbatch {microbatch} counts {total[microbatch]} times at stage {stage}"
            )
