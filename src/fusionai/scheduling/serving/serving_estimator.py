"""Seconds and sequences: what a range of segments costs a machine that serves, and how many tokens it passes on.

A pass is either a chunk of a prompt or a batch of `b` decode tokens of different sequences:

    decode pass    max(start, read + b * memory, b * compute)
    prompt pass    the same roofline over the chunk's tokens

`read` is the weights over the memory bandwidth, `memory` one sequence's cache and small operators over it, `compute`
its FLOPs over the achieved rates, and `start` the starting of operators, which on a CPU is added instead. That is the
roofline model (Williams et al., CACM 2009) with the rates of a `DeviceProfile`.

Of the memory offered, `MEMORY_MARGIN` keeps a share; weights and working space come first, the caches fill the rest.

Residents. A sequence holds its cache on every machine of its route while it is generated, wherever its token is at the
moment. If T tokens per second pass a machine, each comes back `rest_s` after it left, and the machine takes all that
wait into each pass, then Little's law gives the sequences that it must hold:

    n = T * (own + rest),    own = b / T,    T * (pass(b) / b + prompt) = 1

so a machine with room for few sequences, or one in a long ring, passes less than its batches would allow. Array
suffixes: P = positions of the model.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from fusionai.scheduling.estimator import flops_rate
from fusionai.scheduling.links import Floats
from fusionai.scheduling.profile import DeviceProfile
from fusionai.scheduling.segments import MEMORY_MARGIN
from fusionai.scheduling.serving.load import ServingLoad
from fusionai.scheduling.serving.serving_model import ServingModel

CHUNK_TOKENS = 256
"""Tokens of a prompt that one pass takes at most. A whole prompt holds every machine of a long pipeline up for longer
than a decode pass takes, so that tokens queue up behind it all the way; chunks let them by (as in Sarathi-Serve,
Agrawal et al., OSDI 2024). Smaller ones would read the weights more often than products need."""

_ALIVE = 4
"""Boundary tensors of a prompt pass that live at once: input, output, a residual, one more."""

_BISECTIONS = 44


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RangeTimes:
    """Costs of ranges [start, stop) on one device, as (P, P) tables or as arrays picked from such."""

    output_tokens: float
    decode_share: float
    start_s: Floats
    added_s: Floats
    read_s: Floats
    memory_s: Floats
    """For each sequence of a decode pass."""
    compute_s: Floats
    """For each sequence of a decode pass."""
    prompt_s: Floats
    """All passes of a prompt of mean length."""
    prompt_least_s: Floats
    """The same if its weights were read only once."""
    fixed_bytes: Floats
    """Weights and working space, without margin."""
    sequences: Floats
    """Sequences of mean length that the rest of the memory has room for; 0 where the weights do not fit."""

    def at(self, *index: object) -> RangeTimes:
        """Return the costs picked by an index into the tables."""
        return RangeTimes(
            output_tokens=self.output_tokens,
            decode_share=self.decode_share,
            **{name: np.asarray(getattr(self, name)[index if len(index) > 1 else index[0]]) for name in TABLES},
        )

    def pass_s(self, batch: Floats | float) -> Floats:
        """Return the seconds of a decode pass of a batch."""
        work = np.maximum(self.read_s + batch * self.memory_s, batch * self.compute_s)
        return np.asarray(self.added_s + np.maximum(self.start_s, work))

    def prompt_share_s(self, *, least: bool = False) -> Floats:
        """Return the seconds of prompt passes for each token generated."""
        return (self.prompt_least_s if least else self.prompt_s) / self.output_tokens

    def own_s(self, tokens_per_s: Floats, *, least: bool = False) -> Floats:
        """Return the seconds from a token's arrival to the end of its pass; inf where the rate is out of reach.

        With `least`, no waiting for the machine's other passes is counted: a token takes part in one of them only.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            decoded = tokens_per_s * self.decode_share
            free = (1 - tokens_per_s * self.prompt_share_s(least=least)) / decoded
            # A pass takes at most `free` seconds for each of its sequences.
            batch = np.maximum(
                (self.read_s + self.added_s) / (free - self.memory_s), (self.start_s + self.added_s) / free
            )
            batch = np.maximum(batch, self.added_s / (free - self.compute_s))
            reachable = (free > self.memory_s) & (free > self.compute_s * (1 - 1e-12)) & np.isfinite(batch)
            batch = np.where(reachable, np.maximum(batch, 1.0), np.inf)
            alone = np.where(reachable, self.pass_s(np.where(reachable, batch, 1.0)), np.inf)
            own = alone if least else np.where(batch > 1.0, batch / decoded, alone)
        return np.where(tokens_per_s > 0, own, self.pass_s(1.0))

    def held(self, tokens_per_s: Floats, rest_s: Floats, *, least: bool = False) -> Floats:
        """Return the sequences held at a rate, if each token is elsewhere for `rest_s` seconds between two passes."""
        with np.errstate(invalid="ignore"):
            return tokens_per_s * self.decode_share * (self.own_s(tokens_per_s, least=least) + rest_s)

    def tokens_per_s(self, rest_s: Floats, *, least: bool = False) -> Floats:
        """Return the most tokens that can be generated per second through a range, 0 where it does not fit."""
        floor = np.maximum(np.maximum(self.memory_s, self.compute_s), 1e-15) * self.decode_share
        high = np.broadcast_to(1 / (self.prompt_share_s(least=least) + floor), np.broadcast(floor, rest_s).shape).copy()
        low = np.zeros_like(high)
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            fits = self.held(middle, rest_s, least=least) <= self.sequences
            low, high = np.where(fits, middle, low), np.where(fits, high, middle)
        return np.where(self.sequences >= 1, low, 0.0)


TABLES = tuple(field.name for field in fields(RangeTimes) if field.name not in ("output_tokens", "decode_share"))
"""Names of the tables of `RangeTimes`."""


def range_times(model: ServingModel, device: DeviceProfile, load: ServingLoad, precision: str) -> RangeTimes:
    """Return the costs of every range on a device.

    Raises PlacementError for a profile without a rate for products.
    """
    sums, bandwidth = model.sums, device.memory_bytes_per_s
    products, attention = (flops_rate(device, name, precision) for name in ("matmul", "attention"))
    starts = sums(model.operators_S) * device.overhead_s
    on_cpu = device.device == "cpu"
    read = sums(model.read_bytes_S) / bandwidth
    kv = sums(model.kv_bytes_S)
    prompt_tokens_S = np.where(model.last_only_S > 0, 1.0, load.prompt_tokens)
    # The last chunk of a prompt is half full on average; each token attends to those before it.
    chunks = load.prompt_tokens / CHUNK_TOKENS + 0.5
    pairs = (load.prompt_pairs + CHUNK_TOKENS * load.prompt_tokens) / 2

    def prompt(passes: float, attended: float) -> Floats:
        flops_s = sums(prompt_tokens_S * model.flops_S) / products
        flops_s = flops_s + attended * sums(model.attention_flops_S) / attention
        moved_s = passes * read + sums(prompt_tokens_S * (model.moved_bytes_S + model.kv_bytes_S)) / bandwidth
        work_s = np.maximum(flops_s, moved_s)
        return work_s + passes * starts if on_cpu else np.maximum(work_s, passes * starts)

    fixed = sums(model.weight_bytes_S) + _ALIVE * CHUNK_TOKENS * float(model.crossing_bytes_P.max())
    left = device.memory_bytes / MEMORY_MARGIN - fixed
    # A range without attention has no cache, and room for any number.
    with np.errstate(divide="ignore"):
        room = np.where(kv > 0, left / (kv * load.reserved_tokens), np.inf)
    empty = np.tri(len(read), dtype=bool)
    return RangeTimes(
        start_s=np.zeros_like(starts) if on_cpu else starts,
        added_s=starts if on_cpu else np.zeros_like(starts),
        read_s=read,
        memory_s=(load.context_tokens * kv + sums(model.moved_bytes_S)) / bandwidth,
        compute_s=sums(model.flops_S) / products + load.context_tokens * sums(model.attention_flops_S) / attention,
        prompt_s=prompt(max(chunks, 1.0), pairs),
        prompt_least_s=prompt(1.0, load.prompt_pairs / 2),
        fixed_bytes=fixed,
        sequences=np.where(empty | (left < 0), 0.0, np.maximum(room, 0.0)),
        output_tokens=load.output_tokens,
        decode_share=load.decode_share,
    )
