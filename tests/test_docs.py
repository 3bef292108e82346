"""What is made from the code is as the code is."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import job_reference


def test_the_reference_of_a_job_is_up_to_date():
    assert job_reference.PATH.read_text(encoding="utf-8") == job_reference.reference(), "run tools/job_reference.py"
