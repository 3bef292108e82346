"""EngineProcess: many callers, one engine in a process; every row is called back exactly once, whatever happens to it.

Faults strike the process from outside (signals) or from a `sitecustomize.py` that it finds on its path, which replaces
`Runner.launch`; nothing in the product knows of them.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
from collections import Counter
from math import log2

import psutil
import pytest

from rayinfer import SamplingParams, engine_process
from rayinfer.config import EngineConfig
from rayinfer.engine_process import EngineProcess
from rayinfer.errors import ConfigError
from rayinfer.request import EncodedRow, EngineStats, RequestOutput
from tests.engine.tiny import TINY, as_rows, ids_of, random_prompts

PARAMS = SamplingParams(temperature=1.0, seed=5, max_tokens=10, ignore_eos=True)
POISON = 90  # a token that no prompt has
PROMPTS = [[id - (id == POISON) for id in prompt] for prompt in random_prompts(24)]

# Runs in the engine's process before anything else; `strike(runner, plan, number)` is a test's own.
PRELOAD = """
import importlib.abc, importlib.machinery, os, signal, sys, time
{strike}
class _Patch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "rayinfer.runner.runner":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        load = spec.loader.exec_module
        def exec_module(module):
            load(module)
            launch, numbers = module.Runner.launch, iter(range(10**9))
            def struck(runner, plan):
                strike(runner, plan, next(numbers))
                return launch(runner, plan)
            module.Runner.launch = struck
        spec.loader.exec_module = exec_module
        return spec
sys.meta_path.insert(0, _Patch())
"""


class Waiter:
    """Collects the callbacks of one submit."""

    def __init__(self, rows):
        self.rows, self.outputs, self.calls = rows, {}, Counter()
        self.done = threading.Event()

    def __call__(self, index, output):
        self.calls[index] += 1
        self.outputs[index] = output
        if len(self.outputs) == len(self.rows):
            self.done.set()

    def wait(self) -> list:
        assert self.done.wait(300)
        assert set(self.calls.values()) == {1}
        return [self.outputs[index] for index in range(len(self.rows))]


class Child:
    """In place of a process, for what does not depend on one: dies of POISON, and answers all else at once."""

    stacks = reason = ""
    made = 0

    def __init__(self, config):
        type(self).made += 1
        self.inbox = queue.SimpleQueue()

    def wait_until_ready(self, stop):
        return True

    def send(self, rows):
        self.inbox.put(rows)

    def receive(self, busy):
        rows = self.inbox.get()
        if rows is None or any(POISON in row.prompt_token_ids for _, row in rows):
            return None
        return "stepped", ([RequestOutput(request_id, None, [], []) for request_id, _ in rows], EngineStats())

    def end(self):
        self.inbox.put(None)


@pytest.fixture
def make_engine(folder_of, tmp_path, monkeypatch):
    """make_engine(strike="", **EngineConfig fields): `strike` is the source of a function, see PRELOAD."""
    made = []

    def make(strike: str = "", **kwargs) -> EngineProcess:
        if strike:
            (tmp_path / "sitecustomize.py").write_text(PRELOAD.format(strike=strike))
            monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        defaults = {"skip_tokenizer_init": True, "max_num_seqs": 8}
        made.append(EngineProcess(EngineConfig.parse(model=folder_of("llama"), **{**TINY, **defaults, **kwargs})))
        return made[-1]

    yield make
    for engine in made:
        engine.close()
    assert not [process for process in psutil.Process().children() if "engine_child" in " ".join(process.cmdline())]


@pytest.fixture
def want(make_llm):
    return ids_of(make_llm("llama").generate(as_rows(PROMPTS), PARAMS, use_tqdm=False))


def _rows(prompts, params=PARAMS) -> list[EncodedRow]:
    return [EncodedRow(list(prompt), params) for prompt in prompts]


def _child(engine: EngineProcess) -> psutil.Process:
    assert engine._child is not None
    return psutil.Process(engine._child._process.pid)


def test_many_threads_and_a_death(make_engine, want, monkeypatch):
    """Rows of several callers, a row that is refused, a killed process, little memory, an end in between."""
    engine = make_engine("def strike(runner, plan, number): time.sleep(0.02)", block_size=4)
    assert _child(engine).environ()["GOMP_SPINCOUNT"] == engine_process.SPINS
    waiters = [Waiter(_rows(PROMPTS[at : at + 3])) for at in range(0, 24, 3)]
    start = threading.Barrier(len(waiters))

    def call(waiter):
        start.wait()
        engine.submit(waiter.rows, waiter)

    threads = [threading.Thread(target=call, args=(waiter,)) for waiter in waiters]
    for thread in threads:
        thread.start()
    outputs = [output for waiter in waiters for output in waiter.wait()]
    for thread in threads:
        thread.join()
    assert ids_of(outputs) == want
    assert [output.prompt_token_ids for output in outputs] == PROMPTS
    stats = engine.stats()
    assert (stats.num_finished, stats.num_failed, stats.num_running, stats.num_waiting) == (24, 0, 0, 0)

    waiter = Waiter(_rows([[5], [6] * 128, [7]]) + _rows([[8]], PARAMS.model_copy(update={"stop": ("x",)})))
    engine.submit(waiter.rows, waiter)
    assert [output.error_type for output in waiter.wait()] == [None, "PROMPT_TOO_LONG", None, "INVALID_SAMPLING_PARAMS"]

    first, waiter = _child(engine), Waiter(_rows(PROMPTS))
    engine.submit(waiter.rows, waiter)
    while not engine._admitted:
        time.sleep(0.01)
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")  # what a user chose stays in force
    first.kill()
    outputs = waiter.wait()
    assert ids_of(outputs) == want
    assert "GOMP_SPINCOUNT" not in _child(engine).environ()
    restarted = [output.num_restarts for output in outputs]
    assert set(restarted) == {0, 1}
    assert sum(restarted) <= 8  # those that ran
    assert _child(engine).pid != first.pid

    monkeypatch.setattr(engine_process, "MEMORY_S", 0.0)
    monkeypatch.setattr(engine_process, "MIN_FREE_MEMORY", 1.1)  # fewer rows at once, never none
    waiter = Waiter(_rows(PROMPTS))
    engine.submit(waiter.rows, waiter)
    assert ids_of(waiter.wait()) == want
    assert engine._limit == 1

    waiter = Waiter(_rows(PROMPTS, PARAMS.model_copy(update={"max_tokens": 80})))
    engine.submit(waiter.rows, waiter)
    engine.close()
    for output in waiter.wait():
        assert output.error_type == "ABORTED"
        assert "closed" in output.error_message
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit(waiter.rows, waiter)
    engine.close()


def test_closed_while_a_process_starts(monkeypatch):
    """It is the second one: the caller has had the engine for long."""
    closing = []

    class Slow(Child):
        def wait_until_ready(self, stop):
            if self.made > 1:
                closing.append(threading.Thread(target=engine.close, daemon=True))
                closing[0].start()
                while not stop():
                    time.sleep(0.001)
            return True

    monkeypatch.setattr(engine_process, "_Child", Slow)
    engine = EngineProcess(EngineConfig.parse(model="m"))
    waiter = Waiter(_rows([[POISON]]))
    engine.submit(waiter.rows, waiter)
    assert waiter.done.wait(20)
    assert waiter.outputs[0].error_type == "ABORTED"
    closing[0].join(20)
    assert not closing[0].is_alive()


def test_copies_of_a_poison_row_fail_together(monkeypatch):
    """Greedy ones, which do the same: each would cost deaths of its own."""

    class Mortal(Child):
        pass

    monkeypatch.setattr(engine_process, "_Child", Mortal)
    engine = EngineProcess(EngineConfig.parse(model="m"))
    greedy = SamplingParams(temperature=0)
    waiter = Waiter(_rows([[4, POISON] if index % 4 else [5, index] for index in range(16)], greedy))
    engine.submit(waiter.rows, waiter)
    errors = [output.error_type for output in waiter.wait()]
    assert errors == ["ENGINE_CRASH" if index % 4 else None for index in range(16)]
    assert Mortal.made - 1 <= 2 + log2(16)
    engine.close()


def test_config_errors_reach_the_caller(make_engine):
    with pytest.raises(ConfigError, match="max_model_len = 9999"):
        make_engine(max_model_len=9999)


@pytest.mark.slow
def test_the_process_ends_with_its_parent(folder_of):
    """Also when it does not look at its pipe, because it stands still."""
    read, write = os.pipe()
    code = (
        "import os, sys, psutil, signal; from rayinfer.config import EngineConfig\n"
        "from rayinfer.engine_process import EngineProcess\n"
        f"config = EngineConfig.parse(model={folder_of('llama')!r}, skip_tokenizer_init=True, **{TINY!r})\n"
        "engine = EngineProcess(config)\n"
        "pid = engine._child._process.pid\n"
        "os.kill(pid, signal.SIGSTOP)\n"
        f"os.write({write}, str(pid).encode())\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    engine_process.subprocess.run([sys.executable, "-c", code], pass_fds=[write], timeout=300)
    os.close(write)
    pid = int(os.read(read, 20))
    deadline = time.monotonic() + 300
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
def test_a_poison_row_is_bisected_out(make_engine, want, caplog):
    strike = f"def strike(runner, plan, number):\n    if {POISON} in plan.token_ids: os.kill(os.getpid(), 11)"
    engine = make_engine(strike, enable_prefix_caching=False)
    waiter = Waiter(_rows([*PROMPTS[:5], [4, POISON], *PROMPTS[6:]]))
    engine.submit(waiter.rows, waiter)
    outputs = waiter.wait()
    assert [index for index, output in enumerate(outputs) if output.error_type] == [5]
    assert outputs[5].error_type == "ENGINE_CRASH"
    assert "at last alone: its process ended with SIGSEGV" in outputs[5].error_message
    deaths = [record for record in caplog.records if "the engine is replaced" in record.message]
    assert 3 <= len(deaths) <= 2 + log2(8)
    assert "in strike" in deaths[-1].message  # the stack
    others = [index for index in range(24) if index != 5]
    assert [outputs[index].outputs[0].token_ids for index in others] == [want[index] for index in others]


@pytest.mark.slow
def test_a_hung_step_is_noticed(make_engine, want, monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(engine_process, "MIN_STEP_S", 1.0)
    monkeypatch.setattr(engine_process, "POLL_S", 0.2)
    monkeypatch.setattr(engine_process, "END_S", 2.0)
    once = tmp_path / "once"
    engine = make_engine(
        f"def strike(runner, plan, number):\n    if number == 6 and not os.path.exists({str(once)!r}):\n"
        f"        open({str(once)!r}, 'w').close()\n        time.sleep(10**6)"
    )
    waiter = Waiter(_rows(PROMPTS))
    engine.submit(waiter.rows, waiter)
    assert ids_of(waiter.wait()) == want
    (record,) = [record for record in caplog.records if "the engine is replaced" in record.message]
    assert "it hung: no step ended for" in record.message
    assert "in strike" in record.message  # its stack


@pytest.mark.slow
def test_a_process_that_hangs_before_it_is_ready_is_replaced(make_engine, want, monkeypatch, tmp_path, caplog):
    """In the row of one token that it proves itself with: nobody waits as long as for a model from slow storage."""
    monkeypatch.setattr(engine_process, "FIRST_STEP_S", 5.0)
    monkeypatch.setattr(engine_process, "POLL_S", 0.2)
    monkeypatch.setattr(engine_process, "END_S", 2.0)
    once = tmp_path / "once"
    engine = make_engine(
        f"def strike(runner, plan, number):\n    if number == 0 and not os.path.exists({str(once)!r}):\n"
        f"        open({str(once)!r}, 'w').close()\n        time.sleep(10**6)"
    )
    waiter = Waiter(_rows(PROMPTS[:3]))
    engine.submit(waiter.rows, waiter)
    assert ids_of(waiter.wait()) == want[:3]
    (record,) = [record for record in caplog.records if "the engine is replaced" in record.message]
    assert "its first step did not end" in record.message
    assert "in strike" in record.message  # its stack


@pytest.mark.slow
def test_an_engine_that_cannot_start_again(make_engine, tmp_path):
    """The caller is told, with the reason; rows end as ABORTED."""
    flag = tmp_path / "broken"
    engine = make_engine(
        f"def strike(runner, plan, number):\n    if os.path.exists({str(flag)!r}): raise OSError('off the bus')"
    )
    flag.touch()
    waiter = Waiter(_rows(PROMPTS[:2]))
    engine.submit(waiter.rows, waiter)
    assert {output.error_type for output in waiter.wait()} == {"ABORTED"}
    assert "off the bus" in waiter.outputs[0].error_message
    with pytest.raises(RuntimeError, match="died") as caught:
        engine.submit(waiter.rows, waiter)
    assert "off the bus" in str(caught.value.__cause__)
