"""The torch plane."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

# The shape rules that check a peer's graph load torch._dynamo (0.1 GB) at their first use. It is loaded here, so that a
# compnode counts it when it measures its free memory, and no job waits for it.
import msgspec
import torch._dynamo

from fusionai.errors import GraphError
from fusionai.execution.calibration.measurement import measured
from fusionai.execution.own_thread import in_own_thread
from fusionai.execution.plane import Calibration, Clipping, Plane, ProgramOptions
from fusionai.execution.program import RoundProgram
from fusionai.execution.torch_plane import devices
from fusionai.execution.torch_plane.calibration import convolution_flops_per_s
from fusionai.execution.torch_plane.operators import torch_callable
from fusionai.execution.torch_plane.program import TorchProgram
from fusionai.graph.abilities import PlaneAbilities
from fusionai.graph.evaluation import faces
from fusionai.graph.model import SubDag
from fusionai.graph.vocabulary import VOCABULARY
from fusionai.tensor import DType

_DECODER_SHARE = 0.9
"""Share of a calibration's time for the reference decoders; the rest is for convolutions."""

_MPS_LACKS = frozenset({"float64"})
"""Dtypes that Apple's GPUs do not have."""


class TorchPlane(Plane):
    """Sub-DAGs on CPU, CUDA or MPS by torch."""

    name = "torch"

    def devices(self) -> tuple[str, ...]:
        return devices.device_names()

    def describe(self, device: str) -> str:
        return devices.device_description(device)

    def device_memory_bytes(self, device: str) -> int:
        return devices.memory_bytes(device)

    def abilities(self, device: str) -> PlaneAbilities:
        devices.torch_device(device)  # raises ConfigError when there is none of that name
        lacking = _MPS_LACKS if device == "mps" else frozenset[str]()
        return PlaneAbilities(
            plane=self.name,
            operators=tuple(name for name in sorted(VOCABULARY) if _resolves(name)),
            dtypes=tuple(name for name in get_args(DType) if name not in lacking),
            training=True,
            decoding=False,
        )

    def calibrate(self, device: str, *, seconds: float = 2.0) -> Calibration:
        return in_own_thread(lambda: self._calibrate(device, seconds))

    def _calibrate(self, device: str, seconds: float) -> Calibration:
        found = measured(self, device, seconds=_DECODER_SHARE * seconds)
        convolution = convolution_flops_per_s(device, (1 - _DECODER_SHARE) * seconds)
        return msgspec.structs.replace(found, flops_per_s={**found.flops_per_s, "convolution": convolution})

    def clipping(self, norms: Sequence[float], limit: float) -> Clipping:
        # As torch.nn.utils.clip_grad_norm_ does, in its order and precision.
        norm = torch.linalg.vector_norm(torch.tensor(norms, dtype=torch.float32))
        factor = torch.clamp(limit / (norm + 1e-6), max=1.0) if limit > 0 else torch.ones(())
        return Clipping(float(norm), float(factor))

    def set_threads(self, count: int) -> None:
        devices.set_threads(count)

    def load(self, subdags: Sequence[SubDag], options: ProgramOptions) -> RoundProgram:
        for subdag in subdags:
            for name in {node.op for part in faces(subdag) for node in part.nodes}:
                torch_callable(name)  # raises GraphError that names the operator
        return TorchProgram(subdags, options)


def _resolves(name: str) -> bool:
    """Return whether this version of torch has an operator of the vocabulary."""
    try:
        torch_callable(name)
    except GraphError:
        return False
    return True
