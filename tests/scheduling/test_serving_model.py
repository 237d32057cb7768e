"""The cost of serving: a captured decoder's segments, and the time and room of ranges, against hand counts."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
import torch
import transformers
from serving_pools import machine, small_model

from fusionai.errors import ConfigError, GraphError
from fusionai.graph.capture import capture_transformers
from fusionai.graph.model import OpDag
from fusionai.graph.privacy import arrange_private
from fusionai.scheduling.segments import MEMORY_MARGIN
from fusionai.scheduling.serving.load import load_of
from fusionai.scheduling.serving.serving_estimator import CHUNK_TOKENS, range_times
from fusionai.scheduling.serving.serving_model import serving_model

HIDDEN, INNER, HEADS, GROUPS, LAYERS, WORDS = 64, 160, 8, 2, 3, 96


@pytest.fixture(scope="module")
def llama() -> OpDag:
    config = transformers.LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        vocab_size=WORDS,
    )
    with torch.device("meta"):
        module = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return capture_transformers(module, "causal").graph


def sizes(graph: OpDag, sequences: int, tokens: int) -> dict[str, int]:
    return {symbol: (sequences, tokens)[axis] for symbol, (_, axis) in graph.symbols.items()}


def test_segments_of_a_llama_equal_a_hand_count(llama: OpDag) -> None:
    model = serving_model(llama, lambda sequences, tokens: sizes(llama, sequences, tokens))
    assert model.blocks == LAYERS
    key_value = GROUPS * (HIDDEN // HEADS)
    weights = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * key_value + 3 * HIDDEN * INNER
    assert list(model.flops_S) == [0, *[2 * weights] * LAYERS, 2 * HIDDEN * WORDS]
    # Keys and values of one token, two bytes each.
    assert list(model.kv_bytes_S) == [0, *[2 * key_value * 2] * LAYERS, 0]
    # Each token against each other: queries times keys, and weights times values.
    assert list(model.attention_flops_S) == [0, *[4 * HIDDEN] * LAYERS, 0]
    assert list(model.crossing_bytes_P) == [8, *[2 * HIDDEN] * (LAYERS + 1), 8]
    assert list(model.last_only_S) == [0, *[0] * LAYERS, 1]
    block = 2 * (weights + 2 * HIDDEN)  # with two norms
    extra = model.weight_bytes_S[1:-1] - block
    # The rotary table may be held with any block, the last norm with the last.
    assert (extra >= 0).all()
    assert (extra <= 2 * HIDDEN + 4 * HIDDEN // HEADS).all()
    assert model.weight_bytes_S[0] == model.weight_bytes_S[-1] == 2 * HIDDEN * WORDS
    assert model.read_bytes_S[0] == 0


def test_what_a_private_job_pins_is_the_first_and_the_last_segment(llama: OpDag) -> None:
    model = serving_model(llama, lambda sequences, tokens: sizes(llama, sequences, tokens))
    arranged, front, back = arrange_private(llama)
    first = {node.name for node in llama.nodes[: model.positions[1]]}
    last = {node.name for node in llama.nodes[model.positions[-2] :]}
    weighted = {weight.name for weight in llama.weights if weight.kind == "parameter"}

    def with_weights(names: set[str]) -> set[str]:
        return {
            node.name
            for node in llama.nodes
            if node.name in names and any(str(getattr(arg, "name", "")) in weighted for arg in node.args)
        }

    assert with_weights({node.name for node in arranged.nodes[:front]}) == with_weights(first)
    assert with_weights({node.name for node in arranged.nodes[back:]}) == with_weights(last)


def test_a_model_without_attention_cannot_be_served(llama: OpDag) -> None:
    nodes = tuple(node for node in llama.nodes if node.op != "fusion.attention")
    with pytest.raises(GraphError, match=r"no fusion\.attention operator"):
        serving_model(msgspec.structs.replace(llama, nodes=nodes), lambda s, t: sizes(llama, s, t))


def test_load_of_two_requests_by_hand() -> None:
    load = load_of([(10, 1), (20, 3)])
    assert load.prompt_tokens == 15
    assert load.prompt_pairs == (100 + 400) / 2
    assert load.output_tokens == 2
    assert load.context_tokens == (21 + 22) / 2  # the second request's two decode passes
    assert load.reserved_tokens == (1 * 11 + 3 * 23) / 4
    assert load.decode_share == 0.5
    assert load.carried_tokens == (10 + 20 + 0 + 2) / 4


def test_a_load_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"load\.lengths"):
        load_of([])
    with pytest.raises(ConfigError, match=r"load\.lengths"):
        load_of([(5, 0)])


def test_times_of_a_range_by_hand() -> None:
    model, load = small_model(2), load_of([(100, 11)])
    device = machine("gpu", memory=1e9, bandwidth=1e11, flops=1e13).device
    times = range_times(model, device, load, "fp32").at(1, 3)
    context = 100 + 5.5
    cache = 2 * 1000.0 * context
    # 2 ms of weights; a sequence's cache and FLOPs add to it, and 20 operators start in 20 microseconds.
    assert float(times.pass_s(1.0)) == pytest.approx((2e8 + cache) / 1e11)
    assert float(times.pass_s(7.0)) == pytest.approx((2e8 + 7 * cache) / 1e11)
    per_token = 2e8 / 1e13 + 2 * 100.0 * context / 1e13
    assert float(times.pass_s(1e4)) == pytest.approx(1e4 * per_token)
    room = 1e9 / MEMORY_MARGIN - 2e8 - 4 * CHUNK_TOKENS * 2048
    assert float(times.sequences) == pytest.approx(room / (2 * 1000.0 * 111))
    # A prompt of 100 tokens is one pass: products take 2 ms, as do the weights, and its attention a little more.
    flops = 100 * 2e8 + 2 * 100.0 * (100**2 + CHUNK_TOKENS * 100) / 2
    assert float(times.prompt_s) == pytest.approx(max(flops / 1e13, (2e8 + 100 * 2000) / 1e11))


def test_the_rate_of_a_machine_solves_littles_law() -> None:
    """With room for n sequences, each elsewhere for `rest`, n = T * (own + rest), and the passes fill the time."""
    model, load = small_model(2, kv=20_000.0), load_of([(100, 11)])
    device = machine("gpu", memory=5e8, bandwidth=1e11, flops=1e14).device
    times = range_times(model, device, load, "fp32").at(1, 3)
    for rest_s in (0.0, 0.01, 1.0):
        rate = float(times.tokens_per_s(np.asarray(rest_s)))
        decoded = rate * load.decode_share
        batch = float(times.sequences) - decoded * rest_s
        if batch >= 1:
            busy = decoded / batch * float(times.pass_s(batch)) + rate * float(times.prompt_s) / load.output_tokens
            assert busy == pytest.approx(1.0, rel=1e-6)
        else:
            assert decoded * (float(times.pass_s(1.0)) + rest_s) == pytest.approx(float(times.sequences), rel=1e-6)
        assert rate <= float(times.tokens_per_s(np.asarray(rest_s), least=True)) * (1 + 1e-9)


def test_a_range_that_does_not_fit_passes_nothing() -> None:
    model, load = small_model(3), load_of([(100, 11)])
    times = range_times(model, machine("gpu", memory=2.5e8).device, load, "fp32")
    rates = times.tokens_per_s(np.asarray(0.0))
    assert rates[1, 2] > 0
    assert rates[1, 3] > 0
    assert rates[1, 4] == 0
    assert rates[2, 2] == 0
    assert not math.isnan(rates.sum())
