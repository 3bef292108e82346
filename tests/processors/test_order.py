"""Which rows go to an engine together."""

from __future__ import annotations

import random

import numpy as np
import pyarrow as pa

from rayinfer.config import EngineConfig
from rayinfer.inputs import InputProcessor
from rayinfer.processors.columns import TOKEN_IDS
from rayinfer.processors.stages import Prepare, by_prefix


def test_prompts_that_begin_alike_are_one_call(model_path, engine_kwargs):
    """Four system prompts, shuffled; a bad row; every other column stays with its row."""
    inputs = InputProcessor(EngineConfig.parse(model=model_path, **engine_kwargs))
    stage = Prepare(inputs, None, {}, batch_size=4, on_error="record")
    prompts = [f"{'abcd'[i // 4] * 20} question {i % 4}" for i in range(15)] + [""]
    rows = list(enumerate(prompts))
    random.Random(0).shuffle(rows)
    tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(np.array([[i, i] for i, _ in rows]))
    table = pa.table({"id": [i for i, _ in rows], "prompt": [text for _, text in rows], "tensor": tensors})
    calls = list(stage(table))
    assert [call.num_rows for call in calls] == [4, 4, 4, 4]
    together = [{text[:1] for text in call["prompt"].to_pylist()} for call in calls]
    assert together == [{"", "a"}, {"a", "b"}, {"b", "c"}, {"c", "d"}]
    done = pa.concat_tables(calls)
    assert sorted(done["id"].to_pylist()) == list(range(16))
    for row in done.to_pylist():
        assert row["prompt"] == prompts[row["id"]]
        assert row["tensor"] == [row["id"], row["id"]]


def test_order_is_that_of_the_tokens():
    rng = random.Random(1)
    prompts = [[rng.choice([0, 1, 255, 256, 70000]) for _ in range(rng.randint(0, 6))] for _ in range(200)]
    column = pa.chunked_array([prompts[:70], [None, *prompts[70:]]], pa.list_(pa.int32()))
    order = by_prefix(pa.table({TOKEN_IDS: column})[TOKEN_IDS])
    found = [column[i].as_py() or [] for i in order]
    assert found == sorted([*prompts, []])
