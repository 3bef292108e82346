"""Faults from inside the processes of a job, with no hook in its code.

A copy of this file, named sitecustomize.py, lies in a folder that is first on PYTHONPATH; so every Python process of
the job (driver, worker, engine) imports it as it starts. It wraps a few functions when their modules are imported, and
each wrapped call asks `plan.json` beside the copy what is to happen at this seam:

    [{"seam": "store.before", "role": "worker", "at": [3], "do": "kill", "poison": null, "seconds": 0}]

Passages of a seam are counted over all processes, in files, so a fault strikes at the third one and at no other. `at`
may be "all". A seam's name is `step`, `forward` or `store.before|torn|after` or `bucket.before|after`; a plan may name
the first part alone.
"""

from __future__ import annotations

import builtins
import errno
import importlib.abc
import importlib.machinery
import json
import os
import signal
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
FOREVER = 3600.0
driver = False  # set in the processes that run a command


def role() -> str:
    if driver:
        return "driver"
    return "worker" if any("default_worker.py" in arg for arg in sys.orig_argv) else "engine"


def due(seam: str, holds=None):
    """The faults that strike at this passage of the seam."""
    try:
        with builtins.open(f"{HERE}/plan.json") as file:
            plan = json.load(file)
    except (FileNotFoundError, ValueError):
        return []
    found = []
    for number, fault in enumerate(plan):
        if fault["seam"] not in (seam, seam.partition(".")[0]) or fault.get("role", role()) != role():
            continue
        if fault.get("poison") is not None and (holds is None or not holds(fault["poison"])):
            continue
        file = os.open(f"{HERE}/passed-{number}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            os.write(file, b".")
            passage = os.lseek(file, 0, os.SEEK_CUR)
        finally:
            os.close(file)
        if fault["at"] == "all" or passage in fault["at"]:
            with builtins.open(f"{HERE}/struck-{number}", "a") as struck:
                struck.write(f"{seam} {role()} {os.getpid()}\n")
            found.append(fault)
    return found


def strike(seam: str, holds=None) -> None:
    for fault in due(seam, holds):
        act(fault)


def act(fault) -> None:
    do = fault["do"]
    if do == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif do == "kill-actor":  # the Ray worker that this engine is in, or that started it
        os.kill(os.getpid() if role() == "worker" else os.getppid(), signal.SIGKILL)
    elif do == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif do == "segv":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif do == "exit":
        os._exit(1)
    elif do == "sleep":
        time.sleep(fault["seconds"])
    elif do == "out-of-memory":
        import torch

        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB (injected)")
    elif do == "cuda":
        raise RuntimeError("CUDA error: an illegal memory access was encountered (injected)")
    else:  # the name of an errno
        raise OSError(getattr(errno, do), f"{os.strerror(getattr(errno, do))} (injected)")


def patch_runner(module) -> None:
    launch, begin = module.Runner.launch, module.Runner.__init__

    def init(self, *args, **kwargs):
        os.makedirs(f"{HERE}/engines", exist_ok=True)
        with builtins.open(f"{HERE}/engines/{os.getpid()}", "w"):
            pass
        begin(self, *args, **kwargs)

    def wrapped(self, plan):
        strike("step", lambda text: ends_of(tokens_of(text), plan.token_ids))
        return launch(self, plan)

    module.Runner.__init__, module.Runner.launch = init, wrapped


def patch_model(module) -> None:
    forward = module.Model.forward

    def wrapped(self, ids_T, meta, index_L=None):
        logits = forward(self, ids_T, meta, index_L)
        for fault in due("forward", lambda text: ends_of(tokens_of(text), ids_T)):
            ends = ends_of(tokens_of(fault["poison"]), ids_T)
            hit = [row for row, index in enumerate(index_L.tolist()) if index in ends]  # its prompt's last token
            logits = logits.clone()
            logits[hit] = float("nan")
        return logits

    module.Model.forward = wrapped


def tokens_of(text: str) -> list[int]:
    """A word of ASCII letters as the tiny model's tokenizer has it: one id a byte."""
    with builtins.open(f"{HERE}/letters.json") as file:
        letters = json.load(file)
    return [letters[letter] for letter in text]


def ends_of(word: list[int], ids) -> set[int]:
    """Where the word ends in the ids."""
    ids = ids.tolist()
    size = len(word)
    return {i + size - 1 for i in range(len(ids) - size + 1) if ids[i : i + size] == word}


def patch_store(module) -> None:
    place = module.LocalStore._place

    class Torn:
        """A file that is being written, with a seam in the middle of the write."""

        def __init__(self, path):
            self.file = builtins.open(path, "wb")  # noqa: SIM115  # closed by __exit__

        def __enter__(self):
            return self

        def __exit__(self, *exc):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            self.file.write(data[: len(data) // 2])
            self.file.flush()
            strike("store.torn")
            self.file.write(data[len(data) // 2 :])

    def wrapped(self, name, data, move):
        strike("store.before")
        place(self, name, data, move)
        strike("store.after")

    def opened(path, mode):
        return Torn(path) if mode == "wb" else builtins.open(path, mode)

    module.open = opened
    module.LocalStore._place = wrapped


def patch_registry(module) -> None:
    module.register_implementation("s3", "benchmarks.fault_bucket.DiskBucket", clobber=True)


PATCHES = {
    "rayinfer.runner.runner": patch_runner,
    "rayinfer.models.model": patch_model,
    "rayinfer.pipelines.store": patch_store,
    "fsspec.registry": patch_registry,
}


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name not in PATCHES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            PATCHES[name](module)

        spec.loader.exec_module = exec_module
        return spec


if __name__ == "sitecustomize":
    sys.meta_path.insert(0, Finder())
