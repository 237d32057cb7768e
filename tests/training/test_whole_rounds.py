"""Whole jobs on scripted machines give the bits of one program for each machine, called in a plain loop."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_pool import ScriptedPool
from toy_pipelines import OWNER, Layer, Pipeline, Reference, batch, chain, three_machines

from fusionai.network.clock import run_scripted
from fusionai.network.lab import EmulatedLink, LabConfig
from fusionai.pool.identifiers import Epoch
from fusionai.training.handing_over import hand_over


def test_two_steps_of_three_machines_equal_the_reference_in_no_time() -> None:
    async def main() -> None:
        pipeline, reference = three_machines(), Reference(three_machines())
        async with ScriptedPool(OWNER, "a", "b", "c") as pool:
            driver = await pool.launch(pipeline)
            for step in range(2):
                [result] = await pool.train(driver, 1, first=step)
                assert result.loss == reference.train_step(batch(step, 2), [0.5, 0.5], 0.125)
                assert result.gradient_norm > 0
                assert set(result.reports) == {machine.peer for machine in driver.machines}
            assert await pool.tensors(driver) == reference.tensors()
            evaluated = await driver.evaluate(batch(9, 3), [0.25, 0.25, 0.5])
            assert evaluated.loss == reference.evaluate(batch(9, 3), [0.25, 0.25, 0.5])
            assert await pool.tensors(driver) == reference.tensors(), "an evaluation changes nothing"
            await driver.close("done")
            await pool.until(lambda: not pool.holding(), within_s=1)
            assert all(machine.ended == ["done"] for name, machine in pool.machines.items() if name != OWNER)

    began_s = time.process_time()
    run_scripted(main())
    print(time.process_time() - began_s)
