"""Machines of a simulated run: what waits for them, and what their passes take."""

from __future__ import annotations

from collections import deque

import numpy as np

from contenders.serving.request_router import Hop
from contenders.serving.requests import Request
from fusionai.scheduling.estimator import flops_rate
from fusionai.scheduling.links import Floats
from fusionai.scheduling.profile import DeviceProfile
from fusionai.scheduling.serving.serving_task import ServingTask


class Conversation:
    """A request on its way."""

    __slots__ = ("first_s", "last_s", "made", "request", "route")

    def __init__(self, request: Request, route: tuple[Hop, ...]) -> None:
        self.request, self.route = request, route
        self.made = 0
        self.first_s = self.last_s = 0.0

    @property
    def tokens(self) -> int:
        """Return its whole length."""
        return self.request.prompt_tokens + self.request.output_tokens


class Chunk:
    """Consecutive tokens of a request's prompt, up to the `end`-th."""

    __slots__ = ("end", "sequence", "tokens")

    def __init__(self, sequence: Conversation, tokens: int, end: int) -> None:
        self.sequence, self.tokens, self.end = sequence, tokens, end

    @property
    def complete(self) -> bool:
        """Whether the prompt ends with it."""
        return self.end == self.sequence.request.prompt_tokens


class Station:
    """A machine: what waits, and what its passes take, from sums over the segments before each position."""

    def __init__(self, task: ServingTask, device: DeviceProfile, batch: int) -> None:
        model = task.model
        self.batch = batch

        def sums(values: Floats) -> list[float]:
            return [0.0, *np.cumsum(values).tolist()]

        bandwidth = device.memory_bytes_per_s
        products, attention = (flops_rate(device, name, task.precision) for name in ("matmul", "attention"))
        self.read_s = sums(model.read_bytes_S / bandwidth)
        self.kv_s = sums(model.kv_bytes_S / bandwidth)
        self.moved_s = sums(model.moved_bytes_S / bandwidth)
        self.flops_s = sums(model.flops_S / products)
        self.attention_s = sums(model.attention_flops_S / attention)
        self.starts_s = sums(model.operators_S * device.overhead_s)
        self.head_flops_s = sums(model.flops_S * model.last_only_S / products)
        self.head_moved_s = sums(model.moved_bytes_S * model.last_only_S / bandwidth)
        self.on_cpu = device.device == "cpu"
        self.prompts: deque[tuple[Chunk, int]] = deque()
        self.tokens: deque[tuple[Conversation, int]] = deque()
        """With the place in the route; the owner's embedding is -1, its head the length of the route."""
        self.busy = False
        self.due = False
        """Whether a pass begins at this time."""
        self.prompt_last = False
        self.busy_s = 0.0
        self.passes = 0
        self.batched = 0

    def prompt_s(self, tokens: int, context: int, first: int, last: int) -> float:
        """Return the seconds of a pass of a prompt's tokens, of which the last attends to `context` tokens."""
        pairs = tokens * context - tokens * (tokens - 1) / 2
        compute = tokens * (self.flops_s[last] - self.flops_s[first])
        compute -= (tokens - 1) * (self.head_flops_s[last] - self.head_flops_s[first])
        compute += pairs * (self.attention_s[last] - self.attention_s[first])
        moved = self.moved_s[last] - self.moved_s[first] + self.kv_s[last] - self.kv_s[first]
        memory = self.read_s[last] - self.read_s[first] + tokens * moved
        memory -= (tokens - 1) * (self.head_moved_s[last] - self.head_moved_s[first])
        return self._with_starts(max(compute, memory), first, last)

    def decode_s(self, contexts: list[tuple[int, int, int]]) -> float:
        """Return the seconds of a pass of tokens, each with its context, first and last position."""
        compute = memory = 0.0
        lowest, highest = contexts[0][1], contexts[0][2]
        for context, first, last in contexts:
            compute += self.flops_s[last] - self.flops_s[first]
            compute += context * (self.attention_s[last] - self.attention_s[first])
            memory += context * (self.kv_s[last] - self.kv_s[first]) + self.moved_s[last] - self.moved_s[first]
            if first < lowest:
                lowest = first
            if last > highest:
                highest = last
        memory += self.read_s[highest] - self.read_s[lowest]
        return self._with_starts(max(compute, memory), lowest, highest)

    def _with_starts(self, work_s: float, first: int, last: int) -> float:
        starts = self.starts_s[last] - self.starts_s[first]
        return work_s + starts if self.on_cpu else max(work_s, starts)
