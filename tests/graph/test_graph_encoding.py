"""OP-DAGs as text: canonical, hashed, and safe to load from anybody."""

from __future__ import annotations

import copy
import json
import random
import time
from functools import cache
from typing import Any

import msgspec
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from language_graphs import captured_residual_net, llama_graph

from fusionai.errors import GraphError
from fusionai.graph.cost import stage_cost
from fusionai.graph.cuts import cut, cut_points
from fusionai.graph.encoding import content_hash, decode, decode_subdag, encode, encode_subdag
from fusionai.graph.model import Keyword, Node, OpDag, Ref, Size, SubDag, TensorType, ValueName, Weight, WeightKey
from fusionai.graph.privacy import arrange_private
from fusionai.graph.verify import GraphLimits, verify, verify_subdag

SMALL = GraphLimits(encoded_bytes=1 << 20, nodes=2_000, weights=2_000, inputs=20)
MUTATIONS = 10_000


@cache
def graph() -> OpDag:
    return llama_graph(layers=2)


def test_text_is_canonical_and_round_trips() -> None:
    for each in (graph(), captured_residual_net().graph):
        text = encode(each)
        assert decode(text) == each
        assert encode(decode(text)) == text

        def in_order(pairs: list[tuple[str, Any]]) -> None:
            assert [key for key, _ in pairs] == sorted(key for key, _ in pairs)

        json.loads(text, object_pairs_hook=in_order)
        assert b", " not in text
        assert b": " not in text
        assert len(content_hash(each)) == 64


def test_hash_changes_with_any_part() -> None:
    other = msgspec.structs.replace(graph(), name="other")
    assert content_hash(other) != content_hash(graph())
    assert content_hash(decode(encode(graph()))) == content_hash(graph())


def test_stages_round_trip() -> None:
    middle = len(graph().nodes) // 2
    for subdag in cut(graph(), [middle - 20, middle]):
        assert decode_subdag(encode_subdag(subdag)) == subdag


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda text: text[:-1], "no OP-DAG"),
        (lambda text: text + b" ", "canonical"),
        (lambda text: text.replace(b'"loss":', b'"speed":1,"loss":'), "unknown field"),
        (lambda text: text.replace(b'"name":', b'"name":"twice","name":', 1), "canonical"),
        (lambda text: text.replace(b'"vocabulary":1', b'"vocabulary":2'), "vocabulary 2"),
        (lambda text: text.replace(b"aten.silu.default", b"aten.sulu.default"), "near it: aten.silu.default"),
        (lambda text: text.replace(b"aten.silu.default", b"aten.set_.source_Tensor"), "not in vocabulary"),
        (lambda text: b"[" * 100_000, "no OP-DAG"),
        (lambda text: b"\xff\xfe" + text, "no OP-DAG"),
        (lambda text: b"", "no OP-DAG"),
        (lambda text: b"null", "no OP-DAG"),
        (lambda text: text * 100, "at most"),
    ],
)
def test_refusals_say_why(change: Any, text: str) -> None:
    with pytest.raises(GraphError, match=text) as caught:
        decode(change(encode(graph())), SMALL)
    assert len(str(caught.value)) < 6_000


HOSTILE: list[Any] = [
    None, True, -1, 0, 1 << 62, -(1 << 62), 1e308, "", "s0", "aten.linear.default", "x" * 3_000, "s0*" * 100 + "s0",
    [], {}, [[]], {"is": "ref", "name": "loss"},
    {"is": "size", "expression": "1//0"}, {"is": "size", "expression": "((("},
    {"is": "keyword", "kind": "dtype", "word": "float8"}, ["x"] * 50, 1 << 40, [1 << 60] * 12, "max(s0", "\ud800",
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths to every part of a JSON value."""
    found = [path]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found += places(item, (*path, key))
    return found


def parent_of(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path[:-1]:
        value = value[key]
    return value


def kind(value: Any) -> Any:
    """Return what makes a JSON value exchangeable for another at the first glance."""
    return frozenset(value) if isinstance(value, dict) else type(value)


def mutated(text: bytes, every: list[tuple[Any, ...]], dice: random.Random) -> bytes:
    """Return a text with a random part changed: bytes, or a JSON value replaced, removed, moved or repeated."""
    if dice.random() < 0.3:
        raw = bytearray(text)
        for _ in range(dice.randint(1, 4)):
            at = dice.randrange(len(raw))
            choice = dice.random()
            if choice < 0.4:
                raw[at] = dice.randrange(256)
            elif choice < 0.7:
                del raw[at : at + dice.randint(1, 50)]
            else:
                raw[at:at] = raw[dice.randrange(len(raw)) :][: dice.randint(1, 200)]
        return bytes(raw)
    value = json.loads(text)
    kinds = {path: kind(parent_of(value, path)[path[-1]]) for path in every[1:]}
    for _ in range(dice.randint(1, 3)):
        path = dice.choice(every[1:])
        alike = [other for other in every[1:] if kinds[other] == kinds[path]] if dice.random() < 0.8 else every[1:]
        try:
            parent = parent_of(value, path)
            parent[path[-1]]  # an earlier change may have removed it
            if dice.random() < 0.1:
                del parent[path[-1]]
            elif dice.random() < 0.9:
                parent[path[-1]] = copy.deepcopy(parent_of(value, other := dice.choice(alike))[other[-1]])
            else:
                parent[path[-1]] = copy.deepcopy(dice.choice(HOSTILE))
        except (KeyError, IndexError, TypeError):
            continue
    try:
        return msgspec.json.encode(value, order="sorted")
    except UnicodeEncodeError:
        return json.dumps(value).encode()


def cost_of(accepted: OpDag | SubDag) -> None:
    """Do what a broker or compnode does first with a stranger's graph; its types may still be lies."""
    sizes = dict.fromkeys(accepted.symbols, 4)
    try:
        stages = cut(accepted, []) if isinstance(accepted, OpDag) else (accepted,)
        stage_cost(stages[0], sizes)
        if isinstance(accepted, OpDag):
            cut_points(accepted, sizes)
            arrange_private(accepted)
    except GraphError:
        pass


def test_ten_thousand_malformed_texts_raise_graph_errors_only() -> None:
    """No other exception, no text accepted that is not the graph's own, little time, no memory to speak of."""
    whole = encode(captured_residual_net().graph)
    stage = encode_subdag(cut(captured_residual_net().graph, [8])[1])
    dice = random.Random(5)
    paths = {text: places(json.loads(text)) for text in (whole, stage)}
    before_bytes = psutil.Process().memory_info().rss
    refused, by_rules, slowest_s = 0, 0, 0.0
    for number in range(MUTATIONS):
        text, load, check = ((whole, decode, verify), (stage, decode_subdag, verify_subdag))[number % 2]
        hostile = mutated(text, paths[text], dice)
        started_s = time.process_time()
        try:
            accepted = load(hostile, SMALL)  # type: ignore[operator]
        except GraphError as error:
            refused += 1
            by_rules += " rules" in str(error)
        else:
            check(accepted, SMALL)  # type: ignore[operator]
            cost_of(accepted)
        slowest_s = max(slowest_s, time.process_time() - started_s)
    assert refused > MUTATIONS * 0.8
    assert by_rules > MUTATIONS * 0.15, "many must get past the parser, to the rules"
    assert slowest_s < 10
    assert psutil.Process().memory_info().rss - before_bytes < 64 << 20


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
        max_leaves=20,
    )
)
@settings(max_examples=300, deadline=None)
def test_arbitrary_json_is_refused(value: Any) -> None:
    for load in (decode, decode_subdag):
        with pytest.raises(GraphError):
            load(json.dumps(value).encode())


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_arbitrary_bytes_are_refused(value: bytes) -> None:
    for load in (decode, decode_subdag):
        with pytest.raises(GraphError):
            load(value)


def changed(**fields: Any) -> OpDag:
    return msgspec.structs.replace(graph(), **fields)


def with_node(place: int, **fields: Any) -> OpDag:
    nodes = list(graph().nodes)
    nodes[place] = msgspec.structs.replace(nodes[place], **fields)
    return changed(nodes=tuple(nodes))


def with_weight(**fields: Any) -> OpDag:
    first, *rest = graph().weights
    return changed(weights=(msgspec.structs.replace(first, **fields), *rest))


X = ValueName("x")


@pytest.mark.parametrize(
    ("broken", "text"),
    [
        (lambda: changed(nodes=graph().nodes[::-1]), "which nothing before it makes"),
        (lambda: changed(nodes=graph().nodes + graph().nodes[-1:]), "defined twice"),
        (lambda: changed(loss=X), "no node makes the loss"),
        (lambda: changed(loss=graph().nodes[0].outputs[0]), "must be a floating-point scalar"),
        (lambda: changed(types={}), "has no type"),
        (lambda: changed(symbols={"s0": (X, 0)}), "is no input"),
        (lambda: changed(symbols={**graph().symbols, "s0": (graph().inputs[0].name, 7)}), "does not stand for axis 7"),
        (lambda: changed(symbols={**graph().symbols, "max": (graph().inputs[0].name, 0)}), "cannot be a symbol"),
        (lambda: with_node(3, args=(Ref(X),)), "takes 'x'"),
        (lambda: with_node(3, args=()), "is missing"),
        (lambda: with_node(3, args=(float("nan"),)), "is nan"),
        (lambda: with_node(3, name="n" * 2_000), "characters"),
        (lambda: with_node(3, op="aten.system.default", scope="model.layers.0"), r"\(in model.layers.0\)"),
        (lambda: with_weight(type=TensorType("float32", ("s0",))), "must be numbers"),
        (lambda: with_weight(type=TensorType("int64", (2,)), trainable=True), "trainable"),
        (lambda: with_weight(type=TensorType("float32", (1 << 40,))), "larger than"),
        (lambda: with_weight(key=graph().weights[1].key), "declared in two ways"),
        (
            lambda: changed(
                types={**graph().types, graph().nodes[0].outputs[0]: TensorType("float32", (1 << 30,) * 3)}
            ),
            "larger than",
        ),
        (
            lambda: changed(types={**graph().types, graph().nodes[0].outputs[0]: TensorType("float32", ("s7",))}),
            "unknown symbol 's7'",
        ),
        (
            lambda: changed(types={**graph().types, graph().nodes[0].outputs[0]: TensorType("float32", (1,) * 40)}),
            "axes",
        ),
    ],
)
def test_each_rule_is_kept(broken: Any, text: str) -> None:
    verify(graph())
    with pytest.raises(GraphError, match=text):
        verify(broken())


def test_problems_are_listed_together_up_to_ten() -> None:
    nodes = tuple(msgspec.structs.replace(node, op=node.op + "x") for node in graph().nodes)
    with pytest.raises(GraphError) as caught:
        verify(changed(nodes=nodes))
    assert str(caught.value).count("is not in vocabulary") == 10
    assert "and more" in str(caught.value)


def test_stages_must_be_wired_rightly() -> None:
    middle = len(graph().nodes) // 2
    first, second = cut(graph(), [middle])
    for broken in (
        msgspec.structs.replace(first, index=1),
        msgspec.structs.replace(second, index=0),
        msgspec.structs.replace(second, receives=()),
        msgspec.structs.replace(first, sends=(msgspec.structs.replace(first.sends[0], value=X),)),
    ):
        with pytest.raises(GraphError):
            verify_subdag(broken)


def test_atoms_survive_the_trip() -> None:
    """What argument unions could confuse: booleans and integers, whole floats, empty tuples, infinities."""
    node = Node(
        "y",
        "aten.pad.default",
        (Ref(X), (1, Size("s0"))),
        {"mode": "constant", "value": Keyword("float", "-inf")},
        (X,),
    )
    odd = Node("z", "aten.mul.Tensor", (Ref(X), 2.0), {}, (ValueName("z"),))
    weight = Weight(X, WeightKey("x"), TensorType("bool", ()), "constant", False, (WeightKey("y"),))
    for value in (node, odd, weight):
        text = msgspec.json.encode(value, order="sorted")
        again = msgspec.json.decode(text, type=type(value))
        assert again == value
        assert repr(again) == repr(value)
