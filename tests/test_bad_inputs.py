"""Every bad input of tests/bad_inputs.py through the stages of a job, among good rows that must not notice."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow as pa
import pytest

from benchmarks.fuzz_rows import fuzz
from rayinfer import EngineConfig
from rayinfer.errors import ErrorType, Stage
from rayinfer.inputs import InputProcessor
from rayinfer.processors import LLMProcessor
from rayinfer.processors import columns as col
from rayinfer.processors.stages import Prepare, finish
from tests import bad_inputs
from tests.processors.conftest import MAX_MODEL_LEN, engine_kwargs, model_path  # noqa: F401

GREEDY = {"temperature": 0, "max_tokens": 6, "ignore_eos": True}
GOOD = [
    {"prompt": "the end of it"},
    {"prompt_token_ids": [5, 6, 7, 256]},
    {"messages": [{"role": "user", "content": "a<eos>b"}]},
    {"prompt": "x" * (MAX_MODEL_LEN - 1)},
    {"prompt": "\0 \U0001f642", "sampling_params": {"temperature": 1.0, "seed": 7, "top_k": 20, "max_tokens": 6}},
]


@pytest.fixture(scope="module")
def llm(model_path, engine_kwargs):  # noqa: F811
    processor = LLMProcessor(model_path, sampling_params=GREEDY, **engine_kwargs)
    yield processor
    processor.close()


@pytest.fixture(scope="module")
def answers(llm, model_path, engine_kwargs):  # noqa: F811
    """answers(table, preprocess) -> the finished rows, in order."""

    def run(table, preprocess=None):
        inputs = InputProcessor(EngineConfig.parse(model=model_path, **engine_kwargs), bad_inputs.TEMPLATE)
        stage = Prepare(inputs, preprocess, GREEDY, 128, "record")
        blocks = [finish(block, None, "record") for call in stage(table) for block in llm(call)]
        types = {field.name: field.type for field in col.OUTPUT}
        for block in blocks:
            assert all(block.schema.field(name).type == types[name] for name in types if name in block.column_names)
        names = ["id", *(name for name in col.OUTPUT.names if name not in col.WHEN_ASKED)]
        return pa.concat_tables([block.select(names) for block in blocks]).sort_by("id").to_pylist()

    return run


def wrong(row, what, error_type, fragments):
    """What is wrong with the error row of a bad input, or None."""
    message, secret = row["error_message"] or "", bad_inputs.SECRET.casefold()
    missing = [part for part in fragments if not (re.search(part, message) if "|" in part else part in message)]
    quoted = any(secret[i : i + 8] in message.casefold() for i in range(len(secret) - 8))
    empty = (row["generated_text"], row["generated_tokens"], row["finish_reason"]) == (None, None, "error")
    in_function = error_type == "PREPROCESS_ERROR" or what == "preprocess says so"
    wrong_stage = row["error_stage"] != ("preprocess" if in_function else "encode")
    if row["error_type"] != error_type or wrong_stage or missing or quoted or not empty or len(message) > 2500:
        return f"{what}: {row['error_type']}, {message[:300]!r} lacks {missing}, quoted={quoted}, {row}"
    return None


def test_each_bad_input_costs_itself_alone(answers):
    def preprocess(row):
        kind, index = row["kind"], row["index"]
        value = GOOD[index % len(GOOD)] if kind == "good" else bad_inputs.ROWS[index][1]
        if isinstance(value, BaseException):
            raise value
        return value() if callable(value) else value

    kinds = ["good", "bad"] * len(bad_inputs.ROWS)
    table = pa.table({"id": range(len(kinds)), "kind": kinds, "index": [i // 2 for i in range(len(kinds))]})
    secret = table.append_column("text", pa.array([bad_inputs.SECRET] * len(kinds)))
    rows = answers(secret, preprocess)
    alone = answers(table.take(pa.array(range(0, 2 * len(GOOD), 2))), preprocess)
    assert [row["num_generated_tokens"] for row in alone] == [6, 6, 6, 1, 6]
    assert [row["id"] for row in rows] == list(range(len(kinds)))
    for row, want in zip(rows[::2], alone * len(rows), strict=False):
        assert row["error_type"] is None, row
        assert row["generated_tokens"] == want["generated_tokens"]
    problems = []
    for row, (what, _, error_type, fragments) in zip(rows[1::2], bad_inputs.ROWS, strict=True):
        problems.append(wrong(row, what, error_type, fragments))
        assert row["attempts"] == 0, what
    assert not any(problems), "\n".join(filter(None, problems))


@pytest.mark.parametrize("case", bad_inputs.COLUMNS, ids=lambda case: case[0])
def test_columns_of_wrong_types(answers, llm, case):
    what, table, error_type, fragments = case
    (block,) = llm(table)  # without the stage before it
    for row in (answers(table.append_column("id", pa.array([0])))[0], block.to_pylist()[0]):
        assert not wrong(row, what, error_type, fragments)


def test_the_readme_has_every_error_type():
    text = (Path(__file__).resolve().parents[1] / "README.md").read_text()
    told = dict(re.findall(r"^\| `([A-Z_]+)` \| ([a-z, ]+) \|", text, re.M))
    assert told.keys() == set(ErrorType)
    assert {stage for stages in told.values() for stage in stages.split(", ")} == set(Stage)


def test_the_table_is_what_it_says():
    cases = [*bad_inputs.ROWS, *bad_inputs.COLUMNS]
    assert len(cases) >= 250
    names = [what for what, *_ in cases]
    assert len(set(names)) == len(names), {name for name in names if names.count(name) > 1}


def test_fuzzed_rows_end_as_answers_or_errors(tmp_path):
    """A slice of benchmarks/fuzz_rows.py, which raises for an engine that dies and a good row that changes."""
    fuzzer = fuzz(400, 0, tmp_path)
    assert sum(fuzzer.ends.values()) == fuzzer.num_rows + fuzzer.num_columns
    assert set(fuzzer.ends) <= {"ok", *ErrorType}
    assert {"ok", "INVALID_PROMPT", "INVALID_SAMPLING_PARAMS", "PREPROCESS_ERROR"} <= set(fuzzer.ends)
    assert fuzzer.num_good == 25
