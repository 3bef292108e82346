"""How many KV blocks fit: measured on a GPU, from free memory on a CPU."""

from __future__ import annotations

import gc

import numpy as np
import torch

from rayinfer.config import EngineConfig
from rayinfer.errors import ConfigError
from rayinfer.host import free_memory
from rayinfer.plan import StepPlan
from rayinfer.runner.runner import Runner
from rayinfer.runner.warmup import warm_up

GIB = 2**30
MAX_DEFAULT_CPU_GIB = 4.0


def is_out_of_memory(error: BaseException) -> bool:
    """Of the GPU's, or of this machine's: CUDA, Triton, cuBLAS, and torch on a CPU, raise plain RuntimeErrors."""
    texts = (": out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(text in str(error) for text in texts)


def num_kv_blocks(config: EngineConfig, runner: Runner, max_num_seqs: int, max_num_batched_tokens: int) -> int:
    """Number of KV blocks to allocate, the reserved one included.

    On a GPU: `gpu_memory_utilization` of the card, less what is in use and what the largest step was seen to need.

    Raises:
        ConfigError: not even one row of two blocks, or no step of the largest size, fits.
    """
    useful = max_num_seqs * -(-runner.max_model_len // config.block_size) + 1
    if config.num_gpu_blocks_override is not None:
        return config.num_gpu_blocks_override
    if runner.device.type == "cuda":
        limit = _gpu_bytes(config, runner, max_num_seqs, max_num_batched_tokens)
    else:
        limit = int(min(free_memory()[0] * 0.25, MAX_DEFAULT_CPU_GIB * GIB))
        if config.cpu_kv_cache_gib is not None:
            limit = int(config.cpu_kv_cache_gib * GIB)
    num_blocks = min(limit // runner.bytes_per_block(), useful)
    if num_blocks < 3:
        name = "gpu_memory_utilization" if runner.device.type == "cuda" else "cpu_kv_cache_gib"
        value = getattr(config, name)
        raise ConfigError(
            f"{name} = {value}: {limit / GIB:.2f} GiB are left for the KV cache and one block of {config.block_size} "
            f"tokens takes {runner.bytes_per_block() / 2**20:.1f} MiB; raise {name}, lower max_num_batched_tokens "
            f"({max_num_batched_tokens}), or take a smaller model"
        )
    return num_blocks


def _gpu_bytes(config: EngineConfig, runner: Runner, max_num_seqs: int, max_num_batched_tokens: int) -> int:
    """Bytes left for KV after trial steps of the largest size, which also compile the kernels."""
    warm_up(config, runner.model.info)  # if that was not done while the weights were read
    runner.allocate(2)
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(runner.device)
    peaks = []
    captured, runner.graphs = runner.graphs, None  # a graph would keep the addresses of the trial's cache
    try:
        for greedy, num_tokens in ((True, max_num_batched_tokens), (False, max_num_seqs)):
            torch.cuda.reset_peak_memory_stats(runner.device)
            runner.launch(_trial_plan(runner, max_num_seqs, num_tokens, greedy)).read()
            peaks.append(torch.cuda.max_memory_allocated(runner.device) - before)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise ConfigError(
            f"max_num_batched_tokens = {max_num_batched_tokens}: a step of so many tokens finds no memory beside the "
            f"weights; lower it or max_num_seqs ({max_num_seqs}), take a smaller model, or a GPU with more memory"
        ) from error
    runner.graphs = captured
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(runner.device)
    # Graphs of decode steps share a pool of their own, which takes the largest one's memory and half as much again.
    graphs = int(peaks[1] * 1.5) if runner.graphs is not None else 0
    return int(total * config.gpu_memory_utilization) - (total - free) - int(max(peaks) * 1.05) - graphs


def _trial_plan(runner: Runner, max_num_seqs: int, num_tokens: int, greedy: bool) -> StepPlan:
    """As many rows as fit, `num_tokens` tokens in all (decodes if that is one each); block 0 stands for all KV."""
    num_rows = min(max_num_seqs, num_tokens)
    each = np.full(num_rows, num_tokens // num_rows, np.int32)
    each[0] += num_tokens - each.sum()
    each = np.minimum(each, runner.max_model_len)
    num_decodes = num_rows if num_tokens == num_rows else 0
    rows = np.arange(num_rows, dtype=np.int32)
    return StepPlan(
        slots=rows, starts=np.zeros(num_rows, np.int32), num_new=each, num_decodes=num_decodes,
        token_ids=np.zeros(int(each.sum()), np.int32), samples=rows, new_blocks=np.zeros((0, 3), np.int32),
        new_rows=[(int(slot), 1.0, 0, 1.0, 0.0, 0) for slot in rows], all_greedy=greedy,
        banned=np.zeros((0, 2), np.int32), shared_lens=np.zeros(num_decodes, np.int32),
    )  # fmt: skip
