"""Start an engine: its weights come to the GPU while Python imports what runs them, and kernels are compiled."""

from __future__ import annotations

import gc
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rayinfer.config import EngineConfig
from rayinfer.models.source import weight_files

if TYPE_CHECKING:
    import torch

    from rayinfer.engine import Engine
    from rayinfer.models.model import ModelInfo

NUM_THREADS = 4
PIECE = 2**26  # bytes that a thread reads at once
_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


def start_engine(config: EngineConfig) -> Engine:
    """An `Engine`; raises what it raises."""
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        weights = pool.submit(_read_weights, config, stop)
        try:
            collects = gc.isenabled()
            gc.disable()  # a quarter of the time of these imports, which leave nothing to collect
            try:
                from rayinfer.engine import Engine
                from rayinfer.runner.warmup import warm_up
            finally:
                if collects:
                    gc.enable()

            def ready(info: ModelInfo) -> dict[str, torch.Tensor]:
                if not weights.done() and info.specs:
                    warm_up(config, info)
                return weights.result()

            engine = Engine(config, ready)
        finally:
            stop.set()  # after Ctrl-C, or if the model is refused, nobody waits for what is left to read
        gc.freeze()  # modules and weights stay; to look through them again and again would hold up steps
        return engine


def _read_weights(config: EngineConfig, stop: threading.Event) -> dict[str, torch.Tensor]:
    """Tensors by name, on the GPU; none where the model is not to be run there or is loaded in another way.

    What is wrong with a file is for `load_model` to say, which then reads it again.
    """
    import torch

    try:
        files = weight_files(Path(config.model).expanduser())
        if config.load_format != "auto" or config.trust_remote_code or not files or not torch.cuda.is_available():
            return {}
        device = torch.device("cuda" if config.device == "auto" else config.device)
        # If they are to be of another dtype, both stand side by side for a while.
        if 2 * sum(path.stat().st_size for path in files) > torch.cuda.mem_get_info(device)[0]:
            return {}
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            parts = pool.map(partial(_read_part, files, device, stop), range(NUM_THREADS))
            return {name: tensor for part in parts for name, tensor in part.items()}
    except Exception:
        return {}


def _read_part(files: list[Path], device: torch.device, stop: threading.Event, part: int) -> dict[str, torch.Tensor]:
    """Every NUM_THREADS-th tensor of safetensors files (https://huggingface.co/docs/safetensors, "Format").

    Read and not mapped: millions of page faults would hold up the thread that imports.
    """
    import torch

    tensors: dict[str, torch.Tensor] = {}
    buffer = torch.empty(PIECE, dtype=torch.uint8, pin_memory=device.type == "cuda")
    for path in files:
        with path.open("rb", buffering=0) as file:
            header_size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(header_size))
            header.pop("__metadata__", None)
            for name in list(header)[part::NUM_THREADS]:
                first, end = header[name]["data_offsets"]
                whole = torch.empty(end - first, dtype=torch.uint8, device=device)
                file.seek(8 + header_size + first)
                for piece in whole.split(PIECE):
                    if stop.is_set() or file.readinto(buffer.numpy()[: len(piece)].data) != len(piece):
                        raise InterruptedError
                    piece.copy_(buffer[: len(piece)])
                dtype = getattr(torch, _DTYPES[header[name]["dtype"]])
                tensors[name] = whole.view(dtype).view(header[name]["shape"])
    return tensors
