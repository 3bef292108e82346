"""A tiny random-weight Llama whose tokens are single bytes, a table, and one local Ray for the tests of this folder."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from benchmarks.tiny_llama import save_tiny_llama

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tiny_llama")
    save_tiny_llama(folder)
    return str(folder)


@pytest.fixture
def job(model_path: str, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """job(source, **parts) -> a small job over `source`, writing to tmp_path/out; `parts` replace its own."""

    def make(source: Any, **parts: Any) -> dict[str, Any]:
        engine = {"max_model_len": 128, "max_num_seqs": 8, "cpu_kv_cache_gib": 0.01, "num_threads": 1}
        return {
            "source": source if isinstance(source, dict) else {"uri": str(source)},
            "prompt": "Say: {{ text }}",
            "model": {"model_source": model_path, **engine},
            "sampling": {"temperature": 0, "max_tokens": 4},
            "sink": {"uri": str(tmp_path / "out")},
            **parts,
        }

    return make


@pytest.fixture
def table() -> pa.Table:
    """Rows with the types that get lost on the way when nobody looks: nulls, 64-bit integers, nested values."""
    return pa.table(
        {
            "id": pa.array([2**53 + i for i in range(12)], pa.int64()),
            "text": [f'line "{i}",\nwith ünïcode' for i in range(12)],
            "score": pa.array([None if i % 5 == 0 else i / 4 for i in range(12)], pa.float64()),
            "count": pa.array([None if i % 3 == 0 else i for i in range(12)], pa.int64()),
        }
    )


@pytest.fixture
def cli() -> Callable[..., subprocess.Popen[str]]:
    """cli(*args) starts the command line in a process of its own, its output captured."""
    started = []

    def start(*args: Any, **kwargs: Any) -> subprocess.Popen[str]:
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
        command = [sys.executable, "-m", "rayinfer.pipelines.cli", *map(str, args)]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=env, **kwargs)
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()
