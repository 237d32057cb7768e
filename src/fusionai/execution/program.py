"""Loaded sub-DAGs: what every program can do, and the face that trains.

A program is the sub-DAGs of one compnode for one job, loaded on a device, so a tensor that two of them share exists
once. It can have two faces:

* `RoundProgram` runs rounds: a microbatch goes forward and backward, and an update ends the step. Training uses it.
* `SessionProgram` (`fusionai.execution.sessions`) runs sessions: a sequence is opened, decoded and closed.

A plane's program implements the faces that the plane can offer. Both share the weights, and neither needs the other.

Only `TensorData` crosses this border: callers never see a framework's tensors, devices or autograd. Every method
blocks. A compnode calls a program from its compute thread only, one call at a time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import msgspec

from fusionai.graph.model import Sizes, ValueName, WeightKey
from fusionai.tensor import TensorData


class MicrobatchKey(msgspec.Struct, frozen=True):
    """Which microbatch of which step."""

    step: int
    index: int


class Program(ABC):
    """The weights and the memory of loaded sub-DAGs. A `stage` is a `SubDag.index`, a `key` a `WeightKey`."""

    @abstractmethod
    def load(self, key: WeightKey, tensor: TensorData, state: str | None = None) -> None:
        """Set a weight, or with `state` its optimizer state (a name from `OptimizerConfig.states`).

        Raises GraphError when the program does not hold the key, or when the dtype or shape is not the declared one.
        """

    @abstractmethod
    def missing(self) -> tuple[WeightKey, ...]:
        """Return the keys of weights not loaded yet. A program runs once there are none."""

    @abstractmethod
    def keys(self) -> tuple[WeightKey, ...]:
        """Return the keys of all weights that the program holds: parameters, buffers and constants."""

    @abstractmethod
    def read(self, key: WeightKey, state: str | None = None) -> TensorData:
        """Return a copy of a weight, or with `state` of its optimizer state (zeros before any update)."""

    @abstractmethod
    def memory_bytes(self) -> int:
        """Return the bytes of all tensors held now: weights, and what rounds and sessions keep."""

    @abstractmethod
    def close(self) -> None:
        """Free the device's memory. The program is unusable afterwards."""


class RoundProgram(Program):
    """Runs rounds: forward and backward passes of microbatches, then one update.

    A microbatch goes `forward` once and then either `backward` once or `discard`. In between, the program keeps what
    backward needs. Gradients add up over microbatches until `update`.
    """

    @abstractmethod
    def optimizer_step(self) -> int:
        """Return the number of updates applied so far (AdamW's bias correction depends on it)."""

    @abstractmethod
    def set_optimizer_step(self, step: int) -> None:
        """Continue as if `step` updates had been applied. Together with loaded state, this resumes a job."""

    @abstractmethod
    def forward(
        self,
        stage: int,
        microbatch: MicrobatchKey,
        sizes: Sizes,
        values: Mapping[ValueName, TensorData],
        *,
        train: bool = True,
    ) -> dict[ValueName, TensorData]:
        """Run a stage forward on its graph inputs and received tensors, both in `values`.

        Returns one tensor for each value the stage sends (once, even if sent to several stages), and the
        scalar loss (float32, shape ()) in the stage that computes it. With `train` false nothing is kept for backward,
        and the stage's evaluation face (`graph.evaluation.face`) is run: where that is the sub-DAG itself, dropout and
        batch statistics are in inference mode.

        Raises GraphError for a value that is missing, unknown, or of another dtype or shape. Raises JobError while
        weights are missing, and for a microbatch that has gone forward already.
        """

    @abstractmethod
    def backward(
        self,
        stage: int,
        microbatch: MicrobatchKey,
        gradients: Mapping[ValueName, Sequence[TensorData]],
        loss_weight: float = 1.0,
    ) -> dict[ValueName, TensorData]:
        """Run a stage backward; add to the gradients of its weights.

        `gradients` holds d(step loss)/d(value) for each sent value with `Transfer.gradient`: one tensor from each
        stage that received the value. They are summed here in the order given. The loss stage starts from
        `loss_weight`, the weight of this microbatch in the step's loss. Returns d(step loss)/d(value) for each
        received value with `Transfer.gradient`.

        Raises GraphError for gradients that do not fit, JobError for a microbatch that did not go forward.
        """

    def finish_backward(self) -> None:
        """Compute the gradients of weights that the last `backward` left for later.

        A plane may leave them so that boundary gradients can be sent first. Every later call that needs them computes
        them too. By default there are none.
        """
        return None

    @abstractmethod
    def discard(self, microbatch: MicrobatchKey | None = None) -> None:
        """Drop what every stage keeps for a microbatch. With None: for all microbatches, and the gradients too."""

    @abstractmethod
    def gradient_norms(self, skip: Sequence[WeightKey] = ()) -> dict[WeightKey, float]:
        """Return the norm of each weight's accumulated gradient, without `skip` and weights that have none."""

    @abstractmethod
    def read_gradient(self, key: WeightKey) -> TensorData:
        """Return a copy of a weight's accumulated gradient (zeros when it has none)."""

    @abstractmethod
    def set_gradient(self, key: WeightKey, gradients: Sequence[TensorData]) -> None:
        """Replace a weight's accumulated gradient by the sum of `gradients`, taken in the order given.

        For tied weights: every holder sums the same tensors in the same order, so the copies stay equal.
        """

    @abstractmethod
    def update(self, learning_rate: float, gradient_scale: float = 1.0) -> None:
        """Apply the optimizer to gradients times `gradient_scale`, then clear the gradients."""
