"""Seeds of random operators: the same microbatch of the same step always draws the same numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fusionai.execution.program import MicrobatchKey


def random_seed(seed: int, microbatch: MicrobatchKey, stage: int) -> int:
    """Return a 63-bit seed that depends on all of (seed, step, microbatch, stage) and on nothing else."""
    text = f"{seed}/{microbatch.step}/{microbatch.index}/{stage}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's generators inside the context, and restore the process's own random state afterwards."""
    processor_before = torch.get_rng_state()
    device_before: torch.Tensor | None = None
    if device.type == "cuda":
        device_before = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        device_before = torch.mps.get_rng_state()
    try:
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        elif device.type == "mps":
            torch.mps.manual_seed(seed)
        yield
    finally:
        torch.set_rng_state(processor_before)
        if device_before is not None and device.type == "cuda":
            torch.cuda.set_rng_state(device_before, device)
        elif device_before is not None:
            torch.mps.set_rng_state(device_before)
