"""Fuzzed rows through the stages and an engine: each must end as an answer or as an error of the closed set.

    python benchmarks/fuzz_rows.py --rows 100000

Hypothesis makes what a user's preprocess may return (prompts, ids, messages, sampling parameters, and anything else in
their places), and what Arrow takes of it goes in as columns too. Good rows stand among them in every batch, and must
get the tokens that they get alone. The engine is that of `LLM`, in this process: an exception in it ends the run.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import io
import itertools
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from benchmarks.tiny_llama import TEMPLATE, save_tiny_llama
from rayinfer import LLM, EngineConfig, RowError
from rayinfer.errors import ErrorType
from rayinfer.inputs import InputProcessor
from rayinfer.processors import columns as col
from rayinfer.processors.stages import Prepare, finish
from rayinfer.request import EncodedRow
from rayinfer.sampling import SamplingParams

MAX_MODEL_LEN = 64
BATCH_ROWS = 256
PLACE = "__place"
RUN_ROWS = 1000  # of one seed
GREEDY = {"temperature": 0, "max_tokens": 6, "ignore_eos": True}
GOOD: list[dict[str, Any]] = [
    {"prompt": "the end of it"},
    {"prompt_token_ids": [5, 6, 7, 256]},
    {"messages": [{"role": "user", "content": "a<eos>b"}]},
    {"prompt": "\0 \U0001f642", "sampling_params": {"temperature": 1.0, "seed": 7, "top_k": 20, "max_tokens": 6}},
]

ODD = [
    "",
    "<eos>",
    "a<eos>b<eos>",
    "\ufdd0<eos>\ufdd1",
    "{{ 1/0 }}",
    "{% for %}",
    "\0",
    "\ud800",
    "x" * 63,
    "x" * 64,
    "é" * 999,
]
texts = st.one_of(
    st.text(max_size=40), st.text(st.characters(exclude_categories=()), max_size=12), st.sampled_from(ODD)
)
integers = st.one_of(st.integers(-3, 300), st.integers(), st.sampled_from([2**31, 2**63, -(2**63), 10**40]))
numbers = st.one_of(integers, st.floats(), st.floats(0, 2), st.booleans())
scalars = st.one_of(
    st.none(),
    numbers,
    texts,
    st.binary(max_size=9),
    st.datetimes(),
    st.just(datetime.date(2026, 1, 1)),
    st.complex_numbers(),
)
arrays = st.one_of(
    st.lists(st.integers(0, 300), max_size=70).map(lambda value: np.array(value, np.int64)),
    st.lists(st.floats(width=32), max_size=5).map(lambda value: np.array(value, np.float32)),
    st.integers(0, 5).map(np.int64),
    st.floats().map(np.float64),
)
keys = st.one_of(texts, st.sampled_from(["role", "content", "type", "text", "prompt", "messages"]), st.integers(0, 5))
anything = st.recursive(
    st.one_of(scalars, arrays),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.tuples(inner),
        st.dictionaries(keys, inner, max_size=4),
        st.frozensets(scalars, max_size=2),
    ),
    max_leaves=8,
)
parts = st.lists(
    st.one_of(st.fixed_dictionaries({"type": st.sampled_from(["text", "image"]), "text": texts}), anything), max_size=3
)
roles = st.one_of(st.sampled_from(["system", "user", "assistant", "tool", "eos", "<eos>", "<"]), texts)
message = st.fixed_dictionaries(
    {"role": st.one_of(roles, roles, anything), "content": st.one_of(texts, texts, parts, anything)},
    optional={"name": anything, "tool_calls": anything},
)
params = st.dictionaries(
    st.one_of(st.sampled_from([*SamplingParams.model_fields]), st.sampled_from([*SamplingParams.model_fields]), keys),
    st.one_of(numbers, numbers, anything),
    max_size=4,
)
fitting = st.fixed_dictionaries(  # parameters that pass, to their limits
    {},
    optional={
        "temperature": st.one_of(st.floats(0, 2), st.sampled_from([0, 5e-324, 1e-30, 100.0])),
        "top_k": st.integers(-1, 2**31 - 1),
        "top_p": st.floats(0, 1, exclude_min=True),
        "min_p": st.floats(0, 1),
        "seed": st.integers(0, 2**63 - 1),
        "max_tokens": st.one_of(st.none(), st.integers(1, 10**30)),
        "stop": st.lists(st.text(min_size=1, max_size=3), max_size=3),
        "stop_token_ids": st.lists(st.integers(0, 256), max_size=3),
        "logprobs": st.integers(0, 20),
        "prompt_logprobs": st.integers(0, 20),
        "skip_special_tokens": st.booleans(),
        "include_stop_str_in_output": st.booleans(),
        "ignore_eos": st.booleans(),
    },
)
inputs = [
    st.fixed_dictionaries({"prompt": st.one_of(texts, texts, anything)}),
    st.fixed_dictionaries(
        {
            "prompt_token_ids": st.one_of(
                st.lists(st.integers(0, 256), max_size=70), st.lists(integers), arrays, anything
            )
        }
    ),
    st.fixed_dictionaries({"messages": st.one_of(st.lists(message, max_size=4), anything)}),
]
sampling = st.one_of(
    st.just({}), st.fixed_dictionaries({"sampling_params": st.one_of(fitting, fitting, params, anything)})
)
asked = st.builds(lambda one, more: {**one, **more}, st.one_of(*inputs), sampling)
errors = st.builds(lambda kind, text: kind(text), st.sampled_from([ValueError, KeyError, OSError, SystemExit]), texts)
kinds = [*[asked] * 12, st.dictionaries(st.one_of(texts, keys), anything, max_size=3), anything, errors]
rows_of_a_user = st.sampled_from(kinds).flatmap(lambda kind: kind)  # one_of would take each as often


def make_rows(number: int, num_rows: int) -> list[Any]:
    """Rows that hypothesis makes of one seed."""
    rows: list[Any] = []

    @seed(number)
    @settings(
        max_examples=num_rows,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(rows_of_a_user)
    def collect(row: Any) -> None:
        rows.append(row)

    collect()
    return rows[:num_rows]


class Fuzzer:
    """Runs batches of rows and counts how they end; anything but an end of each row raises."""

    def __init__(self, folder: str):
        config = {"model": folder, "max_num_seqs": 64, "num_threads": 1, "cpu_kv_cache_gib": 0.02, "device": "cpu"}
        self.llm = LLM(**config)
        inputs = InputProcessor(EngineConfig.parse(**config), TEMPLATE)
        self._stage = Prepare(inputs, None, GREEDY, 2 * BATCH_ROWS, "record")
        self.ends: collections.Counter[str] = collections.Counter()
        self.num_rows = self.num_columns = self.num_good = 0
        self._alone = [row["generated_tokens"] for row in self._run(GOOD)]
        assert all(self._alone)

    def run(self, rows: Sequence[Any]) -> None:
        """One batch through preprocess, and again, as far as Arrow has a type for it, as columns."""
        mixed = [item for i, row in enumerate(rows) for item in ([GOOD[i // 16 % 4]] * (i % 16 == 0) + [row])]
        for row, end in zip(mixed, self._run(mixed), strict=True):
            self._count(row, end)
        tables = [(row, table) for row in rows if (table := _as_table(row)) is not None]
        self._stage._preprocess = None
        for (row, _), end in zip(tables, self._finish([table for _, table in tables]), strict=True):
            self._count(row, end)
        self.num_rows += len(rows)
        self.num_columns += len(tables)

    def _run(self, rows: Sequence[Any]) -> list[dict[str, Any]]:
        def preprocess(row: dict[str, Any]) -> Any:
            value = rows[row["id"]]
            if isinstance(value, BaseException):
                raise value
            return value

        self._stage._preprocess = preprocess
        return self._finish([pa.table({"id": range(len(rows))})])

    def _finish(self, tables: Sequence[pa.Table]) -> list[dict[str, Any]]:
        """What the stages and LLMProcessor make of tables: rows, and blocks that another process can have."""
        starts = [0, *itertools.accumulate(table.num_rows for table in tables)]
        placed = [
            table.append_column(PLACE, pa.array(range(start, start + table.num_rows)))
            for start, table in zip(starts, tables, strict=False)
        ]
        blocks = [block for table in placed for block in self._stage(table)]
        results = iter(self._answers(pa.concat_tables([block.select(col.ENCODED.names) for block in blocks])))
        rows = []
        for block in blocks:
            outputs = [col.output_row(next(results), 1) for _ in range(block.num_rows)]
            answered = col.with_columns(col.without(block, col.ENCODED.names), col.table_of(outputs, col.OUTPUT))
            finished = finish(answered, None, "record")
            finished.validate()
            finished.select(col.OUTPUT.names).validate(full=True)  # the others may be what pyarrow took unchecked
            with pa.ipc.new_stream(io.BytesIO(), finished.schema) as stream:
                stream.write_table(finished)
            rows += finished.select([*col.OUTPUT.names, PLACE]).to_pylist()
        return sorted(rows, key=lambda row: row[PLACE])  # the stage may put rows in another order

    def _answers(self, block: pa.Table) -> list[Any]:
        results: list[Any] = []
        columns = block.to_pydict().values()
        for index, (ids, params, kind, _, message) in enumerate(zip(*columns, strict=True)):
            try:
                if kind is not None:
                    raise RowError(ErrorType(kind), message)
                self.llm.engine.add(str(index), EncodedRow(ids, SamplingParams.model_validate_json(params)))
                results.append(None)
            except RowError as error:
                results.append(error)
        while self.llm.engine.has_work:
            for output in self.llm.engine.step():
                results[int(output.request_id)] = output
        assert None not in results
        return results

    def _count(self, row: Any, end: dict[str, Any]) -> None:
        error = end["error_type"]
        if error is None:
            assert end["finish_reason"] in ("stop", "length"), end
            assert len(end["generated_tokens"]) == end["num_generated_tokens"] > 0, end
        else:
            assert ErrorType(error), end
            assert 0 < len(end["error_message"]) < 4000, end
        place = next((place for place, good in enumerate(GOOD) if row is good), None)
        if place is not None:
            assert end["generated_tokens"] == self._alone[place], (row, end)
            self.num_good += 1
        else:
            self.ends[error or "ok"] += 1


def _as_table(row: Any) -> pa.Table | None:
    """The row as columns of its own types, if Arrow has them."""
    try:
        columns = {name: pa.array([value]) for name, value in row.items() if isinstance(name, str)}
        table = pa.table(columns)
    except Exception:  # no mapping, no type, no UTF-8
        return None
    known = {"prompt", "messages", "prompt_token_ids"} & set(columns)
    return table if known and not {PLACE, *col.HIDDEN} & set(columns) else None


def fuzz(num_rows: int, first_seed: int, folder: Path) -> Fuzzer:
    """Run num_rows fuzzed rows; returns the counts."""
    save_tiny_llama(folder, max_position_embeddings=MAX_MODEL_LEN)
    fuzzer = Fuzzer(str(folder))
    number = first_seed
    while fuzzer.num_rows < num_rows:
        rows = make_rows(number, min(RUN_ROWS, num_rows - fuzzer.num_rows))
        for start in range(0, len(rows), BATCH_ROWS):
            try:
                fuzzer.run(rows[start : start + BATCH_ROWS])
            except BaseException as error:
                error.add_note(f"seed {number}, rows from {start}")
                raise
        number += 1
    return fuzzer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0, help="the first one; every thousand rows have another")
    args = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        fuzzer = fuzz(args.rows, args.seed, Path(folder))
    print(
        f"{fuzzer.num_rows:,} rows by preprocess, {fuzzer.num_columns:,} of them as columns too, seeds from {args.seed}"
    )
    print(f"0 engine deaths; {fuzzer.num_good:,} good rows among them, all with the tokens that they get alone")
    print(f"{time.monotonic() - start:,.0f} s\n\n| end | rows |\n|---|---|")
    for end, count in fuzzer.ends.most_common():
        print(f"| {end} | {count:,} |")


if __name__ == "__main__":
    main()
