"""Compile the kernels of a step side by side, so that no step of a job waits for a compiler."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from rayinfer.attention import LayerCache, LayerSpec, StepMeta
from rayinfer.groups import MAX_NUM_GROUPS

if TYPE_CHECKING:
    from rayinfer.runner.runner import Runner

LONG_CHUNK = 2048  # prompt chunks, and rows, of this many tokens have tiles of their own
MANY_ROWS = 129  # that decode have a program of their own


def warm_up(runner: Runner) -> None:
    """Call each variant of the attention and sampling kernels once, on rows of one token each, from threads."""
    calls: list[Callable[[], object]] = []
    for spec in {replace(spec, layer=0): None for spec in runner.model.specs}:
        cache = runner.decode.allocate(spec, 2, runner.block_size, runner.model.dtype, runner.device)
        one = _meta(runner, 2, num_decodes=0)
        calls += [partial(_attend, runner.prefill.prefill, spec, cache, one)]
        wide_RP = one.block_table_RP.repeat(1, -(-LONG_CHUNK // runner.block_size))
        long = replace(one, max_query_len=LONG_CHUNK, block_table_RP=wide_RP)
        calls += [partial(_attend, runner.prefill.prefill, spec, cache, long)]
        start_G1 = torch.zeros(MAX_NUM_GROUPS + 1, dtype=torch.int32, device=runner.device)
        for num in {2, min(MANY_ROWS, runner.padding_slot)}:
            decode = _meta(runner, num, num_decodes=num)
            calls += [partial(_attend, runner.decode.decode, spec, cache, decode)]
            if spec.sliding_window is None:
                groups: Any = {"group_start_G1": start_G1, "group_len_G": start_G1[1:], "shared_len_B": start_G1[:num]}
                calls += [partial(_attend, runner.decode.decode, spec, cache, replace(decode, **groups))]
    zeros = torch.zeros(4, 2, device=runner.device)
    logits = torch.zeros(2, runner.model.info.vocab_size, dtype=runner.model.dtype, device=runner.device)
    seeds = torch.zeros(2, dtype=torch.int64, device=runner.device)
    calls += [partial(runner.sampler.sample, logits, zeros[0], zeros[1].int(), *zeros[2:], seeds, seeds)]
    calls += [partial(runner.sampler.greedy, logits)]
    # Each thread has a current GPU of its own.
    with ThreadPoolExecutor(len(calls), initializer=torch.cuda.set_device, initargs=(runner.device,)) as pool:
        for future in [pool.submit(call) for call in calls]:
            future.result()


def _meta(runner: Runner, num_rows: int, num_decodes: int) -> StepMeta:
    count = torch.arange(num_rows + 1, dtype=torch.int32, device=runner.device)
    ones = torch.ones_like(count[1:])
    return StepMeta(
        positions_T=(ones - 1).long(), slot_mapping_T=-ones.long(), block_table_RP=ones[:, None], seq_lens_R=ones,
        query_start_R1=count, num_decodes=num_decodes, max_seq_len=1, max_query_len=1,
    )  # fmt: skip


def _attend(method: Callable[..., None], spec: LayerSpec, cache: LayerCache, meta: StepMeta) -> None:
    q_THD = cache.k_NSKD.new_zeros(len(meta.seq_lens_R), spec.num_heads, spec.head_dim)
    method(q_THD, cache, spec, meta, torch.empty_like(q_THD))
