"""What must hold before any test module is imported."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    # Triton reads this when it is itself imported (transformers imports it too), so it cannot wait for tests/kernels.
    os.environ["TRITON_INTERPRET"] = "1"
