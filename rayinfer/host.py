"""What of the machine this process may use: in a container less than there is, by its limits (cgroup v2)."""

import os
import re
from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")


def num_cores() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = _numbers("cpu.max")  # microseconds, of a period of so many
    return cores if len(limit) < 2 else max(1, min(cores, limit[0] // limit[1]))


def free_memory() -> tuple[int, int]:
    """Bytes that are free, files' cached pages among them, and bytes in all."""
    memory, cached = psutil.virtual_memory(), _numbers("memory.stat", r"(?m)^(?:in)?active_file (\d+)")
    (limit,) = _numbers("memory.max") or [memory.total]
    used = sum(_numbers("memory.current")) - sum(cached)
    return min(memory.available, limit - used), min(memory.total, limit)


def _numbers(name: str, pattern: str = r"\d+") -> list[int]:
    """Those in a file; none if it is not there. "max", which is no limit, is none either."""
    path = CGROUP / name
    return [int(number) for number in re.findall(pattern, path.read_text())] if path.is_file() else []
