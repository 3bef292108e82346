"""The runner: one step plan in, sampled tokens out, nothing read back in between.

State that outlives a step stays on the device, by slot: the last sampled token, the block table, the sampling
parameters. A plan brings only what changed, in one packed copy, and the inputs of the model are made from it there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rayinfer.attention import AttentionBackend, StepMeta, StepOutputs
from rayinfer.groups import MAX_NUM_GROUPS
from rayinfer.models.model import Model
from rayinfer.plan import StepPlan
from rayinfer.runner.graphs import DecodeGraphs, Inputs
from rayinfer.sampler import get_sampler, logprobs, row_by_row


@dataclass(slots=True)
class TopLogprobs:
    """values float32 [n, 2 + k]: log-probability, rank, then the top k; ids int64 [n, k]."""

    values: np.ndarray
    ids: np.ndarray


@dataclass(slots=True)
class StepResult:
    """What a step yielded: token_ids int32 [L], -1 where the logits were NaN, in the order of `plan.samples`."""

    token_ids: np.ndarray
    logprobs: TopLogprobs | None = None
    prompt_logprobs: TopLogprobs | None = None


class StepHandle:
    """A launched step. `read` waits for the device and gives the result."""

    def __init__(self, tensors: list[Tensor | None]):
        self._event: torch.cuda.Event | None = None
        self._tensors = [None if t is None else t.to("cpu", non_blocking=True) for t in tensors]
        if any(t is not None and t.is_cuda for t in tensors):
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> StepResult:
        if self._event is not None:
            self._event.synchronize()
        token_ids, *tops = [None if t is None else t.numpy() for t in self._tensors]
        assert token_ids is not None
        pairs = zip(tops[::2], tops[1::2], strict=True)
        own, prompt = (None if v is None or i is None else TopLogprobs(v, i) for v, i in pairs)
        return StepResult(token_ids, own, prompt)


class Runner:
    """One model replica on one device.

    Args:
        max_num_seqs: number of slots. max_model_len: tokens of one row.
        use_graphs: replay decode-only steps as CUDA graphs (ignored on a CPU).
    """

    def __init__(
        self, model: Model, prefill: AttentionBackend, decode: AttentionBackend, *, max_num_seqs: int,
        max_model_len: int, block_size: int, use_graphs: bool,
    ):  # fmt: skip
        self.model, self.prefill, self.decode = model, prefill, decode
        self.device, self.block_size, self.max_model_len = model.device, block_size, max_model_len
        self.sampler: Any = get_sampler(self.device)
        self.logprobs: Callable[..., tuple[Tensor, Tensor]] = logprobs
        if model.one_by_one:
            one, self.logprobs = self.sampler, row_by_row(logprobs)
            self.sampler = SimpleNamespace(greedy=row_by_row(one.greedy), sample=row_by_row(one.sample))
        self.padding_slot = max_num_seqs  # what padding rows read and write
        # A CPU computes a step while it is launched, so there is nothing to gain from running ahead of the reading.
        self.run_ahead = 1 if self.device.type == "cuda" else 0
        width = -(-max_model_len // block_size)
        self.block_table_SP = torch.zeros(max_num_seqs + 1, width, dtype=torch.int32, device=self.device)
        self.last_token_S = torch.zeros(max_num_seqs + 1, dtype=torch.int64, device=self.device)
        self.params_S4 = torch.zeros(max_num_seqs + 1, 4, dtype=torch.float32, device=self.device)
        self.seed_S = torch.zeros(max_num_seqs + 1, dtype=torch.int64, device=self.device)
        self.graphs = DecodeGraphs(self, max_num_seqs) if use_graphs and self.device.type == "cuda" else None

    def allocate(self, num_blocks: int) -> None:
        """Allocate the KV cache and bind it to the model."""
        caches = [
            self.decode.allocate(spec, num_blocks, self.block_size, self.model.dtype, self.device)
            for spec in self.model.specs
        ]
        self.model.bind(caches, self.prefill, self.decode)

    @torch.inference_mode()
    def capture_graphs(self) -> None:
        """Capture what decode steps replay; call it once the KV cache is allocated."""
        if self.graphs is not None:
            self.graphs.capture_all()

    def bytes_per_block(self) -> int:
        """KV bytes of one block over all layers."""
        size = 2 * self.block_size * self.model.dtype.itemsize
        return sum(size * spec.num_kv_heads * spec.head_dim for spec in self.model.specs)

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> StepHandle:
        """Start a step; on a GPU this returns before the step is done."""
        num_rows, num_targets = len(plan.slots), len(plan.prompt_targets)
        self._admit(plan)
        if self.graphs is not None and self.graphs.takes(plan):
            if plan.num_decodes < num_rows:
                plan = plan.as_decodes()
            out = self.graphs.run(plan)
            if len(plan.samples) < len(out):
                out = out[self._send(plan.samples)[0].long()]
            if not plan.needs_logits:
                return StepHandle([out, None, None, None, None])
            slots, starts = self._send(plan.slots[plan.samples], plan.starts[plan.samples])
            return self._finish(plan, out, slots.long(), starts.long() + 1)
        query_start = np.zeros(num_rows + 1, np.int32)
        np.cumsum(plan.num_new, out=query_start[1:])
        row = np.repeat(np.arange(num_rows, dtype=np.int32), plan.num_new)
        arrays = plan.slots, plan.starts, plan.num_new, query_start, plan.token_ids, row
        *views, samples, targets, shared, starts, lens = self._send(
            *arrays, plan.samples, plan.prompt_targets.T, plan.shared_lens, *self.padded_groups(plan)
        )
        inputs, samples_L = Inputs(*views), samples.long()
        max_seq_len = int((plan.starts + plan.num_new).max())
        ids_T, meta = self.prepare(
            inputs, num_decodes=plan.num_decodes, max_seq_len=max_seq_len,
            max_query_len=int(plan.num_new[plan.num_decodes :].max(initial=1)),
        )  # fmt: skip
        if len(plan.group_lens):
            meta.group_start_G1, meta.group_len_G, meta.shared_len_B = starts, lens, shared
        index_L = inputs.query_start_R1[1:].long()[samples_L] - 1
        if not num_targets:
            meta.outputs = StepOutputs(index_L, self._as_decodes(meta, samples_L, index_L))
        logits_MV = self.model.forward(ids_T, meta, torch.cat([index_L, targets[0].long()]))
        return self._finish(plan, logits_MV, inputs.slots_R[samples_L].long(), meta.seq_lens_R[samples_L].long())

    def _as_decodes(self, meta: StepMeta, rows_L: Tensor, index_L: Tensor) -> StepMeta:
        """The same rows and lengths, as one query token each."""
        return StepMeta(
            positions_T=meta.positions_T[index_L], slot_mapping_T=meta.slot_mapping_T[index_L],
            block_table_RP=meta.block_table_RP[rows_L], seq_lens_R=meta.seq_lens_R[rows_L],
            query_start_R1=torch.arange(len(rows_L) + 1, dtype=torch.int32, device=self.device),
            num_decodes=len(rows_L), max_seq_len=meta.max_seq_len, max_query_len=1,
        )  # fmt: skip

    def padded_groups(self, plan: StepPlan) -> tuple[np.ndarray, np.ndarray]:
        """Group starts [G + 1] and lengths [G] of a fixed size: empty groups fill it up."""
        if not len(plan.group_lens):
            return np.zeros(0, np.int32), np.zeros(0, np.int32)
        missing = MAX_NUM_GROUPS - len(plan.group_lens)
        return np.pad(plan.group_starts, (0, missing), mode="edge"), np.pad(plan.group_lens, (0, missing))

    def prepare(
        self, inputs: Inputs, *, num_decodes: int, max_seq_len: int, max_query_len: int
    ) -> tuple[Tensor, StepMeta]:
        """Make the model's inputs on the device: token ids int64 [T] and the step's meta."""
        row_T, size = inputs.row_T.long(), self.block_size
        slots_R = inputs.slots_R.long()
        starts_T = inputs.starts_R[row_T].long()
        offset_T = torch.arange(len(row_T), device=self.device) - inputs.query_start_R1[row_T]
        positions_T = (starts_T + offset_T).clamp_(min=0)
        width = min(-(-max_seq_len // size), self.block_table_SP.shape[1])
        table_RP = self.block_table_SP[:, :width].index_select(0, slots_R)
        slot_mapping_T = table_RP[row_T, positions_T // size].long() * size + positions_T % size
        ids_T = torch.where(inputs.token_ids_T < 0, self.last_token_S[slots_R[row_T]], inputs.token_ids_T)
        return ids_T, StepMeta(
            positions_T=positions_T, slot_mapping_T=torch.where(starts_T < 0, -1, slot_mapping_T),
            block_table_RP=table_RP,
            seq_lens_R=torch.where(inputs.starts_R < 0, 0, inputs.starts_R + inputs.num_new_R),
            query_start_R1=inputs.query_start_R1, num_decodes=num_decodes, max_seq_len=max_seq_len,
            max_query_len=max_query_len,
        )  # fmt: skip

    def _send(self, *arrays: np.ndarray) -> list[Tensor]:
        """Copy int32 arrays to the device in one transfer; returns views of the arrays' shapes."""
        packed = torch.from_numpy(np.concatenate([a.ravel() for a in arrays]).astype(np.int32, copy=False))
        if self.device.type == "cuda":
            packed = packed.pin_memory().to(self.device, non_blocking=True)
        views = packed.split([a.size for a in arrays])
        return [view.view(a.shape) for view, a in zip(views, arrays, strict=True)]

    def _admit(self, plan: StepPlan) -> None:
        """Write new block-table entries and the sampling parameters of rows that got a slot."""
        if len(plan.new_blocks):
            slot, index, block = self._send(*plan.new_blocks.T)
            self.block_table_SP[slot.long(), index.long()] = block
        if plan.new_rows:
            slots, *params, seeds = zip(*plan.new_rows, strict=True)
            pin: dict[str, Any] = {"pin_memory": self.device.type == "cuda"}
            at = torch.tensor(slots, **pin).to(self.device, non_blocking=True)
            values = torch.tensor(params, dtype=torch.float32, **pin).to(self.device, non_blocking=True)
            self.params_S4[at] = values.T
            self.seed_S[at] = torch.tensor(seeds, dtype=torch.int64, **pin).to(self.device, non_blocking=True)

    def sample(
        self, logits_LV: Tensor, slots_L: Tensor, position_L: Tensor, into_L: Tensor, greedy: bool = False
    ) -> Tensor:
        """Token ids int32 [L] by the slots' parameters (`greedy`: all are), the next inputs of slots `into_L`."""
        if greedy:
            token_L = self.sampler.greedy(logits_LV)
        else:
            temperature, top_k, top_p, min_p = self.params_S4[slots_L].T.contiguous()
            seed = self.seed_S[slots_L]
            token_L = self.sampler.sample(logits_LV, temperature, top_k.int(), top_p, min_p, seed, position_L)
        self.last_token_S[into_L] = token_L.long().clamp_(min=0)  # a NaN row's -1 must not index the embedding
        return token_L

    def _finish(self, plan: StepPlan, logits_MV: Tensor, slots_L: Tensor, position_L: Tensor) -> StepHandle:
        """Sample from the first L rows of the logits; the rest are for prompt log-probabilities."""
        num_samples = len(plan.samples)
        logits_LV = raw_LV = logits_MV[:num_samples]
        banned_2B, targets_2M = self._send(plan.banned.T, plan.prompt_targets.T)
        if banned_2B.numel():
            logits_LV = raw_LV.clone() if plan.num_logprobs >= 0 else raw_LV
            logits_LV[banned_2B[0].long(), banned_2B[1].long()] = float("-inf")
        token_L = self.sample(logits_LV, slots_L, position_L, slots_L, plan.all_greedy)
        tops: list[Tensor | None] = [None] * 4
        if plan.num_logprobs >= 0:
            tops[:2] = self.logprobs(raw_LV, token_L.long().clamp_(min=0), plan.num_logprobs)
        if plan.num_prompt_logprobs >= 0:
            tops[2:] = self.logprobs(logits_MV[num_samples:], targets_2M[1].long(), plan.num_prompt_logprobs)
        return StepHandle([token_L, *tops])
