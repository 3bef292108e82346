"""CUDA graphs of whole decode steps, captured when a batch size is first met.

A graph is fixed in shape only: it reads the rows' slots and lengths from a static buffer and everything else from the
runner's persistent state, so one graph serves every mix of lengths. Batches are padded to the next captured size.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rayinfer.scheduler import StepPlan

if TYPE_CHECKING:
    from rayinfer.runner.runner import Runner


@dataclass(slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    packed: torch.Tensor  # int32 [3, B]: slots, starts, token ids
    logits_BV: torch.Tensor


class DecodeGraphs:
    """Lazily captured graphs by padded batch size; all share one memory pool and one stream."""

    def __init__(self, runner: Runner, max_num_seqs: int):
        self._runner = runner
        sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, 512, 32), *range(512, max_num_seqs, 64)]
        self._sizes = sorted({min(size, max_num_seqs) for size in sizes} | {max_num_seqs})
        self._captured: dict[int, _Captured] = {}
        # Constants that every graph reads, so they live as long as the graphs.
        constants: dict[str, Any] = {"dtype": torch.int32, "device": runner.device}
        self._count = torch.arange(max_num_seqs + 1, **constants)
        self._ones = torch.ones(max_num_seqs, **constants)
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, plan: StepPlan) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Replay the step; returns logits [R, V], slots int64 [R] and sampling positions int64 [R]."""
        num_rows = len(plan.slots)
        size = self._sizes[bisect_left(self._sizes, num_rows)]
        entry = self._captured.get(size)
        if entry is None:
            entry = self._captured[size] = self._capture(size)
        host = np.empty((3, size), np.int32)
        host[:, num_rows:] = [[0], [-1], [0]]
        host[:, :num_rows] = plan.slots, plan.starts, plan.token_ids
        entry.packed.copy_(torch.from_numpy(host).pin_memory(), non_blocking=True)
        entry.graph.replay()
        slots, starts = entry.packed[0, :num_rows].long(), entry.packed[1, :num_rows].long()
        return entry.logits_BV[:num_rows], slots, starts + 1

    def _capture(self, size: int) -> _Captured:
        from rayinfer.runner.runner import Inputs

        runner, device = self._runner, self._runner.device
        packed = torch.zeros(3, size, dtype=torch.int32, device=device)
        packed[1] = -1  # padding rows only: the warm-up writes no KV
        count, ones = self._count, self._ones[:size]

        def step() -> torch.Tensor:
            inputs = Inputs(packed[0], packed[1], ones, count[: size + 1], packed[2], count[:size])
            ids, meta = runner.prepare(inputs, num_decodes=size, max_seq_len=runner.max_model_len, max_query_len=1)
            return runner.model.forward(ids, meta, None)

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()  # compile kernels and fill cuBLAS' workspaces outside of the capture
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=stream):
            logits_BV = step()
        return _Captured(graph, packed, logits_BV)
