"""Every kernel compiles ahead of time, for one NVIDIA and one AMD target, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "aot.py"
KERNELS = {
    "_act_mul_kernel",
    "_decode_kernel",
    "_greedy_kernel",
    "_matmul_kernel",
    "_prefill_kernel",
    "_prefix_kernel",
    "_qk_norm_rope_write_kernel",
    "_rms_norm_kernel",
    "_sample_kernel",
    "_write_kv_kernel",
    "merge_kernel",
}


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cuda", "hip"])
def test_kernels_compile(target, tmp_path):
    """A subprocess, because the interpreter may be on in this process; the table it prints is in the test's output."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    # A fresh cache: what is compiled is what the sources say now.
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    figures = tmp_path / "aot.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--target", target, "--json", str(figures)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    records = json.loads(figures.read_text())[target]
    assert {r["kernel"] for r in records} == KERNELS | ({"_hopper_prefill_kernel"} if target == "cuda" else set())
    assert all(0 < r["registers"] <= 512 and r["shared"] <= 227 * 1024 for r in records)
