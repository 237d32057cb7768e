"""The share of each microbatch in a step's loss.

The shares make the loss of a step that of its whole batch, however the batch is cut into microbatches. What a
microbatch counts for follows from the graph (`fusionai.graph.loss_shares`), and where data decides, such as the number
of labels that count, from the step's inputs. They are counted on the owner's machine, by its execution plane.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from fusionai.errors import DataError
from fusionai.execution.plane import Plane, ProgramOptions
from fusionai.execution.program import MicrobatchKey, RoundProgram
from fusionai.graph.loss_shares import Counted, Equal, LossShare, Shares, Sum, loss_shares
from fusionai.graph.model import OpDag, Sizes, SubDag, ValueName
from fusionai.scheduling.plan import Plan
from fusionai.tensor import DType, TensorData
from fusionai.training.data.batches import Batch
from fusionai.training.machine import sizes_of
from fusionai.training.weight_orders import WeightSource

Array = npt.NDArray[np.float64]

_TOLERANCE = 1e-3
"""Shares that must add up to 1 may miss it by this: by rounding, or by a small number in the denominator of a mean. A
larger tolerance lets a penalty on weights count for more or less than it should."""


class LossWeights:
    """Weighs the microbatches of steps and evaluations."""

    def __init__(self, graph: OpDag, choice: LossShare, plane: Plane, weights: WeightSource) -> None:
        """Find out from the graph how to weigh, and prepare the counting. Blocks for milliseconds.

        Args:
            graph: the job's.
            choice: `training.loss_share` of the job file.
            plane: the owner's; it counts, on the CPU.
            weights: source of the constants that counting needs, such as class weights.

        Raises ConfigError as `loss_shares`.
        """
        self._graph = graph
        self._shares = loss_shares(graph, choice)
        self._choice = choice
        self._counting = threading.Lock()
        """A program takes one call at a time, and a step is prepared while another one is evaluated."""
        self._program = None if not isinstance(self._shares, Counted) else _program(self._shares, plane, weights)

    @property
    def remark(self) -> str:
        """What people should know about the shares of microbatches; "" where nothing but the usual."""
        return _remark(self._shares, self._choice)

    def noted_in(self, plan: Plan) -> Plan:
        """Return a plan whose explanation has the remark, if there is one."""
        found = self.remark
        return msgspec.structs.replace(plan, explanation=(*plan.explanation, found)) if found else plan

    def weigh(self, batch: Sequence[Batch], what: str) -> tuple[float, ...]:
        """Return the shares of microbatches. The loss of a microbatch with share 0 must not be looked at.

        Blocks; any thread may call it.

        Args:
            batch: all microbatches of a step, of one shape.
            what: names them in errors, such as "step 5".

        Raises DataError when nothing counts in the whole batch, or an input is missing or of another shape.
        """
        if isinstance(self._shares, Sum):
            return (1.0,) * len(batch)
        if isinstance(self._shares, Equal):
            return (1.0 / len(batch),) * len(batch)
        assert self._program is not None
        with self._counting:
            return _Weighing(self._graph, self._shares, self._program, batch, what).weights()


class _Weighing:
    """The counting of one batch."""

    def __init__(self, graph: OpDag, shares: Counted, program: RoundProgram, batch: Sequence[Batch], what: str) -> None:
        self._shares = shares
        self._program = program
        self._count = len(batch)
        self._what = what
        sizes = sizes_of(graph, batch[0])
        if any(sizes_of(graph, microbatch) != sizes for microbatch in batch[1:]):
            raise DataError(f"the microbatches of {what} must all have one shape")
        self._parts = [self._counted(microbatch, sizes, index) for index, microbatch in enumerate(batch)]
        self._whole = self._merged(sizes)

    def weights(self) -> tuple[float, ...]:
        found = self._weights(self._shares.sizes, self._shares.divisors)
        for sizes, divisors in self._shares.needs:
            if abs(sum(self._weights(sizes, divisors)) - 1) > _TOLERANCE:
                # Where a denominator has a least value, microbatches without anything that counts have a share too.
                found = tuple(weight if self._counts(index) else 0.0 for index, weight in enumerate(found))
                some = [w for index, w in enumerate(self._weights(sizes, divisors)) if self._counts(index)]
                if abs(sum(some) - 1) > _TOLERANCE:
                    raise DataError(
                        f"the loss of {self._what} adds a term that is the same in all microbatches to a mean whose "
                        f'shares add up to {sum(some):.4f}, not to 1; set training.loss_share = "labels" or "equal"'
                    )
        return found

    def _weights(self, sizes: int, divisors: Sequence[ValueName]) -> tuple[float, ...]:
        factor = float(self._count) ** -sizes
        return tuple(
            factor * math.prod(float(part[name].item()) / self._divisor(name) for name in divisors)
            for part in self._parts
        )

    def _divisor(self, name: ValueName) -> float:
        value = float(self._whole[name].item())
        if not math.isfinite(value) or value == 0:
            what = "nothing counts in the loss" if value == 0 else "it cannot be told what counts in the loss"
            raise DataError(
                f"{what} of {self._what}: what the loss divides by is {value:g} over all {self._count} microbatches; "
                "leave such batches out, or make steps of more microbatches"
            )
        return value

    def _counts(self, index: int) -> bool:
        return any(self._parts[index][leaf.value].any() for leaf in self._shares.leaves)

    def _counted(self, microbatch: Batch, sizes: Sizes, index: int) -> dict[ValueName, Array]:
        given = {item.name: microbatch[item.name] for item in self._shares.counting.inputs if item.role != "positions"}
        return self._run(self._shares.counting, sizes, given, index)

    def _merged(self, sizes: Sizes) -> dict[ValueName, Array]:
        """Return leaves and divisors of the whole batch."""
        found = {}
        for leaf in self._shares.leaves:
            total = np.sum([part[leaf.value] for part in self._parts], axis=0)
            found[leaf.value] = total / self._count if leaf.mean else total
        merging = self._shares.merging
        if merging is not None:
            whole = {name: size * self._count if name in self._shares.batch else size for name, size in sizes.items()}
            given = {each.value: _data(found[each.value], each.type.dtype) for each in merging.receives}
            found |= self._run(merging, whole, given, self._count)
        return found

    def _run(
        self, subdag: SubDag, sizes: Sizes, values: Mapping[ValueName, TensorData], index: int
    ) -> dict[ValueName, Array]:
        outputs = self._program.forward(subdag.index, MicrobatchKey(0, index), sizes, values, train=False)
        return {name: _array(tensor) for name, tensor in outputs.items()}


def _program(shares: Counted, plane: Plane, weights: WeightSource) -> RoundProgram:
    subdags = [shares.counting] + ([shares.merging] if shares.merging is not None else [])
    program = plane.load(subdags, ProgramOptions(device="cpu"))
    for key in program.keys():  # noqa: SIM118 (a method of programs)
        program.load(key, weights.read(key))
    return program


def _remark(shares: Shares, choice: LossShare) -> str:
    if choice == "equal":
        return 'each microbatch counts alike, as training.loss_share = "equal" says'
    if choice == "labels":
        return 'microbatches count by their labels, as training.loss_share = "labels" says'
    if isinstance(shares, Sum):
        return "the losses of a step's microbatches are added up, because the loss is a sum over samples"
    if isinstance(shares, Equal) and shares.reason:
        return (
            "each microbatch counts alike, and it cannot be told whether it should, because the loss "
            f'{shares.reason}; training.loss_share = "labels" lets microbatches count by their labels'
        )
    return ""


def _array(tensor: TensorData) -> Array:
    """Return a tensor as float64. No leaf or divisor is bfloat16, which numpy does not know."""
    kind = np.dtype(tensor.dtype).newbyteorder("<")
    return np.frombuffer(tensor.data, dtype=kind).reshape(tensor.shape).astype(np.float64)


def _data(array: Array, dtype: DType) -> TensorData:
    little = array.astype(np.dtype(dtype).newbyteorder("<"))
    return TensorData(dtype, little.shape, little.tobytes())
