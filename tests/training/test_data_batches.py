"""A user's function as a job's data: any torch tensor or numpy array becomes plain data, anything else is named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from fusionai.errors import DataError
from fusionai.tensor import ITEM_BYTES, TensorData
from fusionai.training.data.batches import TensorBatches, tensor_data

NUMPY_DTYPES = sorted(ITEM_BYTES.keys() - {"bfloat16"})


@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
def test_every_dtype_from_numpy_and_torch(dtype: str) -> None:
    values = np.arange(12).reshape(3, 4).astype(dtype)
    expected = TensorData(dtype, (3, 4), values.tobytes())  # type: ignore[arg-type]
    assert tensor_data(values, "x") == expected
    assert tensor_data(torch.from_numpy(values.copy()), "x") == expected
    assert tensor_data(values.astype(values.dtype.newbyteorder(">")), "x") == expected


def test_strides_scalars_and_gradients() -> None:
    values = torch.arange(12.0).reshape(3, 4)
    assert tensor_data(values.T, "x").data == values.T.contiguous().numpy().tobytes()
    assert tensor_data(np.asfortranarray(values.numpy()), "x").data == values.numpy().tobytes()
    assert tensor_data(np.float32(3), "x") == TensorData("float32", (), np.float32(3).tobytes())
    assert tensor_data(torch.nn.Parameter(values), "x").shape == (3, 4)
    assert tensor_data(np.zeros((0, 3), "int64"), "x") == TensorData("int64", (0, 3), b"")


def test_a_buffer_that_the_function_fills_again_is_copied() -> None:
    buffer = np.zeros(2, dtype=np.int64)

    def fill(step: int, index: int) -> Mapping[str, Any]:
        buffer[:] = step, index
        return {"x": buffer}

    data = TensorBatches(fill)
    first, second = data.microbatch(1, 2), data.microbatch(3, 4)
    assert np.frombuffer(first["x"].data, "int64").tolist() == [1, 2]
    assert np.frombuffer(second["x"].data, "int64").tolist() == [3, 4]
    assert data.heldout() == []


def test_heldout_microbatches() -> None:
    data = TensorBatches(lambda step, index: {}, heldout=[{"x": torch.ones(2)}, {"x": torch.zeros(2)}])
    assert [batch["x"].dtype for batch in data.heldout()] == ["float32", "float32"]


def test_inputs_that_the_model_was_captured_without_are_refused() -> None:
    first = {"x": torch.ones(2)}
    data = TensorBatches(
        lambda step, index: {**first, "mask": torch.ones(2)} if step else first,
        [{**first, "y": first["x"]}],
        names=first,
    )
    assert data.microbatch(0, 3).keys() == {"x"}
    with pytest.raises(DataError, match="microbatch 0 of step 2 has the input 'mask', which microbatch 0 of step 0"):
        data.microbatch(2, 0)
    with pytest.raises(DataError, match="held-out microbatch 0 has the input 'y'"):
        data.heldout()


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "microbatch 1 of step 7 must be a dictionary.*NoneType"),
        ([np.zeros(1)], "must be a dictionary.*list"),
        ({}, "an empty dictionary"),
        ({"x": [1, 2]}, "input 'x' of microbatch 1 of step 7 must be a torch tensor or a numpy array, got list"),
        ({"x": np.zeros(1, "complex64")}, "input 'x'.*dtype complex64"),
        ({"x": np.array(["a"])}, "dtype str"),
        ({"x": np.array([object()])}, "dtype object"),
        ({"x": torch.zeros(1, dtype=torch.bfloat16)}, "input 'x'.*bfloat16 tensor cannot be read"),
        ({"x": torch.zeros(1, device="meta")}, "input 'x'.*cannot be read"),
    ],
)
def test_errors_name_the_input(returned: object, message: str) -> None:
    data = TensorBatches(lambda step, index: returned)  # type: ignore[arg-type, return-value]
    with pytest.raises(DataError, match=message):
        data.microbatch(7, 1)
