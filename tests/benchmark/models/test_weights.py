"""Weights as files: what is not a number is named."""

from __future__ import annotations

import pytest
import torch

from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.models.weights import finite


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_weight_that_is_no_number_is_named(value: float, dtype: torch.dtype) -> None:
    state = {"a": torch.ones(3, dtype=dtype), "ids": torch.arange(2), "b": torch.ones(2, 2, dtype=dtype)}
    finite(state, "x.safetensors")
    state["b"][1, 0] = value
    with pytest.raises(UserError, match=r"^x\.safetensors: its weight b holds NaN or infinity; save or download"):
        finite(state, "x.safetensors")
