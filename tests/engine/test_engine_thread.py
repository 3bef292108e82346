"""EngineThread: many callers, one engine; every row is called back exactly once, whatever happens."""

from __future__ import annotations

import threading
from collections import Counter

import pytest

from rayinfer import SamplingParams
from rayinfer.config import EngineConfig
from rayinfer.engine_thread import EngineThread
from rayinfer.errors import ConfigError
from rayinfer.inputs import EncodedRow
from tests.engine.tiny import TINY, as_rows, ids_of, random_prompts

PARAMS = SamplingParams(temperature=1.0, seed=5, max_tokens=10, ignore_eos=True)
PROMPTS = random_prompts(24)


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
        assert self.done.wait(60)
        assert set(self.calls.values()) == {1}
        return [self.outputs[index] for index in range(len(self.rows))]


@pytest.fixture
def make_thread(folder_of):
    made = []

    def make(**kwargs) -> EngineThread:
        defaults = {"skip_tokenizer_init": True, "max_num_seqs": 8}
        made.append(EngineThread(EngineConfig.parse(model=folder_of("llama"), **{**TINY, **defaults, **kwargs})))
        return made[-1]

    yield make
    for thread in made:
        thread.close()


def _rows(prompts, params=PARAMS) -> list[EncodedRow]:
    return [EncodedRow(list(prompt), params) for prompt in prompts]


def test_many_threads(make_thread, make_llm):
    want = ids_of(make_llm("llama").generate(as_rows(PROMPTS), PARAMS, use_tqdm=False))
    engine = make_thread(block_size=4)
    engine.engine.runner.run_ahead = 1
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
    engine.close()
    stats = engine.stats()
    assert (stats.num_finished, stats.num_failed, stats.num_running, stats.num_waiting) == (24, 0, 0, 0)
    engine.engine.pool.check_integrity([])


def test_rows_of_several_calls_share_a_step(make_thread):
    """The second call's rows start while the first one's run: fewer steps than one call after the other."""
    engine = make_thread()
    first, second = Waiter(_rows([[5]])), Waiter(_rows([[6]]))
    with engine._wake:  # the engine takes both at once
        engine.submit(first.rows, first)
        engine.submit(second.rows, second)
        assert engine.stats().num_waiting == 2
    first.wait()
    second.wait()
    assert engine.engine.stats.num_steps == 10


def test_row_that_the_engine_refuses(make_thread):
    """It costs only itself, on the engine's thread as any other."""
    engine = make_thread(max_model_len=20)
    waiter = Waiter(_rows([[5], [6] * 20, [7]]) + _rows([[8]], PARAMS.model_copy(update={"stop": ("x",)})))
    engine.submit(waiter.rows, waiter)
    outputs = waiter.wait()
    assert [output.error_type for output in outputs] == [None, "PROMPT_TOO_LONG", None, "INVALID_SAMPLING_PARAMS"]


def test_close_aborts_what_is_left(make_thread):
    engine = make_thread()
    waiter = Waiter(_rows(PROMPTS, PARAMS.model_copy(update={"max_tokens": 50})))
    second = Waiter(_rows(PROMPTS[:2]))
    reached = threading.Event()
    step = engine.engine.step

    def slow_step():
        if engine.engine.stats.num_steps >= 5:
            reached.set()
            with engine._wake:
                engine._wake.wait_for(lambda: engine._closed, 60)
        return step()

    engine.engine.step = slow_step
    engine.submit(waiter.rows, waiter)
    assert reached.wait(60)
    engine.submit(second.rows, second)
    engine.close()
    for output in (*waiter.wait(), *second.wait()):
        assert output.error_type == "ABORTED"
        assert "closed" in output.error_message
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit(waiter.rows, waiter)
    engine.close()


def test_death_of_the_engine(make_thread):
    """A failing device: all rows end as ABORTED, and submit raises with the cause."""
    engine = make_thread()
    launch, reached = engine.engine.runner.launch, []

    def failing(plan):
        reached.append(plan)
        if len(reached) == 4:
            raise OSError("the device fell off the bus")
        return launch(plan)

    engine.engine.runner.launch = failing
    threading.excepthook, hook = (lambda args: None), threading.excepthook
    try:
        waiter = Waiter(_rows(PROMPTS))
        engine.submit(waiter.rows, waiter)
        outputs = waiter.wait()
        engine._thread.join()
    finally:
        threading.excepthook = hook
    assert {output.error_type for output in outputs} == {"ABORTED"}
    assert "fell off the bus" in outputs[0].error_message
    with pytest.raises(RuntimeError, match="died") as caught:
        engine.submit(waiter.rows, waiter)
    assert isinstance(caught.value.__cause__, OSError)
    engine.close()


def test_death_while_rows_are_taken_in(make_thread):
    """A row that makes add() raise something unforeseen: rows behind it in the inbox are called back too."""
    engine = make_thread()
    rows = _rows([[5], [6], [7]])
    rows[1].prompt_token_ids = None
    threading.excepthook, hook = (lambda args: None), threading.excepthook
    try:
        waiter = Waiter(rows)
        engine.submit(rows, waiter)
        outputs = waiter.wait()
        engine._thread.join()
    finally:
        threading.excepthook = hook
    assert {output.error_type for output in outputs} == {"ABORTED"}


def test_config_errors_reach_the_caller(folder_of):
    with pytest.raises(ConfigError, match="max_model_len = 9999"):
        EngineThread(EngineConfig.parse(model=folder_of("llama"), skip_tokenizer_init=True, max_model_len=9999))
