"""Compile the kernels of a step side by side, so that no step of a job waits for a compiler."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from rayinfer.attention import LayerCache, LayerSpec, StepMeta, get_backend
from rayinfer.config import EngineConfig
from rayinfer.groups import MAX_NUM_GROUPS
from rayinfer.models.load import resolve_device
from rayinfer.models.model import ModelInfo
from rayinfer.sampler import get_sampler

LONG_CHUNK = 2048  # prompt chunks, and rows, of this many tokens have tiles of their own
MANY_ROWS = 129  # that decode have a program of their own


def warm_up(config: EngineConfig, info: ModelInfo) -> None:
    """Call each variant of the attention and sampling kernels once, on rows of one token each, from threads.

    Raises:
        ConfigError: a backend cannot compute a layer.
    """
    device, calls = resolve_device(config), list[Callable[[], object]]()
    names = config.prefill_backend, config.decode_backend
    prefill, decode = (get_backend(name, device, config.deterministic) for name in names)
    for spec in {replace(spec, layer=0): None for spec in info.specs}:
        for backend in (prefill, decode):
            backend.check(spec, info.dtype, config.block_size)
        cache = decode.allocate(spec, 2, config.block_size, info.dtype, device)
        one = _meta(device, 2, num_decodes=0)
        wide_RP = one.block_table_RP.repeat(1, -(-LONG_CHUNK // config.block_size))
        long = replace(one, max_query_len=LONG_CHUNK, block_table_RP=wide_RP)
        calls += [partial(_attend, prefill.prefill, spec, cache, meta) for meta in (one, long)]
        start_G1 = torch.zeros(MAX_NUM_GROUPS + 1, dtype=torch.int32, device=device)
        for num in {2, min(MANY_ROWS, config.max_num_seqs or MANY_ROWS)}:
            rows = _meta(device, num, num_decodes=num)
            calls += [partial(_attend, decode.decode, spec, cache, rows)]
            if spec.sliding_window is None:
                groups: Any = {"group_start_G1": start_G1, "group_len_G": start_G1[1:], "shared_len_B": start_G1[:num]}
                calls += [partial(_attend, decode.decode, spec, cache, replace(rows, **groups))]
    sampler, zeros = get_sampler(device), torch.zeros(4, 2, device=device)
    logits = torch.zeros(2, info.vocab_size, dtype=info.dtype, device=device)
    seeds = torch.zeros(2, dtype=torch.int64, device=device)
    calls += [partial(sampler.sample, logits, zeros[0], zeros[1].int(), *zeros[2:], seeds, seeds)]
    calls += [partial(sampler.greedy, logits)]
    # Each thread has a current GPU of its own.
    with ThreadPoolExecutor(len(calls), initializer=torch.cuda.set_device, initargs=(zeros.device,)) as pool:
        for future in [pool.submit(call) for call in calls]:
            future.result()


def _meta(device: torch.device, num_rows: int, num_decodes: int) -> StepMeta:
    count = torch.arange(num_rows + 1, dtype=torch.int32, device=device)
    ones = torch.ones_like(count[1:])
    return StepMeta(
        positions_T=(ones - 1).long(), slot_mapping_T=-ones.long(), block_table_RP=ones[:, None], seq_lens_R=ones,
        query_start_R1=count, num_decodes=num_decodes, max_seq_len=1, max_query_len=1,
    )  # fmt: skip


def _attend(method: Callable[..., None], spec: LayerSpec, cache: LayerCache, meta: StepMeta) -> None:
    q_THD = cache.k_NSKD.new_zeros(len(meta.seq_lens_R), spec.num_heads, spec.head_dim)
    method(q_THD, cache, spec, meta, torch.empty_like(q_THD))
