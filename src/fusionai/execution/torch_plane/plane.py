"""The torch plane."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

# The shape rules that check a stranger's graph load this, 0.1 GB, at their first use. Loaded here, it is there before a
# compnode measures how much memory is free, and no job waits for it.
import torch._dynamo

from fusionai.errors import GraphError
from fusionai.execution.own_thread import in_own_thread
from fusionai.execution.plane import Calibration, Clipping, Plane, Program, ProgramOptions
from fusionai.execution.torch_plane import devices
from fusionai.execution.torch_plane.calibration import calibrate
from fusionai.execution.torch_plane.operators import torch_callable
from fusionai.execution.torch_plane.program import TorchProgram
from fusionai.graph.model import SubDag


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
        return in_own_thread(lambda: calibrate(device, seconds))

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
