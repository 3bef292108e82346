"""What users' functions return, on its way from one stage to the next, and from one processor to another."""

from __future__ import annotations

import random
from urllib.error import HTTPError

import numpy as np
import pyarrow as pa

from rayinfer import RowError
from rayinfer.processors.stages import finish
from tests.processors.test_stages import llm, prepare, run  # noqa: F401


class Meta(str):
    """As if of the driver's script, which a worker cannot import."""


Meta.__module__ = "__main__"


def test_what_preprocess_returns_travels_or_costs_its_row(llm, model_path, engine_kwargs):  # noqa: F811
    """An instance of the script's own class failed its row; what cannot be made again, a bool among the ids and an
    error type of one's own stopped the job."""
    values = [{"meta": Meta("a")}, {"why": HTTPError("u", 404, "no", {}, None)}, {"prompt_token_ids": [5, True]}]

    def preprocess(row):
        if row["id"] == 3:
            raise RowError("EMPTY_TEXT", "no text")
        return {"prompt_token_ids": [5], **values[row["id"]]}

    table = pa.table({"id": range(4)})
    blocks = run(llm, prepare(model_path, engine_kwargs, preprocess), table, lambda row: {"id": row["id"]})
    result = pa.concat_tables(blocks)
    errors = dict(zip(result["id"].to_pylist(), result["error_type"].to_pylist(), strict=True))
    assert errors == {0: None, 1: "PREPROCESS_ERROR", 2: None, 3: "PREPROCESS_ERROR"}


def test_the_same_rows_are_in_a_block_whatever_preprocess_returns(model_path, engine_kwargs):
    """Ray runs a lost task again and skips the blocks that it has: with others in them, rows were lost and doubled."""

    def preprocess(row):
        if random.random() < 0.3:
            raise OSError("now and then")
        return {"prompt": f"{random.random()}"}

    stage = prepare(model_path, engine_kwargs, preprocess)
    runs = [[sorted(block["id"].to_pylist()) for block in stage(pa.table({"id": range(30)}))] for _ in range(5)]
    assert runs == [runs[0]] * 5
    assert len(runs[0]) == 4


def test_logprobs_of_an_earlier_processor_do_not_stand_beside_the_tokens_of_a_later_one(llm, model_path, engine_kwargs):  # noqa: F811
    def ask_for(prompt, **params):
        return prepare(model_path, engine_kwargs, lambda row: {"prompt": prompt, "sampling_params": params})

    (first,) = run(llm, ask_for("ab", logprobs=1, max_tokens=2), pa.table({"id": [0]}))
    assert first["logprobs"].null_count == 0
    (second,) = run(llm, ask_for("xyz", max_tokens=4), first.drop_columns(["sampling_params"]))
    assert second["logprobs"].null_count == 1
    assert len(second["generated_tokens"][0]) == 4


def test_messages_of_a_result_can_be_gone_on_with(llm, model_path, engine_kwargs):  # noqa: F811
    """A content of None came out as the word null, parts as JSON."""
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    messages = [{"role": "user", "content": parts}, call]
    (result,) = run(llm, prepare(model_path, engine_kwargs, lambda row: {"messages": messages}), pa.table({"id": [0]}))
    want = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None}]
    assert result["messages"].to_pylist() == [want]


def test_times_of_numpy_stay_times():
    table = pa.table({"id": [0]})
    (result,) = [finish(table, lambda row: {"at": np.datetime64("2024-05-01T12:00:00", "ns")}, "record")]
    assert result.schema.field("at").type == pa.timestamp("ns")
    assert str(result["at"][0].as_py())[:10] == "2024-05-01"
