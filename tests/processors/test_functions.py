"""Functions of users that block or end their process: their rows fail, no other does, and the pipeline ends."""

from __future__ import annotations

import ctypes
import os
import re

import pytest
import ray

from rayinfer import LLM, SamplingParams, errors
from rayinfer.processors import EngineProcessorConfig, build_processor
from rayinfer.processors.functions import call_all

NUM_ROWS = 16
SECONDS = 10.0  # far more than a good row takes, on a machine that is busy
GREEDY = {"temperature": 0, "max_tokens": 4, "ignore_eos": True}


def ask(row):
    if row["id"] == 5:
        os._exit(1)
    return {"prompt": f"row {row['id']}"}


def keep(row):
    if row["id"] == 9:
        ctypes.string_at(0)
    return {"id": row["id"], "text": row["generated_text"]}


@pytest.mark.long
def test_functions_that_end_their_process(local_ray, model_path, engine_kwargs):
    config = EngineProcessorConfig(model_source=model_path, engine_kwargs=engine_kwargs, sampling_params=GREEDY)
    rows = build_processor(config, ask, keep)(ray.data.range(NUM_ROWS, override_num_blocks=1)).take_all()
    rows.sort(key=lambda row: row["id"])
    errors = {row["id"]: (row["error_type"], row["error_stage"], row["error_message"]) for row in rows}
    assert list(errors) == list(range(NUM_ROWS))
    assert {i: error for i, error in errors.items() if error != (None,) * 3} == {
        5: ("PREPROCESS_ERROR", "preprocess", "preprocess ended its process"),
        9: ("POSTPROCESS_ERROR", "postprocess", "postprocess ended its process"),
    }
    good = [i for i in range(NUM_ROWS) if i not in (5, 9)]
    outputs = LLM(model_path, **engine_kwargs).generate([f"row {i}" for i in good], SamplingParams(**GREEDY))
    assert [rows[i]["text"] for i in good] == [output.outputs[0].text for output in outputs]


@pytest.mark.parametrize("seconds", [0, -1, float("inf"), float("nan")])
def test_limits_that_are_none(seconds):
    with pytest.raises(errors.ConfigError, match="function_timeout_s = "):
        EngineProcessorConfig(model_source="m", function_timeout_s=seconds)


def test_a_function_that_blocks(local_ray):
    """In a pattern that takes for ever, and holds Python's lock: no thread of its process could stop it."""

    @ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)  # as Ray Data has it
    class Actor:
        def answer(self):
            def match(row):
                return {"pid": os.getpid(), "found": bool(re.match(r"(a+)+$", "a" * row["n"] + row["end"]))}

            rows = [{"n": 3, "end": ""}, {"n": 60, "end": "b"}, {"n": 2, "end": "b"}]
            return os.getpid(), call_all(match, rows, errors.Stage.POSTPROCESS, SECONDS)

    pid, (first, second, third) = ray.get(Actor.remote().answer.remote(), timeout=400)
    assert (first["found"], third["found"]) == (True, False)
    assert len({pid, first["pid"], third["pid"]}) == 3  # it runs apart since the first try was ended
    assert str(second) == "postprocess did not return in 10 s"


def test_in_the_first_try_they_run_here():
    stage = errors.Stage.PREPROCESS
    answers = call_all(lambda row: {"pid": os.getpid(), **row}, [{"id": 0}, {"id": 1}], stage, SECONDS)
    assert answers == [{"pid": os.getpid(), "id": 0}, {"pid": os.getpid(), "id": 1}]
    (error,) = call_all(lambda row: 7, [{}], stage, SECONDS)
    assert str(error) == "preprocess returned int, want a dict"
