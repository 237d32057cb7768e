"""The torch plane."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

# The shape rules that check a stranger's graph load this, 0.1 GB, at their first use. Loaded here, it is there before a
# compnode measures how much memory is free, and no job waits for it.
import msgspec
import torch._dynamo

from fusionai.errors import GraphError
from fusionai.execution.calibration.measurement import measured
from fusionai.execution.own_thread import in_own_thread
from fusionai.execution.plane import Calibration, Clipping, Plane, Program, ProgramOptions
from fusionai.execution.torch_plane import devices
from fusionai.execution.torch_plane.calibration import convolution_flops_per_s
from fusionai.execution.torch_plane.operators import torch_callable
from fusionai.execution.torch_plane.program import TorchProgram
from fusionai.graph.model import SubDag

_DECODER_SHARE = 0.9
"""Of a calibration's time; the rest is for convolutions."""


class TorchPlane(Plane):
    """Sub-DAGs on CPU, CUDA or MPS by torch."""

    name = "torch"

    def devices(self) -> tuple[str, ...]:
        return devices.device_names()

    def describe(self, device: str) -> str:
        return devices.device_description(device)

    def device_memory_bytes(self, device: str) -> int:
        return devices.memory_bytes(device)

    def unsupported(self, subdag: SubDag) -> Iterator[str]:
        for name in sorted({node.op for node in subdag.nodes}):
            try:
                torch_callable(name)
            except GraphError:
                yield name

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

    def load(self, subdags: Sequence[SubDag], options: ProgramOptions) -> Program:
        for subdag in subdags:
            for name in {node.op for node in subdag.nodes}:
                torch_callable(name)  # raises GraphError that names the operator
        return TorchProgram(subdags, options)
