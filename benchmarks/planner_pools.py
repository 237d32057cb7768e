"""Random pools and the workloads that planners are compared on."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from fusionai.graph.capture import capture_transformers
from fusionai.graph.model import OpDag
from fusionai.scheduling.links import LinkModel
from fusionai.scheduling.plan import Plan
from fusionai.scheduling.problem import TrainingProblem
from fusionai.scheduling.profile import LinkProfile, Member
from fusionai.simulation.hardware.catalogue import lookup
from fusionai.simulation.hardware.efficiency import profile_of
from fusionai.simulation.link_rates import LinkRates
from fusionai.simulation.scenario import Scenario
from fusionai.simulation.simulator import simulate

MEGABIT = 125_000.0
GPUS = ("RTX 4090", "RTX 2080")

Precision: TypeAlias = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Workload:
    """A model as a graph, and one microbatch of it."""

    graph: OpDag
    sizes: dict[str, int]
    precision: Precision

    def task(self, members: tuple[Member, ...], links: LinkModel, rounds: int) -> TrainingProblem:
        """Return an open job with Adam, `rounds` microbatches a step."""
        return TrainingProblem(
            graph=self.graph,
            graph_hash="benchmark",
            sizes=self.sizes,
            microbatches=rounds,
            optimizer_states=2,
            precision=self.precision,
            members=members,
            owner=None,
            links=links,
            privacy="open",
            front=0,
            back=len(self.graph.nodes),
        )


def _workload(make: Callable[[], Any], sequences: int, tokens: int, precision: Precision) -> Workload:
    with torch.device("meta"):
        model = make()
    if precision == "bf16":
        model = model.to(torch.bfloat16)
    graph = capture_transformers(model).graph
    return Workload(
        graph, {symbol: (sequences, tokens)[axis] for symbol, (_, axis) in graph.symbols.items()}, precision
    )


def _llama_1b() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
            vocab_size=128_256,
            tie_word_embeddings=True,
        )
    )


def _bert_large() -> BertForMaskedLM:
    return BertForMaskedLM(
        BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
    )


WORKLOADS: Mapping[str, Callable[[], Workload]] = MappingProxyType(
    {
        "gpt2-xl": lambda: _workload(
            lambda: GPT2LMHeadModel(GPT2Config(n_embd=1600, n_layer=48, n_head=25)), 1, 1024, "fp32"
        ),
        "bert-large": lambda: _workload(_bert_large, 2, 512, "fp32"),
        "llama-1b": lambda: _workload(_llama_1b, 1, 512, "bf16"),
        "gpt2-small": lambda: _workload(lambda: GPT2LMHeadModel(GPT2Config()), 1, 1024, "fp32"),
    }
)
"""GPT-2 XL with one sequence of 1,024 tokens a microbatch, which keeps 24.8 GB of activations; BERT-Large with two
of 512; a Llama of 1.2 billion parameters in bf16 with one of 512; GPT-2 small, which fits either card."""


@dataclass(frozen=True)
class ClusteredLinks:
    """Equal links within each cluster, and between any two clusters."""

    cluster: np.ndarray
    between: np.ndarray
    """Bytes per second by two clusters."""
    rtt: np.ndarray

    def bandwidths_bytes_per_s(self, sources: Any, targets: Any) -> Any:
        return self.between[self.cluster[sources], self.cluster[targets]]

    def rtts_s(self, sources: Any, targets: Any) -> Any:
        return self.rtt[self.cluster[sources], self.cluster[targets]]


def gpus(count: int, draw: random.Random) -> tuple[Member, ...]:
    """Return GPUs of mixed speed, in no order."""
    profiles = {name: profile_of(lookup(name)) for name in GPUS}
    kinds = [draw.choice(GPUS) for _ in range(count)]
    return tuple(Member(f"p{k}", f"{kind} {k}", profiles[kind], (), True) for k, kind in enumerate(kinds))


def clustered_links(count: int, clusters: int, draw: random.Random) -> ClusteredLinks:
    """Return links of 8 Mbit/s to 10 Gbit/s; machines of a cluster are next to each other in the given order."""
    between = np.zeros((clusters, clusters))
    rtt = np.zeros((clusters, clusters))
    for one, other in itertools.combinations_with_replacement(range(clusters), 2):
        low, high = (1000.0, 10_000.0) if one == other else (8.0, 1000.0)
        between[one, other] = between[other, one] = MEGABIT * low * (high / low) ** draw.random()
        rtt[one, other] = rtt[other, one] = 5e-4 if one == other else draw.uniform(0.01, 0.1)
    return ClusteredLinks(np.asarray(sorted(draw.randrange(clusters) for _ in range(count))), between, rtt)


def equal_links(count: int, megabits: float) -> ClusteredLinks:
    """Return links that are all alike, half a millisecond there and back."""
    return ClusteredLinks(np.zeros(count, dtype=np.int64), np.full((1, 1), megabits * MEGABIT), np.full((1, 1), 5e-4))


def simulated_step_s(workload: Workload, made: Plan, members: tuple[Member, ...], links: LinkModel) -> float:
    """Return a step of a plan as the discrete-event simulator executes it, each transfer alone on its link."""
    place = {each.peer: np.asarray(number) for number, each in enumerate(members)}

    def link(source: str, target: str) -> LinkProfile:
        if not (source and target):  # an open job's driver, with whom the planner does not reckon
            return LinkProfile(0.0, float("inf"))
        ends = place[source], place[target]
        return LinkProfile(float(links.rtts_s(*ends)), float(links.bandwidths_bytes_per_s(*ends)))

    devices = {each.peer: each.device for each in members}
    report = simulate(
        made, workload.graph, LinkRates(link), devices, Scenario(), precision=workload.precision, optimizer_states=2
    )
    return report.step_s[0]


def pool_of(seed: int) -> tuple[tuple[Member, ...], ClusteredLinks]:
    """Return a pool of 24 or 48 GPUs in 2 to 6 clusters, by its number."""
    draw = random.Random(seed)
    count = (24, 48)[seed % 2]
    links = clustered_links(count, draw.randint(2, 6), draw)
    return gpus(count, draw), links
