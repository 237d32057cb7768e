"""The plane interface: how any framework runs its share of an OP-DAG.

A `Plane` says which devices it has, what it can run on them, and how fast they are. It loads sub-DAGs into a program:
`load` gives a `RoundProgram`, which trains, and `load_sessions` a `SessionProgram`, which generates tokens.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import msgspec

from fusionai.errors import ConfigError
from fusionai.execution.program import RoundProgram
from fusionai.execution.sessions import SessionLimits, SessionProgram
from fusionai.graph.abilities import PlaneAbilities
from fusionai.graph.model import SubDag


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
    """Random operators (dropout) draw from (seed, step, microbatch, stage) only, so a replay draws the same numbers."""


class Calibration(msgspec.Struct, frozen=True):
    """Measured speeds of a device."""

    flops_per_s: dict[str, float]
    """Achieved FLOP/s by op class of `fusionai.graph.vocabulary` ("matmul", "attention", "convolution")."""
    memory_bytes_per_s: float
    """Achieved bandwidth of elementwise operators, bytes read plus written."""
    overhead_s: float
    """Seconds that one small operator takes, including its dispatch."""
    update_bytes_per_s: float = 0.0
    """Achieved bandwidth of the optimizer's update, counted as the estimator counts it; 0: not measured."""


class Clipping(msgspec.Struct, frozen=True):
    """The norm of a step's gradients, and the factor that clips them."""

    norm: float
    """Norm of all gradients of the step together."""
    factor: float
    """Every gradient is multiplied by it; 1 leaves them as they are."""


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
    def abilities(self, device: str) -> PlaneAbilities:
        """Return what the plane can run on a device. Raises ConfigError for an unknown device."""

    @abstractmethod
    def calibrate(self, device: str, *, seconds: float = 2.0) -> Calibration:
        """Measure the speeds of a device, in about `seconds`."""

    def clipping(self, norms: Sequence[float], limit: float) -> Clipping:
        """Return the norm of all gradients together, and the factor that brings it down to `limit` (0: no limit).

        `norms` are the norms of the single gradients, in the order of the model's weights. A plane rounds as its
        framework's own clipping does, so that a clipped step equals a single process's step bit for bit.
        """
        norm = math.sqrt(total) if (total := sum(each * each for each in norms)) >= 0 else math.nan
        return Clipping(norm, limit / norm if 0 < limit < norm else 1.0)

    @abstractmethod
    def set_threads(self, count: int) -> None:
        """Limit the CPU threads that this process's programs use."""

    @abstractmethod
    def load(self, subdags: Sequence[SubDag], options: ProgramOptions) -> RoundProgram:
        """Make a program that trains sub-DAGs of one job; weights come afterwards through `Program.load`.

        Raises GraphError for an operator that the plane does not have. Raises ConfigError for an unknown device, and
        always where `PlaneAbilities.training` is false.
        """

    def load_sessions(
        self, subdags: Sequence[SubDag], options: ProgramOptions, limits: SessionLimits
    ) -> SessionProgram:
        """Make a program that decodes sub-DAGs of one job; weights come afterwards through `Program.load`.

        The program may be a `RoundProgram` as well, where the plane does both kinds of work on one set of weights.
        A plane that decodes overrides this method and sets `PlaneAbilities.decoding`.

        Raises GraphError and ConfigError as `load` does, and always ConfigError where the plane does not decode.
        """
        raise ConfigError(f"execution plane {self.name!r} does not decode: it keeps no KV cache; it can only train")
