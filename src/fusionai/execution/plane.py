"""The plane interface: how any framework runs its share of an OP-DAG.

A `Plane` turns sub-DAGs into a `Program`. All sub-DAGs that one compnode holds for one job make one program,
so tensors they share (tied weights) exist once. Only `TensorData` crosses this border: callers never see a
framework's tensors, devices or autograd. Every method blocks; a compnode calls a program from its compute
thread only, one call at a time.

A microbatch goes `forward` once and then either `backward` once or `discard`. In between, the program keeps
what backward needs, and nothing else refers to it. Gradients add up over microbatches until `update`.

A plane that decodes keeps its KV cache behind `fusion.attention`, inside the program; callers will then open
sessions on the same program, and nothing here changes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import msgspec

from fusionai.errors import ConfigError
from fusionai.graph.model import Sizes, SubDag, ValueName, WeightKey
from fusionai.tensor import TensorData


class OptimizerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An optimizer and its constants; the learning rate comes with each update."""

    kind: Literal["adamw", "sgd"] = "adamw"
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    """AdamW: decoupled decay; SGD: L2 term added to the gradient."""
    momentum: float = 0.0

    def __post_init__(self) -> None:
        for field in ("beta1", "beta2", "momentum"):
            if not 0 <= getattr(self, field) < 1:
                raise ConfigError(f"optimizer.{field} must be in [0, 1), got {getattr(self, field)}")
        # Written so that a NaN, which compares false with everything, is refused too.
        if not 0 < self.epsilon < float("inf"):
            raise ConfigError(f"optimizer.epsilon must be > 0, got {self.epsilon}")
        if not 0 <= self.weight_decay < float("inf"):
            raise ConfigError(f"optimizer.weight_decay must be >= 0, got {self.weight_decay}")

    @property
    def states(self) -> tuple[str, ...]:
        """Names of the per-weight state tensors that this optimizer keeps, each shaped like the weight."""
        if self.kind == "adamw":
            return ("exp_avg", "exp_avg_sq")
        return ("momentum_buffer",) if self.momentum else ()


class ProgramOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a program runs."""

    device: str = "cpu"
    """One of `Plane.devices()`."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """`bf16`: autocast; weights, gradients and optimizer state stay in fp32."""
    compile: bool = False
    optimizer: OptimizerConfig = OptimizerConfig()
    seed: int = 0
    """Random operators (dropout) draw from (seed, step, microbatch, stage) only, so a replay repeats them."""


class MicrobatchKey(msgspec.Struct, frozen=True):
    """Which microbatch of which step."""

    step: int
    index: int


class Calibration(msgspec.Struct, frozen=True):
    """What a device was measured to achieve."""

    flops_per_s: dict[str, float]
    """Achieved FLOP/s by op class of `fusionai.graph.vocabulary` ("matmul", "attention", "convolution")."""
    memory_bytes_per_s: float
    """Achieved bandwidth of elementwise operators, bytes read plus written."""
    overhead_s: float
    """Seconds that one small operator takes, the dispatch included."""
    update_bytes_per_s: float = 0.0
    """Achieved bandwidth of the optimizer's update, counted as the estimator counts it; 0: not measured."""


class Clipping(msgspec.Struct, frozen=True):
    """How a step's gradients are to be clipped."""

    norm: float
    """Of all gradients together."""
    factor: float
    """What each is multiplied by; 1 leaves them as they are."""


class Program(ABC):
    """The sub-DAGs of one compnode for one job, loaded on a device.

    `stage` is a `SubDag.index`. `key` is a `WeightKey`; optimizer state of a weight is addressed by
    (key, state name) with the names of `OptimizerConfig.states`.
    """

    @abstractmethod
    def load(self, key: WeightKey, tensor: TensorData, state: str | None = None) -> None:
        """Set a weight, or with `state` its optimizer state.

        Raises GraphError when the key is not held here, or the dtype or shape is not the declared one.
        """

    @abstractmethod
    def missing(self) -> tuple[WeightKey, ...]:
        """Keys of weights not loaded yet; a program runs once there are none."""

    @abstractmethod
    def keys(self) -> tuple[WeightKey, ...]:
        """Keys of every weight held, parameters and buffers, constants included."""

    @abstractmethod
    def read(self, key: WeightKey, state: str | None = None) -> TensorData:
        """Return a copy of a weight, or with `state` of its optimizer state (zeros before any update)."""

    @abstractmethod
    def optimizer_step(self) -> int:
        """Updates applied so far (AdamW's bias correction depends on it)."""

    @abstractmethod
    def set_optimizer_step(self, step: int) -> None:
        """Continue as if `step` updates had been applied; with loaded state, for resuming."""

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
        scalar loss (float32, shape ()) in the stage that computes it. With `train` false nothing is kept for
        backward, and dropout and batch statistics are in inference mode.
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
        stage that it went to, summed here in the order given. The loss stage starts from `loss_weight`, the weight of
        this microbatch in the step's loss. Returns d(step loss)/d(value) for each received value with
        `Transfer.gradient`.
        """

    def finish_backward(self) -> None:
        """Compute what the last `backward` left for later, so that its boundary gradients could be sent first.

        A plane may leave gradients of weights; then this does them, and so does any later call that needs them.
        Nothing by default.
        """
        return None

    @abstractmethod
    def discard(self, microbatch: MicrobatchKey | None = None) -> None:
        """Forget what is kept for a microbatch in every stage; with None, all of them and the gradients."""

    @abstractmethod
    def gradient_norms(self, skip: Sequence[WeightKey] = ()) -> dict[WeightKey, float]:
        """Norm of each weight's accumulated gradient, those in `skip` and weights without one left out."""

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

    @abstractmethod
    def memory_bytes(self) -> int:
        """Bytes of weights, gradients, optimizer state and kept activations held now."""

    @abstractmethod
    def close(self) -> None:
        """Free the device's memory; the program is unusable afterwards."""


class Plane(ABC):
    """A framework that can run sub-DAGs."""

    name: str

    @abstractmethod
    def devices(self) -> tuple[str, ...]:
        """Devices usable here, best first ("cuda:0", "mps", "cpu")."""

    @abstractmethod
    def describe(self, device: str) -> str:
        """Name of a device for people ("NVIDIA GeForce RTX 3080")."""

    @abstractmethod
    def device_memory_bytes(self, device: str) -> int:
        """Total memory of a device."""

    @abstractmethod
    def unsupported(self, subdag: SubDag) -> Iterator[str]:
        """Yield the operators of a sub-DAG that this plane cannot run."""

    @abstractmethod
    def calibrate(self, device: str, *, seconds: float = 2.0) -> Calibration:
        """Measure what a device achieves, in about `seconds`."""

    def clipping(self, norms: Sequence[float], limit: float) -> Clipping:
        """Return the norm of gradients whose norms are given, and the factor that brings it to `limit`, 0 for none.

        `norms` are in the order of the model's weights. A plane rounds as its framework's own clipping does, so that a
        clipped step equals that of a single process bit for bit.
        """
        norm = math.sqrt(total) if (total := sum(each * each for each in norms)) >= 0 else math.nan
        return Clipping(norm, limit / norm if 0 < limit < norm else 1.0)

    @abstractmethod
    def set_threads(self, count: int) -> None:
        """Limit the CPU threads that this process's programs use."""

    @abstractmethod
    def load(self, subdags: Sequence[SubDag], options: ProgramOptions) -> Program:
        """Make a program of sub-DAGs of one job; weights come afterwards through `Program.load`.

        Raises GraphError for an operator it does not support, ConfigError for an unknown device.
        """
