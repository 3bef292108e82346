"""CUDA graphs of whole steps, from block table to sampled token: decodes, and small steps with prompts.

A graph is fixed in shape only: it reads the rows' slots, lengths and prefix groups from a static buffer and everything
else from the runner's persistent state, so one graph serves every mix of rows. Batches are padded to the next size.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from rayinfer.groups import MAX_NUM_GROUPS
from rayinfer.plan import StepPlan

if TYPE_CHECKING:
    from rayinfer.runner.runner import Runner

# Rows of a graph. The time of cuBLAS' products is no monotonous function of them: of a layer of the 8B's 263 us at 408
# rows, 420 at 448, 293 at 456. These lose 1 % on average to the best larger number, and multiples of 16 to 64 lose 6
# (benchmarks/NOTES.md).
SIZES = (1, 2, 4, *range(8, 65, 8), 88, 104, 128, 136, 152, 184, 200, 216, 248, 256, 280, 312, 344, 384, 408, 432, 488)
SIZES += (512, 568, 632, 696, 760, 824, 888, 952, 1024)

# Tokens of steps with prompts that are replayed, each prompt token as a decode row: launched kernel by kernel, they
# take the host 14 to 23 ms. And bytes of KV that their tokens may read for that, which a kernel for prompts reads once.
MIN_MIXED, MAX_MIXED = 128, 512
MAX_READ = 2**36


@dataclass(slots=True)
class Inputs:
    """Device views of a plan's packed integers; R rows, T tokens. `starts_R` is -1 for padding rows."""

    slots_R: torch.Tensor
    starts_R: torch.Tensor
    num_new_R: torch.Tensor
    query_start_R1: torch.Tensor
    token_ids_T: torch.Tensor
    row_T: torch.Tensor


class _Kind(NamedTuple):
    """Whether a graph ends with logits instead of tokens, and whether it has prefix groups."""

    logits: bool
    groups: bool


@dataclass(slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    packed: torch.Tensor  # int32: slots, starts, token ids, slots of the tokens, shared lengths of B rows; then groups
    out: torch.Tensor  # token ids [B], or logits [B, V]


class DecodeGraphs:
    """Graphs by padded batch size and kind; all share one memory pool and one stream."""

    def __init__(self, runner: Runner, max_num_seqs: int):
        self._runner = runner
        self._sizes = sorted({min(n, max_num_seqs) for n in (*SIZES, *range(1080, max_num_seqs, 64), max_num_seqs)})
        self._max_reads = MAX_READ * runner.block_size // runner.bytes_per_block()  # KV tokens
        self._captured: dict[tuple[int, _Kind], _Captured] = {}
        self._warm: set[tuple[_Kind, int]] = set()
        # Constants that every graph reads, so they live as long as the graphs.
        self._count = torch.arange(max_num_seqs + 1, dtype=torch.int32, device=runner.device)
        self._ones = torch.ones(max_num_seqs, dtype=torch.int32, device=runner.device)
        self._logits: torch.Tensor | None = None  # of all graphs that end with them: each would keep its own
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def takes(self, plan: StepPlan) -> bool:
        """Whether the step is to be replayed, as decodes."""
        reads = (plan.num_new * (plan.starts + plan.num_new))[plan.num_decodes :].sum()
        is_small = len(plan.token_ids) <= min(MAX_MIXED, self._sizes[-1]) and reads <= self._max_reads
        return not len(plan.prompt_targets) and (is_small or plan.num_decodes == len(plan.slots))

    def mixed(self) -> tuple[list[int], int]:
        """Tokens of steps with prompts that are replayed without padding, and KV tokens that these may read."""
        most = min(MAX_MIXED, self._sizes[-1] // 2)  # with more, rows wait for slots, and the slots for prompts
        return [size for size in self._sizes if MIN_MIXED <= size <= most], self._max_reads

    def run(self, plan: StepPlan) -> torch.Tensor:
        """Replay a step of decodes; returns token ids [R], or logits [R, V] if `plan.needs_logits`."""
        num_rows = len(plan.slots)
        size, kind = self._sizes[bisect_left(self._sizes, num_rows)], _Kind(plan.needs_logits, len(plan.group_lens) > 0)
        entry = self._captured.get((size, kind)) or self._capture(size, kind)
        host = np.zeros(entry.packed.shape, np.int32)
        rows, padding = host[: 5 * size].reshape(5, size), self._runner.padding_slot
        rows[:, num_rows:] = [[padding], [-1], [0], [padding], [0]]
        is_last = np.append(plan.slots[1:] != plan.slots[:-1], True)  # of its slot's rows: yields its next input
        rows[:4, :num_rows] = plan.slots, plan.starts, plan.token_ids, np.where(is_last, plan.slots, padding)
        if kind.groups:
            rows[4, :num_rows] = plan.shared_lens
            host[5 * size :] = np.concatenate(self._runner.padded_groups(plan))
        entry.packed.copy_(torch.from_numpy(host).pin_memory(), non_blocking=True)
        entry.graph.replay()
        return entry.out[:num_rows]

    def capture_all(self) -> None:
        """Capture the usual kind for all sizes, the largest first, whose memory then serves the others: about a second.

        The others, for log-probabilities or with prefix groups, are captured when they are met.
        """
        for size in reversed(self._sizes):
            self._capture(size, _Kind(logits=False, groups=False))

    def _capture(self, size: int, kind: _Kind) -> _Captured:
        runner = self._runner
        num_groups = MAX_NUM_GROUPS if kind.groups else 0
        packed = torch.zeros(5 * size + 2 * num_groups + kind.groups, dtype=torch.int32, device=runner.device)
        slots, starts, ids, into, shared = packed[: 5 * size].view(5, size)
        slots.fill_(runner.padding_slot)
        into.fill_(runner.padding_slot)
        starts.fill_(-1)  # padding rows only: a warm-up writes no KV
        starts_G1, lens_G = packed[5 * size :].tensor_split([num_groups + kind.groups])

        def step() -> torch.Tensor:
            inputs = Inputs(slots, starts, self._ones[:size], self._count[: size + 1], ids, self._count[:size])
            ids_T, meta = runner.prepare(inputs, num_decodes=size, max_seq_len=runner.max_model_len, max_query_len=1)
            if kind.groups:
                meta.group_start_G1, meta.group_len_G, meta.shared_len_B = starts_G1, lens_G, shared
            logits_BV = runner.model.forward(ids_T, meta, None)
            if kind.logits:
                if self._logits is None:
                    self._logits = logits_BV.new_empty(len(self._ones), logits_BV.shape[1])
                return self._logits[:size].copy_(logits_BV)
            return runner.sample(logits_BV, slots.long(), meta.seq_lens_R.long(), into.long())

        self._stream.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            # Compile kernels and fill cuBLAS' workspaces outside of the capture. Products of a fixed order have launch
            # shapes of their own for some sizes.
            warm = kind, size if getattr(runner.decode, "fixed_order", False) else 0
            if warm not in self._warm:
                step()
                self._warm.add(warm)
                torch.cuda.current_stream().synchronize()
            # Not torch.cuda.graph(): it waits for the device, collects garbage and empties the allocator's cache.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                out = step()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)
        entry = self._captured[size, kind] = _Captured(graph, packed, out)
        return entry
