"""Kernel tests run by Triton's interpreter where there is no GPU, and for real, in more dtypes, where there is one.

`tests/conftest.py` turns the interpreter on, before anything can import Triton.
"""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(
    params=[
        torch.float32,
        torch.float16,
        # The interpreter's bfloat16 arithmetic is wrong, so that dtype is for a GPU alone.
        pytest.param(torch.bfloat16, marks=pytest.mark.gpu),
    ],
    ids=["fp32", "fp16", "bf16"],
)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    if request.param is torch.bfloat16 and not torch.cuda.is_available():
        pytest.skip("bfloat16 needs a GPU")
    return request.param


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
