"""The stages of a plan on the machines that hold them now, and the tensors that pass between them."""

from __future__ import annotations

import math
from collections.abc import Callable

from fusionai.scheduling.estimator import send_s
from fusionai.simulation.codecs import Codec
from fusionai.simulation.simulated_links import SimulatedLink, SimulatedLinks
from fusionai.simulation.workload import EdgeLoad, StageLoad, Workload

CodecOf = Callable[[str, str], Codec]
"""The codec of the link from one peer to another."""


class TensorLane:
    """The tensors that one stage sends to another in one direction: when each was made, and when it arrives."""

    __slots__ = (
        "arrival_s",
        "backward",
        "channel",
        "made_s",
        "number",
        "seconds",
        "sent_bytes",
        "size_bytes",
        "source",
        "target",
    )

    def __init__(
        self, number: int, source: PlacedStage, target: PlacedStage, *, backward: bool, size_bytes: float
    ) -> None:
        self.number, self.source, self.target = number, source, target
        self.backward = backward
        self.size_bytes = size_bytes
        self.sent_bytes = size_bytes
        self.channel: SimulatedLink | None = None
        """None within one machine."""
        self.seconds = 0.0
        self.made_s: list[float] = []
        """By microbatch: when the sender had it, infinity before; a sender keeps what it sent."""
        self.arrival_s: list[float] = []
        """By microbatch: when the receiver has it, infinity if it is not on its way."""


class PlacedStage:
    """One stage of one pipeline: its machine, and how far it is in the present step."""

    __slots__ = (
        "available_s",
        "backward_s",
        "caught_up_s",
        "deferred_s",
        "done",
        "epoch",
        "factor",
        "forward_s",
        "into",
        "load",
        "machine",
        "microbatches",
        "number",
        "order",
        "out",
        "pipeline",
        "queued",
        "redo_until",
        "stage",
    )

    def __init__(self, number: int, pipeline: int, stage: int, load: StageLoad, microbatches: int) -> None:
        self.number, self.pipeline, self.stage = number, pipeline, stage
        self.microbatches = microbatches
        self.into: tuple[list[TensorLane], list[TensorLane]] = ([], [])
        """Lanes that end here: what a forward needs, what a backward needs."""
        self.out: tuple[list[TensorLane], list[TensorLane]] = ([], [])
        """Lanes that begin here: what a forward makes, what a backward makes."""
        self.load = load
        self.machine = load.peer
        self.forward_s = self.backward_s = self.deferred_s = 0.0
        self.factor = 1.0
        self.done = [0, 0]
        """Forwards and backwards that ended or run."""
        self.redo_until = [0, 0]
        """How many of each were done when a machine died."""
        self.queued = [False, False]
        """Whether the next forward, the next backward is queued."""
        self.epoch = 0
        """Raised when the stage is lost: what was queued for it before is void."""
        self.begin(1.0)

    def begin(self, factor: float) -> None:
        """Begin a step in which its machine's passes take `factor` times their seconds."""
        self.factor = factor
        self.done, self.redo_until = [0, 0], [0, 0]
        self.queued = [False, False]
        self.available_s = self.caught_up_s = 0.0
        for lane in (*self.out[0], *self.out[1]):
            lane.made_s = [math.inf] * self.microbatches
            lane.arrival_s = [math.inf] * self.microbatches

    @property
    def caught_up(self) -> bool:
        """Whether what a machine that died had computed is computed again."""
        return all(done >= before for done, before in zip(self.done, self.redo_until, strict=True))

    def in_order(self) -> list[tuple[bool, int]]:
        """Return all passes as 1F1B takes them when nobody waits: whether each is a backward, and its microbatch."""
        held = min(self.microbatches, self.load.in_flight)
        passes = [(backward, index) for backward in (False, True) for index in range(self.microbatches)]
        # Backward 0 comes between forwards held - 1 and held.
        return sorted(passes, key=lambda each: each[1] + (held - 0.5) * each[0])


class PlacedStages:
    """All stages of a plan, with the machine that holds each now."""

    def __init__(self, workload: Workload, channels: SimulatedLinks, codec_of: CodecOf) -> None:
        self.channels = channels
        self._codec_of = codec_of
        self.stages: list[PlacedStage] = []
        self.lanes: list[TensorLane] = []
        self.places: dict[tuple[int, int], PlacedStage] = {}
        """By pipeline and stage."""
        for number, pipeline in enumerate(workload.pipelines):
            if not pipeline.microbatches:
                continue
            for place, load in enumerate(pipeline.stages):
                stage = PlacedStage(len(self.stages), number, place, load, pipeline.microbatches)
                self.stages.append(stage)
                self.places[number, place] = stage
            for edge in pipeline.edges:
                self._join(number, edge)
        for lane in self.lanes:
            self._connect(lane)
        for stage in self.stages:
            self._time(stage)

    def _join(self, pipeline: int, edge: EdgeLoad) -> None:
        source, target = self.places[pipeline, edge.source], self.places[pipeline, edge.target]
        forward = TensorLane(len(self.lanes), source, target, backward=False, size_bytes=edge.forward_bytes)
        self.lanes.append(forward)
        source.out[0].append(forward)
        target.into[0].append(forward)
        if edge.backward_bytes is not None:
            gradients = TensorLane(len(self.lanes), target, source, backward=True, size_bytes=edge.backward_bytes)
            self.lanes.append(gradients)
            target.out[1].append(gradients)
            source.into[1].append(gradients)

    def _connect(self, lane: TensorLane) -> None:
        one, other = lane.source.machine, lane.target.machine
        if one == other:
            lane.channel, lane.seconds, lane.sent_bytes = None, 0.0, 0.0
            return
        lane.channel = self.channels.between(one, other)
        lane.sent_bytes = self._codec_of(one, other).sent_bytes(lane.size_bytes)
        lane.seconds = send_s(lane.sent_bytes, lane.channel.profile)

    def _time(self, stage: PlacedStage) -> None:
        """Set a stage's seconds: its passes, and packing and unpacking, which occupy its machine too."""
        load = stage.load
        stage.forward_s = load.forward_s + self._packing_s(stage, False)
        stage.backward_s = load.backward_s + self._packing_s(stage, True)
        stage.deferred_s = load.deferred_s

    def _packing_s(self, stage: PlacedStage, backward: bool) -> float:
        seconds = 0.0
        for lane in stage.into[backward]:
            if lane.channel is not None:
                codec = self._codec_of(lane.channel.source, lane.channel.target)
                seconds += codec.decode_s(lane.size_bytes, stage.machine)
        for lane in stage.out[backward]:
            if lane.channel is not None:
                codec = self._codec_of(lane.channel.source, lane.channel.target)
                seconds += codec.encode_s(lane.size_bytes, stage.machine)
        return seconds

    def move(self, stage: PlacedStage, load: StageLoad) -> None:
        """Give a stage to another machine."""
        stage.load, stage.machine = load, load.peer
        touched = {stage.number: stage}
        for lane in (*stage.into[0], *stage.into[1], *stage.out[0], *stage.out[1]):
            self._connect(lane)
            touched |= {lane.source.number: lane.source, lane.target.number: lane.target}
        for each in touched.values():
            self._time(each)

    def held_by(self, machine: str) -> list[PlacedStage]:
        """Return the stages of a machine."""
        return [stage for stage in self.stages if stage.machine == machine]
