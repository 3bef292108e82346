"""What this machine has for a run, and what it lacks."""

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version

import psutil
import torch

import rayinfer

_NEEDED = ("torch", "transformers", "ray", "pyarrow", "fsspec", "pydantic")
_WANTED = {"triton": "GPU kernels: pip install 'rayinfer[gpu]'", "gguf": ".gguf models: pip install 'rayinfer[gguf]'"}
_SHM = "/dev/shm"
_SHM_GIB = 1.0  # Ray keeps blocks there; under this it falls back to disk and says so


def examine() -> tuple[list[tuple[str, str]], list[str]]:
    """Return (name, value) facts and what is missing, one line each."""
    facts = [("rayinfer", rayinfer.__version__), ("python", platform.python_version())]
    missing = []
    for name in (*_NEEDED, *_WANTED):
        try:
            facts.append((name, version(name)))
        except PackageNotFoundError:
            facts.append((name, "not installed"))
            missing.append(f"{name}, for {_WANTED[name]}" if name in _WANTED else name)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = psutil.virtual_memory()
    facts += [("cores", str(cores)), ("memory", f"{_gib(memory.available)} GiB free of {_gib(memory.total)}")]
    if os.path.isdir(_SHM):
        shm = shutil.disk_usage(_SHM)
        facts.append(("shared memory", f"{_gib(shm.free)} GiB free in {_SHM}"))
        if shm.free < _SHM_GIB * 2**30:
            missing.append(f"shared memory: Ray wants more than {_SHM_GIB:.0f} GiB in {_SHM}")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            name = torch.cuda.get_device_name(index)
            facts.append((f"GPU {index}", f"{name}, {_gib(free)} GiB free of {_gib(total)}"))
    else:
        facts.append(("GPU", f"none that torch {torch.__version__} can use; engines run on the CPU"))
    return facts, missing


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f}"
