"""A step plan is all that a runner needs: replayed on a second one, from its pickle, it yields the same step."""

from __future__ import annotations

import dataclasses
import os
import pickle

import numpy as np
import psutil
import pytest
import torch

from rayinfer import SamplingParams, host
from rayinfer.errors import ConfigError
from rayinfer.plan import StepPlan
from rayinfer.runner import memory
from rayinfer.runner.warmup import warm_up
from tests.engine.tiny import as_rows, ids_of, random_prompts

PLAIN = (np.ndarray, int, bool, list)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_prompt_tokens_as_decodes(make_llm, family):
    """Each token of a chunk as a decode row of its own: what graphs replay gives the tokens that chunks give."""
    cut = {"max_num_batched_tokens": 20, "max_model_len": 84}
    params = [SamplingParams(temperature=i % 2, seed=i, max_tokens=12, ignore_eos=True) for i in range(9)]
    want, llm, num_chunks = make_llm(family, **cut), make_llm(family, **cut), 0
    launch = llm.engine.runner.launch

    def as_decodes(plan: StepPlan):
        nonlocal num_chunks
        num_chunks += len(plan.slots) - plan.num_decodes
        single = plan.as_decodes()
        assert (single.num_new == 1).all()
        assert single.num_decodes == len(plan.token_ids)
        return launch(single)

    llm.engine.runner.launch = as_decodes
    rows = as_rows(random_prompts(9))
    assert ids_of(llm.generate(rows, params, use_tqdm=False)) == ids_of(want.generate(rows, params, use_tqdm=False))
    assert num_chunks > 9


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_plans_replayed_on_a_second_runner(make_llm, family):
    """The tensor-parallel seam: rank 1 sees pickled plans and nothing else, and stays in step with rank 0."""
    cut = {"block_size": 4, "num_gpu_blocks_override": 22, "max_model_len": 84, "max_num_batched_tokens": 20}
    first, second = make_llm(family, run_ahead=1, **cut), make_llm(family, **cut).engine.runner
    launch, num_steps = first.engine.runner.launch, 0

    def both(plan: StepPlan):
        nonlocal num_steps
        num_steps += 1
        for field in dataclasses.fields(plan):
            assert isinstance(getattr(plan, field.name), PLAIN), field.name
        handle, other = launch(plan), second.launch(pickle.loads(pickle.dumps(plan)))
        ours, theirs = handle.read(), other.read()
        np.testing.assert_array_equal(ours.token_ids, theirs.token_ids)
        for mine, its in ((ours.logprobs, theirs.logprobs), (ours.prompt_logprobs, theirs.prompt_logprobs)):
            assert (mine is None) == (its is None)
            if mine is not None:
                np.testing.assert_array_equal(mine.values, its.values)
                np.testing.assert_array_equal(mine.ids, its.ids)
        return handle

    first.engine.runner.launch = both
    params = [
        SamplingParams(
            temperature=i % 2, seed=i, max_tokens=20, min_tokens=9, logprobs=i, prompt_logprobs=2 * i or None
        )
        for i in range(3)
    ] * 3
    outputs = first.generate(as_rows(random_prompts(9)), params, use_tqdm=False)
    assert all(output.error_type is None for output in outputs)
    assert first.engine.snapshot().num_preemptions > 0
    assert num_steps > 30
    tables = (runner.block_table_SP for runner in (first.engine.runner, second))
    assert next(tables).equal(next(tables))


def test_steps_without_samples(make_llm, reference_of):
    """Chunks that leave prompt tokens for later yield nothing, and nothing is read for them."""
    prompt = random_prompts(1, 38, 39)[0]
    llm = make_llm("llama", max_num_batched_tokens=8)
    launch, shapes = llm.engine.runner.launch, []

    def recorded(plan):
        handle = launch(plan)
        shapes.append((int(plan.num_new.sum()), handle.read().token_ids.shape))
        return handle

    llm.engine.runner.launch = recorded
    output = llm.generate(as_rows([prompt]), SamplingParams(temperature=0, max_tokens=2), use_tqdm=False)
    assert shapes == [(8, (0,))] * 4 + [(6, (1,)), (1, (1,))]
    assert ids_of(output)[0] == reference_of("llama").generate(prompt, 2)


def test_threads_that_compile_use_the_runners_gpu(make_llm, monkeypatch):
    """The current GPU is one of a thread, the first unless it is told otherwise."""
    engine, seen = make_llm("llama").engine, []
    monkeypatch.setattr(torch.cuda, "set_device", seen.append)
    warm_up(engine.config, engine.info)
    assert set(seen) == {engine.device}


def test_the_largest_step_must_fit(make_llm, monkeypatch):
    """It is tried before the KV cache is made, and the setting that it follows is named."""
    for name in ("set_device", "empty_cache", "reset_peak_memory_stats", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: 0)
    engine = make_llm("llama").engine

    def launch(plan):
        raise torch.OutOfMemoryError("CUDA out of memory")

    engine.runner.launch = launch
    with pytest.raises(ConfigError, match=r"max_num_batched_tokens = 99: .*; lower it or max_num_seqs \(8\)"):
        memory._gpu_bytes(engine.config, engine.runner, 8, 99)


def test_memory_follows_the_setting(make_llm):
    """2 layers, 2 KV heads of 8, fp32, 4 tokens: 1 KiB a block; never more than all slots can use."""
    runner = make_llm("llama", block_size=4).engine.runner
    assert runner.bytes_per_block() == 2 * 2 * 2 * 8 * 4 * 4
    few = make_llm("llama", block_size=4, cpu_kv_cache_gib=100 * 1024 / 2**30)
    assert few.engine.pool.num_blocks == 100
    most = make_llm("llama", block_size=4, cpu_kv_cache_gib=1.0, max_num_seqs=3)
    assert most.engine.pool.num_blocks == 3 * 128 // 4 + 1
    caches = most.engine.model._state.caches
    assert sum(c.k_NSKD.nbytes + c.v_NSKD.nbytes for c in caches) == most.engine.pool.num_blocks * 1024


def test_a_containers_limits(make_llm, monkeypatch, tmp_path):
    """Cores and memory of a pod on a large node, as cgroup v2 tells them; without limits those of the machine."""
    machine, cores = psutil.virtual_memory(), len(os.sched_getaffinity(0))
    monkeypatch.setattr(host, "CGROUP", tmp_path / "none")
    assert host.num_cores() == cores
    assert host.free_memory() == (pytest.approx(machine.available, rel=0.2), machine.total)
    monkeypatch.setattr(host, "CGROUP", tmp_path)
    stat = "anon 1\nfile 90\ninactive_file 300000\nactive_file 200000\nworkingset_activate_file 7\n"
    (tmp_path / "memory.stat").write_text(stat)
    (tmp_path / "memory.current").write_text("1500000\n")
    for cores_limit, memory_limit, want in [
        ("max 100000\n", "max\n", (cores, machine.total)),
        ("50000 100000\n", "1600000\n", (1, 1_600_000)),  # half a core
        ("900000000 100000\n", f"{10**15}\n", (cores, machine.total)),
    ]:
        (tmp_path / "cpu.max").write_text(cores_limit)
        (tmp_path / "memory.max").write_text(memory_limit)
        assert (host.num_cores(), host.free_memory()[1]) == want
    (tmp_path / "memory.max").write_text("1600000\n")
    assert host.free_memory()[0] == 600_000
    llm = make_llm("llama", block_size=4, cpu_kv_cache_gib=None, num_threads=None)
    assert llm.engine.pool.num_blocks == 600_000 // 4 // 1024
    assert torch.get_num_threads() == cores
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    make_llm("llama", num_threads=None)
    assert torch.get_num_threads() == 1


def test_block_zero_stays_zero(make_llm):
    """Padding points at it, so nothing may ever write it."""
    llm = make_llm("gemma3", block_size=4, num_gpu_blocks_override=22, max_model_len=84, max_num_batched_tokens=7)
    llm.generate(as_rows(random_prompts(8)), SamplingParams(temperature=0, max_tokens=20), use_tqdm=False)
    assert llm.engine.snapshot().num_preemptions > 0
    for cache in llm.engine.model._state.caches:
        assert not cache.k_NSKD[0].any()
        assert not cache.v_NSKD[0].any()
        assert cache.k_NSKD[1:].any()
