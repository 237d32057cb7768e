"""What training puts on the wire is what the plan says: counted on the TCP connections, from outside.

Every machine is reached through a relay, so between them the relays see all bytes of all links between them: frames,
TLS, credits and control included. What should be there is computed here from the operators of each stage.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from itertools import permutations
from math import prod
from pathlib import Path
from typing import Any, Literal

import psutil
import pytest
import torch
import transformers
from models import CONFIGURATIONS, Batch, ConvolutionalNet, token_batch
from relay import Relay
from torch import nn

import fusionai
from fusionai.graph.dependencies import reads
from fusionai.graph.model import Dim
from fusionai.owner.local_pool import LocalPool
from fusionai.owner.membership import OwnerOptions
from fusionai.owner.training_job import Observer, StepEvent
from fusionai.pool.messages import JobLaunched
from fusionai.training.machine import Machine
from quick_pool import QuickPool

COMPNODES = 3
STEPS = 4
BATCH, LENGTH, HIDDEN = 4, 64, 128
HIDDEN_BYTES = BATCH * LENGTH * HIDDEN * 4
"""Of one hidden state in fp32."""
OVERHEAD = 0.02
"""What frames, TLS, credits and control may add."""

ITEM_BYTES = {"float32": 4, "int64": 8}

Links = Counter[tuple[str, str]]
"""Bytes by sending and receiving peer."""


def wide_model(name: str) -> tuple[nn.Module, Callable[[int, int], Batch]]:
    """Return a model whose boundary tensors dwarf all headers, with its batches."""
    torch.manual_seed(5)
    if name == "cnn":
        return ConvolutionalNet(), images
    width = {"n_embd": HIDDEN} if name == "gpt2" else {"hidden_size": HIDDEN}
    settings = {**CONFIGURATIONS[name], **width}
    config = transformers.AutoConfig.for_model(name.split("-")[0], **settings)
    kind: Any = transformers.AutoModelForMaskedLM if name == "bert" else transformers.AutoModelForCausalLM
    return kind.from_config(config).train(), token_batch(name, BATCH, LENGTH)


def images(step: int, index: int) -> Batch:
    generator = torch.Generator().manual_seed(100 * step + index)
    return {
        "images": torch.randn(8, 3, 32, 32, generator=generator),
        "labels": torch.randint(0, 5, (8,), generator=generator),
    }


# --- what is sent -------------------------------------------------------------------------------------------------


class Relays:
    """A relay in front of each machine."""

    def __init__(self, stack: ExitStack) -> None:
        self.pool = LocalPool(0)
        """Whose compnodes are relayed to; set it before it starts."""
        self._relays = {name: stack.enter_context(Relay(self._port_of(name))) for name in self.names}

    names = ("owner", *(f"compnode-{number}" for number in range(1, COMPNODES + 1)))

    def address(self, name: str) -> str:
        return self._relays[name].address

    @property
    def passed_bytes(self) -> int:
        """Bytes between machines so far, in both directions."""
        return sum(relay.passed_bytes for relay in self._relays.values())

    def _port_of(self, name: str) -> Callable[[], int]:
        def port() -> int:
            """Find where a machine listens, which it alone decides."""
            process = psutil.Process(None if name == "owner" else self.pool.pids[name])
            listening = {each.laddr.port for each in process.net_connections("tcp") if each.status == "LISTEN"}
            (found,) = listening - {relay.port for relay in self._relays.values()}
            return int(found)

        return port


class Meter(Observer):
    """Keeps the plan, and reads the relays after each step: by then all of a step's tensors have arrived."""

    def __init__(self, relays: Relays) -> None:
        self._relays = relays
        self.readings: list[int] = []
        self.losses: list[float] = []

    def launched(self, launched: JobLaunched, machines: Sequence[Machine]) -> None:
        self.plan, self.names, self.machines = launched.plan, launched.names, machines

    def stepped(self, event: StepEvent) -> None:
        self.readings.append(self._relays.passed_bytes)
        self.losses.append(event.loss)

    def name(self, peer: str) -> str:
        return self.names.get(peer, peer)


@pytest.fixture(scope="module")
def relays() -> Iterator[Relays]:
    with ExitStack() as stack:
        yield Relays(stack)


@pytest.fixture(scope="module")
def relayed_pool(relays: Relays, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalPool]:
    """Compnodes that tell everybody to come through their relays."""
    arguments = [["--advertise", relays.address(name)] for name in relays.names[1:]]
    relays.pool = QuickPool(COMPNODES, arguments=arguments, folder=tmp_path_factory.mktemp("relayed"))
    with relays.pool:
        yield relays.pool


# --- what should be sent ------------------------------------------------------------------------------------------


def size(dims: Sequence[Dim], dtype: str, sizes: dict[str, int]) -> int:
    """Return the bytes of a tensor whose dimensions are numbers, symbols, or products of these."""
    factors = [factor for dim in dims for factor in str(dim).replace(" ", "").split("*")]
    return ITEM_BYTES[dtype] * prod(sizes[each] if each in sizes else int(each) for each in factors)


def boundaries(meter: Meter, *, backward: bool) -> Links:
    """Return the bytes of one microbatch: what a stage reads and neither has nor makes comes from its maker."""
    found: Links = Counter()
    stages = {subdag.index: (machine.peer, subdag) for machine in meter.machines for subdag in machine.subdags}
    makers = {name: (peer, subdag) for peer, subdag in stages.values() for name in subdag.types}
    for peer, subdag in stages.values():
        own = {*subdag.types, *(item.name for item in subdag.inputs), *(item.name for item in subdag.weights)}
        for name in {name for node in subdag.nodes for name in reads(node)} - own:
            maker, origin = makers[name]
            if maker == peer:
                continue
            made = origin.types[name]
            assert made.dtype == "float32", f"{name} is no activation, so how its gradient travels is not known here"
            found[maker, peer] += size(made.shape, made.dtype, meter.plan.sizes)
            if backward:
                found[peer, maker] += size(made.shape, made.dtype, meter.plan.sizes)
    return found


def inputs(meter: Meter, batch: Batch) -> Links:
    """Return the bytes of one microbatch's inputs that the owner hands to other machines."""
    found: Links = Counter()
    for machine in meter.machines:
        for subdag in machine.subdags:
            for item in subdag.inputs:
                if item.role != "positions" and machine.peer != meter.plan.owner:
                    found[meter.plan.owner, machine.peer] += batch[item.name].numel() * batch[item.name].element_size()
    return found


def tied_gradients(meter: Meter) -> Links:
    """Return the bytes of one step: each holder of a tied weight sends its gradient to each other one."""
    found: Links = Counter()
    keys = {weight.key: weight for machine in meter.machines for each in machine.subdags for weight in each.weights}
    for key, weight in keys.items():
        holders = [machine.peer for machine in meter.machines if key in machine.keys]
        if weight.trainable:
            for pair in permutations(holders, 2):
                found[pair] += size(weight.type.shape, weight.type.dtype, {})
    return found


def total(links: Links, times: int) -> Links:
    return Counter({pair: count * times for pair, count in links.items()})


# --- both ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "compnodes", "microbatches", "privacy", "hidden_states"),
    [
        ("llama", 1, 2, "private", 2),
        ("llama", 3, 4, "private", 4),
        ("llama-tied", 2, 3, "open", 1),
        ("gpt2", 3, 2, "open", 2),
        ("bert", 2, 2, "private", 3),
        ("cnn", 2, 2, "private", 0),
    ],
)
def test_a_step_sends_its_boundary_tensors_and_little_else(
    relayed_pool: LocalPool,
    relays: Relays,
    tmp_path: Path,
    name: str,
    compnodes: int,
    microbatches: int,
    privacy: Literal["private", "open"],
    hidden_states: int,
) -> None:
    """`hidden_states` is how often a hidden state goes between machines; a cut inside a layer sends more than that."""
    model, batch = wide_model(name)
    meter = Meter(relays)
    result = fusionai.train(
        model,
        batch,
        broker=relayed_pool.token,
        steps=STEPS,
        microbatches=microbatches,
        privacy=privacy,
        compnodes=compnodes,
        run=tmp_path,
        owner=OwnerOptions(token=relayed_pool.token, advertise=(relays.address("owner"),)),
        observer=meter,
    )
    assert len({machine.peer for machine in meter.machines} - {meter.plan.owner}) == compnodes

    of_stages = total(boundaries(meter, backward=True), microbatches) + tied_gradients(meter)
    expected = of_stages + total(inputs(meter, batch(0, 0)), microbatches)
    least = 2 * microbatches * hidden_states * HIDDEN_BYTES
    assert expected.total() >= least
    if compnodes == 1:
        assert expected.total() == least, "where a private job's only compnode begins and ends is no choice"

    # Weights went before the first reading, and the checkpoint came after the last.
    sent = (meter.readings[-1] - meter.readings[0]) / (STEPS - 1)
    assert expected.total() <= sent <= (1 + OVERHEAD) * expected.total(), f"{sent / expected.total() - 1:.2%} more"

    # What is reported is tensors, to the byte.
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(records) == STEPS
    for record in records:
        assert record["bytes_sent"] == expected.total()
        for machine in meter.machines:
            links = {meter.name(to): count for (source, to), count in of_stages.items() if source == machine.peer}
            assert record["compnodes"][meter.name(machine.peer)]["bytes_sent"] == links
    assert result.bytes_sent == STEPS * expected.total()


def test_an_evaluation_sends_no_gradients(relayed_pool: LocalPool, relays: Relays, tmp_path: Path) -> None:
    """Its bytes count in the run's, and not in a step's."""
    model, batch = wide_model("llama")
    meter = Meter(relays)
    heldout = [batch(1000, index) for index in range(3)]
    result = fusionai.train(
        model,
        batch,
        broker=relayed_pool.token,
        steps=2,
        microbatches=2,
        compnodes=1,
        heldout=heldout,
        evaluate_every=1,
        run=tmp_path,
        owner=OwnerOptions(token=relayed_pool.token, advertise=(relays.address("owner"),)),
        observer=meter,
    )
    step = 2 * boundaries(meter, backward=True).total()
    evaluation = len(heldout) * boundaries(meter, backward=False).total()
    assert evaluation == len(heldout) * 2 * HIDDEN_BYTES
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [record["bytes_sent"] for record in records] == [step, step]
    assert result.bytes_sent == 2 * (step + evaluation)
    # Between the two readings lies the second step with its evaluation.
    sent = meter.readings[1] - meter.readings[0]
    assert step + evaluation <= sent <= (1 + OVERHEAD) * (step + evaluation)
