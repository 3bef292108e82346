"""What this machine has for a run, and what it lacks."""

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version

import torch

import rayinfer
from rayinfer.host import free_memory, num_cores

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
    free, total = map(_gib, free_memory())
    facts += [("cores", str(num_cores())), ("memory", f"{free} GiB free of {total}")]
    if os.path.isdir(_SHM):
        shm = shutil.disk_usage(_SHM)
        facts.append(("shared memory", f"{_gib(shm.free)} GiB free in {_SHM}"))
        if shm.free < _SHM_GIB * 2**30:
            missing.append(f"shared memory: Ray wants more than {_SHM_GIB:.0f} GiB in {_SHM}")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = map(_gib, torch.cuda.mem_get_info(index))
            facts.append((f"GPU {index}", f"{torch.cuda.get_device_name(index)}, {free} GiB free of {total}"))
    else:
        facts.append(("GPU", f"none that torch {torch.__version__} can use; engines run on the CPU"))
    return facts, missing


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f}"
