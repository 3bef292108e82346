"""What must hold before any test module is imported, and the one Ray of a test process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads this when it is itself imported (transformers imports it too), so it cannot wait for tests/kernels.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def dot_by_rows(monkeypatch):
    """Have the interpreter multiply row by row: BLAS, which it uses, gives a row other last bits at another place of a
    tile on some CPUs. Tensor cores do not, and what is tested is the kernel's own order of sums."""
    if torch.cuda.is_available():
        return
    import numpy as np
    from triton.runtime import interpreter

    class ByRows:
        def __getattr__(self, name):
            return getattr(np, name)

        def matmul(self, a_MI, b_IO, dtype):
            return np.concatenate([np.matmul(a_MI[i : i + 1], b_IO, dtype=dtype) for i in range(len(a_MI))])

    monkeypatch.setattr(interpreter, "np", ByRows())


@pytest.fixture(scope="session")
def local_ray():
    """A Ray of this test run's own, never one that happens to run on the machine; a process can have one alone."""
    import ray

    path = os.pathsep.join([str(Path(__file__).resolve().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    ray.init(
        address="local",
        include_dashboard=False,
        num_cpus=3,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}},
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield ray
    ray.shutdown()
