"""The ledger counts every microbatch of every stage exactly once, whatever order tensors come in."""

from __future__ import annotations

import random

import pytest

from fusionai.errors import ProtocolError
from fusionai.graph.model import Input, SubDag, TensorType, Transfer, ValueName
from fusionai.tensor import TensorData
from fusionai.training.ledger import RoundLedger, Slot

SCALAR = TensorType("float32", ())
TENSOR = TensorData("float32", (), bytes(4))


def stage(index: int, receives: list[tuple[str, int]], sends: list[tuple[str, int]], *, fed: bool) -> SubDag:
    """A sub-DAG without operators: the ledger looks at its edges only."""
    return SubDag(
        index=index,
        symbols={},
        inputs=(Input(ValueName("ids"), SCALAR, "tokens", True),) if fed else (),
        weights=(),
        nodes=(),
        types={},
        receives=tuple(Transfer(ValueName(v), s, index, SCALAR, True) for v, s in receives),
        sends=tuple(Transfer(ValueName(v), index, t, SCALAR, True) for v, t in sends),
        loss=None,
    )


CHAIN = [
    stage(0, [], [("a", 1), ("a", 2)], fed=True),
    stage(1, [("a", 0)], [("b", 2)], fed=False),
    stage(2, [("a", 0), ("b", 1)], [], fed=True),
]


def run(microbatches: int, seed: int, *, train: bool) -> list[tuple[int, str, int]]:
    """Run the whole chain on three ledgers, delivering in a random order and some tensors twice."""
    chance = random.Random(seed)
    ledgers = [RoundLedger([each], microbatches, {each.index: 3 - each.index}, train=train) for each in CHAIN]
    mail = [
        (target, Slot(target, index, ValueName("ids"), False, -1)) for target in (0, 2) for index in range(microbatches)
    ]
    done = []
    while not all(ledger.complete for ledger in ledgers):
        if mail and chance.random() < 0.6:
            target, slot = mail.pop(chance.randrange(len(mail)))
            first = ledgers[target].deliver(slot, TENSOR)
            assert first
            if chance.random() < 0.3:
                assert not ledgers[target].deliver(slot, TENSOR), "a repetition must not count"
            continue
        which = chance.randrange(3)
        task = ledgers[which].take()
        if task is None:
            continue
        done.append((which, task.turn.direction, task.turn.index))
        ledgers[which].finish(task)
        subdag, forward = CHAIN[which], task.turn.direction == "forward"
        for each in subdag.sends if forward else subdag.receives:
            to = each.target if forward else each.source
            mail.append((to, Slot(to, task.turn.index, each.value, not forward, which)))
    assert not mail
    return done


@pytest.mark.parametrize("seed", range(20))
def test_random_orders_complete_with_each_pass_once(seed: int) -> None:
    done = run(5, seed, train=True)
    assert len(done) == len(set(done)) == 3 * 5 * 2
    for which in range(3):
        for direction in ("forward", "backward"):
            assert [i for w, d, i in done if (w, d) == (which, direction)] == list(range(5))


def test_an_evaluation_runs_forward_only() -> None:
    assert all(direction == "forward" for _, direction, _ in run(4, 1, train=False))


def test_gradients_of_one_value_come_last_stage_first() -> None:
    ledger = RoundLedger([CHAIN[0]], 1, {0: 1}, train=True)
    ledger.deliver(Slot(0, 0, ValueName("ids"), False, -1), TENSOR)
    task = ledger.take()
    assert task is not None
    ledger.finish(task)
    from_2, from_1 = TensorData("float32", (), b"2222"), TensorData("float32", (), b"1111")
    ledger.deliver(Slot(0, 0, ValueName("a"), True, 2), from_2)
    assert ledger.take() is None, "stage 1's gradient is still missing"
    ledger.deliver(Slot(0, 0, ValueName("a"), True, 1), from_1)
    task = ledger.take()
    assert task is not None
    assert task.gradients == {"a": (from_2, from_1)}


def test_what_is_not_due_is_refused_by_name() -> None:
    ledger = RoundLedger([CHAIN[1]], 2, {1: 1}, train=True)
    with pytest.raises(ProtocolError, match="microbatch 2"):
        ledger.deliver(Slot(1, 2, ValueName("a"), False, 0), TENSOR)
    with pytest.raises(ProtocolError, match="'nonsense'"):
        ledger.deliver(Slot(1, 0, ValueName("nonsense"), False, 0), TENSOR)


def test_backward_goes_before_forward_and_later_stages_first() -> None:
    ledger = RoundLedger([CHAIN[0], CHAIN[2]], 2, {0: 2, 2: 1}, train=True)
    for index in range(2):
        for target in (0, 2):
            ledger.deliver(Slot(target, index, ValueName("ids"), False, -1), TENSOR)
    ledger.deliver(Slot(2, 0, ValueName("a"), False, 0), TENSOR)
    ledger.deliver(Slot(2, 0, ValueName("b"), False, 1), TENSOR)
    order = []
    for _ in range(3):
        task = ledger.take()
        assert task is not None
        order.append((task.stage, task.turn.direction))
        ledger.finish(task)
    assert order == [(2, "forward"), (2, "backward"), (0, "forward")]
