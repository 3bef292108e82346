"""Start an engine: its weights come to the GPU while Python imports what runs them, each a matter of seconds."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from rayinfer.config import EngineConfig
from rayinfer.models.source import weight_files

if TYPE_CHECKING:
    import torch

    from rayinfer.engine import Engine

NUM_THREADS = 4  # one alone brings 4 GB/s from the page cache


def start_engine(config: EngineConfig) -> Engine:
    """An `Engine`; raises what it raises."""
    with ThreadPoolExecutor(1) as pool:
        weights = pool.submit(_read_weights, config)
        collects = gc.isenabled()
        gc.disable()  # a quarter of the time of these imports, which leave nothing to collect
        try:
            from rayinfer.engine import Engine
        finally:
            if collects:
                gc.enable()
        return Engine(config, weights.result)


def _read_weights(config: EngineConfig) -> dict[str, torch.Tensor]:
    """Tensors by name, on the GPU; none where the model is not to be run there or is loaded in another way.

    What is wrong with a file is for `load_model` to say, which then reads it again.
    """
    import torch
    from safetensors import safe_open

    try:
        files = weight_files(Path(config.model).expanduser())
        if config.load_format != "auto" or config.trust_remote_code or not files or not torch.cuda.is_available():
            return {}
        device = "cuda" if config.device == "auto" else config.device
        # If they are to be of another dtype, both stand side by side for a while.
        if 2 * sum(path.stat().st_size for path in files) > torch.cuda.mem_get_info(device)[0]:
            return {}

        def read(part: int) -> dict[str, torch.Tensor]:
            tensors: dict[str, torch.Tensor] = {}
            for path in files:
                with safe_open(path, "pt", device=device) as file:
                    tensors |= {name: file.get_tensor(name) for name in list(file.keys())[part::NUM_THREADS]}
            return tensors

        with ThreadPoolExecutor(NUM_THREADS) as pool:
            return {name: tensor for part in pool.map(read, range(NUM_THREADS)) for name, tensor in part.items()}
    except Exception:
        return {}
