"""What must hold before any test module is imported, and the one Ray of a test process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads this when it is itself imported (transformers imports it too), so it cannot wait for tests/kernels.
    os.environ["TRITON_INTERPRET"] = "1"


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
