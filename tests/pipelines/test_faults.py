"""A small part of `python -m benchmarks.faults`: real jobs under faults, every row looked for by key and text.

The rest is not for CI: 28 kinds with 5 seeds each are 140 runs, most of them of a job with an engine of its own, 10 s
each on an idle machine, and some of a cluster; benchmarks/results/faults.md has them. The faults of storage and of the
commit's seams have 25 seeds each in test_commit.py, simulated; the engine's own are in tests/engine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NO_ENGINE = ["rerun after success", "changed prompt", "changed model", "changed sampling"]  # 5 seeds each
JOBS = ["driver killed at a seam of the commit:0", "two drivers:0"]  # one seed of each


def test_jobs_under_faults(tmp_path, local_ray):
    records = tmp_path / "runs.jsonl"
    command = [sys.executable, "-m", "benchmarks.faults", "--address", local_ray.get_runtime_context().gcs_address]
    command += ["--kinds", ",".join([*NO_ENGINE, *JOBS]), "--seeds", "5", "--records", str(records)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=1500)
    runs = [json.loads(line) for line in records.read_text().splitlines()] if records.exists() else []
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(runs) == 5 * len(NO_ENGINE) + len(JOBS)
    assert {(run["lost"], run["doubled"], run["altered"], run["wrong"]) for run in runs} == {(0, 0, 0, "")}
