"""One machine that keeps in its main memory what its GPU's memory has no room for.

This is what a pool has to beat: its owner's own card, or a rented one. Computing takes what the estimator says for any
machine. For the rest nobody is talked into a pool: copies and the update overlap with computing without loss, and of
two ways to order the work (Ren et al. 2021, ZeRO-Offload; Rajbhandari et al. 2021, ZeRO-Infinity) the faster counts.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from fusionai.graph.sizes import type_bytes
from fusionai.scheduling.estimator import backward_s, forward_s
from fusionai.scheduling.profile import DeviceProfile
from fusionai.scheduling.segments import MEMORY_MARGIN
from fusionai.simulation.forecast.request import Request

Limit: TypeAlias = Literal["computing", "copies to and from main memory", "the update in main memory"]

BUS_BYTES_PER_S = 20e9
"""Between a GPU and main memory, each way. Assumed: of the 31.5 GB/s of PCIe 4.0 with 16 lanes, what large copies
reach; half as much on PCIe 3.0."""

MAIN_MEMORY_BYTES_PER_S = 50e9
"""At which a CPU updates weights. Assumed: two channels of DDR5."""


class Offload(msgspec.Struct, frozen=True, kw_only=True):
    """A step with the model's state in main memory."""

    step_s: float
    limit: Limit
    main_memory_bytes: int
    """What the state and the activations kept there take: the machine needs so much main memory."""


def offloaded(request: Request, device: DeviceProfile) -> Offload | None:
    """Return the step of one GPU with the model's state in main memory; None where that is no way out.

    It is none for devices whose memory is the main memory, and where the GPU cannot hold what one part of the model
    needs. Two orders are considered. By layers: a layer's weights come twice a step, all microbatches pass through it,
    and their forwards are computed again for the backwards, since only what crosses layers is kept, in main memory. By
    microbatches: all weights come for each forward and each backward, and a microbatch's activations stay on the GPU,
    if it has room for them. Weights travel in the job's precision.
    """
    cost = request.whole_cost
    if not device.device.startswith("cuda"):
        return None
    room_bytes = device.memory_bytes / MEMORY_MARGIN - cost.transient_bytes - 2 * _largest_weight_bytes(request)
    if room_bytes < max(part.saved_bytes for part in request.part_costs):
        return None
    microbatches = request.problem.microbatches
    forward, backward = (each(cost, device, request.problem.precision) for each in (forward_s, backward_s))
    weights = cost.weight_bytes / (2 if request.problem.precision == "bf16" else 1)
    state_bytes = (2 + request.problem.optimizer_states) * cost.trainable_bytes + cost.other_bytes
    kept_bytes = microbatches * sum(part.receive_bytes for part in request.part_costs)
    # What leaves the GPU (gradients, what is kept) and what comes (weights, that again) travel at the same time.
    orders = [(microbatches * (2 * forward + backward), (2 * weights + kept_bytes) / BUS_BYTES_PER_S, kept_bytes)]
    if cost.saved_bytes <= room_bytes:
        orders.append((microbatches * (forward + backward), microbatches * 2 * weights / BUS_BYTES_PER_S, 0))
    computing_s, copying_s, beside_bytes = min(orders, key=lambda order: max(order[:2]))
    update_s = (2 + 2 * request.problem.optimizer_states + 3) * cost.trainable_bytes / MAIN_MEMORY_BYTES_PER_S
    limits: tuple[tuple[float, Limit], ...] = (
        (computing_s, "computing"),
        (copying_s, "copies to and from main memory"),
        (update_s, "the update in main memory"),
    )
    step_s, limit = max(limits)
    return Offload(step_s=step_s, limit=limit, main_memory_bytes=state_bytes + beside_bytes)


def _largest_weight_bytes(request: Request) -> int:
    """Return the bytes of the largest weight: twice as much is on the GPU, one in use and one on its way."""
    return max((type_bytes(weight.type, {}) for weight in request.problem.graph.weights), default=0)
