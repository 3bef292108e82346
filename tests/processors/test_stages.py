"""The stages called directly, without a cluster: rows, errors and Arrow types."""

from __future__ import annotations

import inspect
import json
import pickle
import shutil
import subprocess
import sys
import threading

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from rayinfer import ConfigError, EngineConfig, RowError, SamplingParams
from rayinfer.inputs import InputProcessor
from rayinfer.processors import LLMProcessor
from rayinfer.processors import columns as col
from rayinfer.processors.llm_processor import with_defaults
from rayinfer.processors.stages import Prepare, finish

GREEDY = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}
BAD = {
    "empty": ({"prompt": ""}, "INVALID_PROMPT"),
    "none": ({"prompt": None}, "INVALID_PROMPT"),
    "nothing": ({}, "INVALID_PROMPT"),
    "too_long": ({"prompt": "x" * 256}, "PROMPT_TOO_LONG"),
    "malformed": ({"messages": [{"content": "no role"}]}, "INVALID_PROMPT"),
    "not_messages": ({"messages": "text"}, "INVALID_PROMPT"),
    "unknown": ({"prompt": "a", "sampling_params": {"temprature": 0}}, "INVALID_SAMPLING_PARAMS"),
    "range": ({"prompt": "a", "sampling_params": {"top_p": 2.0}}, "INVALID_SAMPLING_PARAMS"),
    "nan": ({"prompt": "a", "sampling_params": {"temperature": float("nan")}}, "INVALID_SAMPLING_PARAMS"),
    "no_mapping": ({"prompt": "a", "sampling_params": "greedy"}, "INVALID_SAMPLING_PARAMS"),
    "ids": ({"prompt_token_ids": [1, 2, 99999]}, "INVALID_TOKEN_IDS"),
    "raises": (ZeroDivisionError("no"), "PREPROCESS_ERROR"),
    "no_dict": (42, "PREPROCESS_ERROR"),
}


def ask(row):
    """A preprocess: the good rows' prompts, or what the row's name says is wrong."""
    value = BAD[row["name"]][0] if row["name"] in BAD else {"prompt": f"row {row['id']}"}
    if isinstance(value, Exception):
        raise value
    return value


def prepare(model_path, engine_kwargs, preprocess=ask, **kwargs):
    inputs = InputProcessor(EngineConfig.parse(model=model_path, **engine_kwargs))
    return Prepare(inputs, preprocess, **{"sampling_params": GREEDY, "batch_size": 8, "on_error": "record", **kwargs})


@pytest.fixture(scope="module")
def llm(model_path, engine_kwargs):
    processor = LLMProcessor(model_path, sampling_params=GREEDY, **engine_kwargs)
    yield processor
    processor.close()


@pytest.fixture(scope="module")
def expected(model_path, engine_kwargs):
    """Greedy tokens by transformers, one prompt at a time."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_path), AutoTokenizer.from_pretrained(model_path)
    model.generation_config.eos_token_id = None

    def tokens(prompt: str) -> list[int]:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        out = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
        return out[0, ids.shape[1] :].tolist()

    return tokens


def run(llm, stage, table, postprocess=None, on_error="record"):
    """All three stages over one table, in this process."""
    blocks = [block for call in stage(table) for block in llm(call)]
    return [finish(block, postprocess, on_error) for block in blocks]


def names_table(names):
    ids = pa.array(range(len(names)), pa.int16())
    return pa.table({"id": ids, "name": names, "when": pa.array([0] * len(names), pa.timestamp("ms"))})


def test_bad_rows_cost_themselves_only(llm, model_path, engine_kwargs, expected):
    names = [name for bad in BAD for name in ("good", bad)]
    table = names_table(names)
    blocks = run(llm, prepare(model_path, engine_kwargs), table, lambda row: row)
    result = pa.concat_tables(blocks, promote_options="default").sort_by("id")  # this preprocess adds what it likes
    assert result.column("id").to_pylist() == list(range(len(names)))
    for row in result.to_pylist():
        if row["name"] == "good":
            assert row["generated_tokens"] == expected(f"row {row['id']}")
            assert (row["error_type"], row["error_stage"], row["attempts"]) == (None, None, 1)
            assert row["finish_reason"] == "length"
        else:
            assert row["error_type"] == BAD[row["name"]][1], row
            assert row["error_stage"] == ("preprocess" if row["error_type"] == "PREPROCESS_ERROR" else "encode")
            assert row["error_message"]
            assert (row["generated_text"], row["generated_tokens"], row["finish_reason"]) == (None, None, "error")
    assert result.schema.field("id").type == pa.int16()
    assert result.schema.field("when").type == pa.timestamp("ms")
    for field in col.OUTPUT:
        if field.name not in col.WHEN_ASKED:
            assert result.schema.field(field.name).type == field.type


@pytest.mark.parametrize(
    "postprocess",
    [
        None,
        lambda row: {"id": row["id"], "summary": row["generated_text"], "n": row["num_generated_tokens"]},
        lambda row: {"id": row["id"], "size": len(row["generated_text"]), "tokens": row["generated_tokens"][:2]},
        lambda row: {"id": row["id"], "known": row["id"] * 1.5, **({"error_type": row["error_type"]})},
    ],
    ids=["none", "renamed", "raises_on_bad", "own_error_type"],
)
def test_good_bad_and_mixed_blocks_have_one_schema(llm, model_path, engine_kwargs, postprocess, tmp_path):
    stage = prepare(model_path, engine_kwargs, lambda row: ask(row) if row["name"] == "good" else {"prompt": ""})
    schemas = []
    for number, names in enumerate((["bad"] * 3, ["good"] * 3, ["bad", "good", "bad"])):
        blocks = run(llm, stage, names_table(names), postprocess)
        schemas += [block.schema for block in blocks]
        pq.write_table(pa.concat_tables(blocks), tmp_path / f"{number}.parquet")
    if postprocess is None:  # the types of what preprocess added are those of its values: here a string
        assert all(schema.field("prompt").type == pa.string() for schema in schemas)
    assert all(schema.equals(schemas[0]) for schema in schemas), schemas
    rows = pq.read_table(tmp_path).to_pylist()  # one read of all files: the schemas agree on disk, too
    assert len(rows) == 9
    assert sum(row["error_type"] is not None for row in rows) == 5
    assert all(row["id"] is not None for row in rows)


def test_values_that_python_cannot_hold_cost_their_row(llm, model_path, engine_kwargs, expected):
    texts = pa.array([b"fine", b"\xff", b"fine"]).view(pa.string())  # no UTF-8: Arrow reads it without a look
    days = pa.array([0, 0, 10**7], pa.int32()).view(pa.date32())  # the year 29349
    table = names_table(["good"] * 3).append_column("text", texts).append_column("day", days)
    for postprocess in (None, lambda row: row):
        blocks = run(llm, prepare(model_path, engine_kwargs), table, postprocess)
        result = pa.concat_tables(blocks, promote_options="default").sort_by("id")
        assert result.select(table.column_names).equals(table), "what a row had it keeps"
        assert result["error_type"].to_pylist() == [None, "INVALID_PROMPT", "INVALID_PROMPT"]
        assert result["error_stage"].to_pylist() == [None, "read", "read"]
        assert "'text'" in result["error_message"][1].as_py()
        assert "'day'" in result["error_message"][2].as_py()
        assert result["generated_tokens"].to_pylist() == [expected("row 0"), None, None]
    bare = pa.concat_tables(llm(pa.table({"id": range(3), "prompt": texts}))).sort_by("id")
    assert bare["error_type"].to_pylist() == [None, "INVALID_PROMPT", None]


def test_postprocess_that_raises_costs_its_row(llm, model_path, engine_kwargs):
    def picky(row):
        if row["error_type"] is None and row["id"] == 1:
            raise KeyError("answer")
        return {"id": row["id"], "text": row["generated_text"]}

    table = names_table(["good", "good", "empty"])
    rows = pa.concat_tables(run(llm, prepare(model_path, engine_kwargs), table, picky)).sort_by("id").to_pylist()
    assert [row["error_type"] for row in rows] == [None, "POSTPROCESS_ERROR", "INVALID_PROMPT"]
    assert [row["error_stage"] for row in rows] == [None, "postprocess", "encode"]
    assert rows[0]["text"]
    assert rows[1]["text"] is None
    with pytest.raises(RowError, match=r"id='1'.*POSTPROCESS_ERROR.*KeyError"):
        run(llm, prepare(model_path, engine_kwargs), table.slice(0, 2), picky, on_error="raise")
    rows = finish(
        run(llm, prepare(model_path, engine_kwargs), table.slice(0, 1))[0], lambda row: 7, "record"
    ).to_pylist()
    assert rows[0]["error_type"] == "POSTPROCESS_ERROR"


def test_on_error_raise_names_the_row(model_path, engine_kwargs):
    stage = prepare(model_path, engine_kwargs, on_error="raise")
    with pytest.raises(RowError, match="row 2 of its batch, id='2': PROMPT_TOO_LONG"):
        list(stage(names_table(["good", "good", "too_long"])))
    bare = LLMProcessor(model_path, on_error="raise", **engine_kwargs)
    with pytest.raises(RowError, match=r"row 1 of its batch.*INVALID_PROMPT"):
        list(bare(pa.table({"prompt": ["a", ""]})))
    bare.close()


def test_blocks_come_while_the_slowest_row_runs(llm):
    params = [dict(GREEDY, max_tokens=240 if i == 3 else 2) for i in range(8)]
    blocks = llm(pa.table({"id": list(range(8)), "prompt": ["a"] * 8, "sampling_params": params}))
    first = next(blocks)
    rest = list(blocks)
    assert 3 not in first.column("id").to_pylist()
    assert sorted(id for block in [first, *rest] for id in block.column("id").to_pylist()) == list(range(8))


def test_same_batch_gives_the_same_blocks(llm):
    """Ray repeats the call of a dead worker and skips the blocks that it has: they must hold the same rows."""
    params = [dict(GREEDY, max_tokens=1 + (i * 7) % 5) for i in range(16)]
    table = pa.table(
        {"id": list(range(16)), "prompt": ["a" * (1 + i % 3) for i in range(16)], "sampling_params": params}
    )
    runs = [[block.column("id").to_pylist() for block in llm(table)] for _ in range(2)]
    assert runs[0] == runs[1]
    assert len(runs[0]) == 4


def test_calls_share_one_running_batch(llm):
    """Four calls, 150 steps each, in far fewer than 600 steps."""

    def call(texts):
        for block in llm(pa.table({"prompt": texts, "sampling_params": [dict(GREEDY, max_tokens=150)] * 2})):
            results.extend(block.column("num_generated_tokens").to_pylist())

    results: list[int] = []
    before = llm._engine.stats().num_steps
    threads = [threading.Thread(target=call, args=([f"{i}", f"{i} b"],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [150] * 8
    assert llm._engine.stats().num_steps - before < 450


@pytest.mark.parametrize("kind", ["numpy", "pandas", "pyarrow"])
def test_batch_formats(llm, kind, expected):
    messages = [[{"role": "user", "content": "hello"}], [{"role": "user", "content": "you"}]]
    batch = {
        "numpy": {
            "id": np.arange(2),
            "messages": np.array([np.array(m, dtype=object) for m in messages], dtype=object),
        },
        "pandas": pd.DataFrame({"id": [0, 1], "messages": messages}),
        "pyarrow": pa.table({"id": [0, 1], "messages": messages}),
    }[kind]
    result = pa.concat_tables(list(llm(batch))).sort_by("id").to_pylist()
    assert [row["generated_tokens"] for row in result] == [expected("[user]hello[bot]"), expected("[user]you[bot]")]


def test_row_sampling_params_complete_the_defaults(llm, model_path, engine_kwargs):
    """Fields that other rows' structs bring along as nulls are absent ones; a None of preprocess's own is meant."""
    own = [{"max_tokens": 3}, {"temperature": 0.0}, None]
    table = pa.table({"prompt": ["a", "b", "c"], "sampling_params": own})
    assert pa.concat_tables(list(llm(table))).sort_by("prompt").column("num_generated_tokens").to_pylist() == [3, 8, 8]
    stage = prepare(model_path, engine_kwargs, lambda row: {"prompt": "a", "sampling_params": {"max_tokens": None}})
    (encoded,) = stage(names_table(["good"]))
    assert SamplingParams.model_validate_json(encoded.column(col.PARAMS)[0].as_py()).max_tokens is None
    stage = prepare(model_path, engine_kwargs, lambda row: {"prompt": "a"}, sampling_params={"max_tokens": None})
    (encoded,) = stage(names_table(["good"]))  # so is one of the job's own, which came back as the default, 16
    assert SamplingParams.model_validate_json(encoded.column(col.PARAMS)[0].as_py()).max_tokens is None
    kind = pa.map_(pa.string(), pa.float64())  # as Spark's tables have: the job's parameters were left out
    mapped = pa.table({"prompt": ["a"], "sampling_params": pa.array([[("max_tokens", 3.0)]], kind)})
    (encoded,) = prepare(model_path, engine_kwargs, None)(mapped)
    assert json.loads(encoded.column(col.PARAMS)[0].as_py()) == {**GREEDY, "max_tokens": 3}


def test_a_sampling_params_object_completes_the_defaults(model_path, engine_kwargs):
    for value, expected in ((SamplingParams(top_k=5), (5, 8, 0)), (SamplingParams(max_tokens=None), (0, None, 0))):
        stage = prepare(model_path, engine_kwargs, lambda row, v=value: {"prompt": "a", "sampling_params": v})
        (encoded,) = stage(names_table(["good"]))
        params = SamplingParams.model_validate_json(encoded.column(col.PARAMS)[0].as_py())
        assert (params.top_k, params.max_tokens, params.temperature) == expected
        assert with_defaults({"sampling_params": value}, GREEDY)["sampling_params"].temperature == 0


RARE = pa.table(
    {
        "id": pa.array([1, 2], pa.int32()),
        "when": pa.array([1, 1700000000123456789], pa.timestamp("ns")),
        "took": pa.array([1, None], pa.duration("ns")),
        "time": pa.array([1, 2], pa.time64("ns")),
        "map": pa.array([[("a", 1)], []], pa.map_(pa.string(), pa.int32())),
        "large": pa.array([2**64 - 1, 0], pa.uint64()),
        "nothing": pa.array([None, None], pa.string()),
        "vector": pa.array([[0.1, float("nan")], [1.0, 2.0]], pa.list_(pa.float32())),
        "score": pa.array([float("nan"), 0.1], pa.float32()),
        "kind": pa.array(["a", "b"]).dictionary_encode(),
        "tags": pa.array([["old"], []], pa.list_(pa.string())),
        "meta": pa.array([{"a": 1}, {"a": 2}], pa.struct([("a", pa.int8())])),
    }
)


def with_row(table, *changes):
    """The table, as it is when preprocess returned its rows, changed."""
    rows = [{**row, **change} for row, change in zip(table.to_pylist(), changes or ({}, {}), strict=True)]
    return table.append_column(col.ROW, pa.array([pickle.dumps(row) for row in rows], pa.binary()))


def test_a_row_that_is_returned_keeps_its_types_and_values():
    for table in (RARE, with_row(RARE)):
        for postprocess in (None, lambda row: row, lambda row: pickle.loads(pickle.dumps(row))):
            result = finish(table, postprocess, "record").select(RARE.column_names)
            assert result.schema == RARE.schema
            assert str(result.to_pylist()) == str(RARE.to_pylist())
            for name in ("when", "took", "time"):
                assert result[name].cast(pa.int64()) == RARE[name].cast(pa.int64())


def test_a_row_that_is_changed_keeps_the_types_that_hold_it():
    changes = {"id": 7, "when": pd.Timestamp(5, unit="ns"), "nothing": "x", "kind": "c", "score": 0.5}
    wider = {"id": 2**40, "nothing": 2.0, "meta": {"a": 2, "b": 1}, "vector": [0.1]}
    for change, kinds in (
        (changes, {name: RARE.schema.field(name).type for name in changes}),
        (wider, {"id": pa.int64(), "nothing": pa.float64()}),
    ):
        for postprocess, table in ((None, with_row(RARE, change, {})), (lambda row, c=change: {**row, **c}, RARE)):
            result = finish(table, postprocess, "record")
            assert {name: result.schema.field(name).type for name in kinds} == kinds
            assert {name: result[name][0].as_py() for name in change} == change


def test_a_value_that_is_changed_in_its_place_is_not_lost():
    def postprocess(row):
        row["tags"].append("new")
        row["meta"]["b"] = "more"
        return row

    result = finish(RARE, postprocess, "record")
    assert result["tags"].to_pylist() == [["old", "new"], ["new"]]
    assert result["tags"].type == RARE["tags"].type
    assert result["meta"].to_pylist() == [{"a": 1, "b": "more"}, {"a": 2, "b": "more"}]


def test_logprobs_when_asked(llm, model_path, engine_kwargs):
    asked = dict(GREEDY, max_tokens=2, logprobs=2, prompt_logprobs=1)
    (block,) = llm(pa.table({"prompt": ["ab"], "sampling_params": [asked]}))
    row = block.to_pylist()[0]
    assert [len(entries) >= 2 for entries in row["logprobs"]] == [True, True]
    assert row["generated_tokens"][0] in {entry["token_id"] for entry in row["logprobs"][0]}
    assert row["prompt_logprobs"][0] is None
    assert len(row["prompt_logprobs"]) == 2
    assert "logprobs" not in next(llm(pa.table({"prompt": ["ab"]}))).column_names


def test_calls_are_even_and_at_most_batch_size(model_path, engine_kwargs):
    stage = prepare(model_path, engine_kwargs, batch_size=8)
    assert [block.num_rows for block in stage(names_table(["good"] * 17))] == [6, 6, 5]


def test_columns_of_one_name_do_not_clash(llm, model_path, engine_kwargs):
    """A table that was processed before, and one with a prompt of its own that preprocess replaces."""
    none = pa.array([None], pa.string())
    errors = {"error_type": ["user's own"], "error_stage": none, "error_message": none}
    table = pa.table({"id": [0], "prompt": ["old"], **errors, "generated_text": [1]})
    stage = prepare(model_path, engine_kwargs, lambda row: {"messages": [{"role": "user", "content": "x"}]})
    (result,) = run(llm, stage, table)
    row = result.to_pylist()[0]
    assert row["error_type"] is None
    assert isinstance(row["generated_text"], str)
    assert row["prompt"] == "old"
    assert row["messages"] == [{"role": "user", "content": "x"}]
    stage = prepare(model_path, engine_kwargs, lambda row: {"prompt": "new", "id": row["id"] + 5})
    for postprocess in (None, lambda row: row):
        (result,) = run(llm, stage, table, postprocess)
        assert (result.to_pylist()[0]["prompt"], result.to_pylist()[0]["id"]) == ("new", 5)


def test_a_column_that_an_output_would_replace_is_refused(llm, model_path, engine_kwargs):
    """Unless a processor made it: its tables have at least two of the error columns."""
    stage = prepare(model_path, engine_kwargs)
    for name in ("generated_text", "error_type", "attempts"):
        table = names_table(["good"]).append_column(name, pa.array(["mine"]))
        with pytest.raises(ConfigError, match=f"column '{name}': an output has this name.*rename it, or drop it"):
            run(llm, stage, table)
    table = names_table(["good"]).append_column("logprobs", pa.array([7]))  # an output where it is asked for
    (result,) = run(llm, stage, table)
    assert result["logprobs"].to_pylist() == [7]
    with pytest.raises(ConfigError, match="column 'logprobs'"):
        run(llm, prepare(model_path, engine_kwargs, sampling_params=dict(GREEDY, logprobs=1)), table)
    (first,) = run(llm, stage, names_table(["good"]))
    for dropped in ([], ["error_type"], ["error_message"]):
        (second,) = run(llm, stage, first.drop_columns([*dropped]))
        assert second["generated_text"].to_pylist() == first["generated_text"].to_pylist()
        assert second.column_names.count("generated_text") == 1
    with pytest.raises(ConfigError, match="column 'generated_text'"):
        run(llm, stage, first.select(["id", "name", "generated_text"]))


def test_a_row_that_failed_before_stays_failed(llm, model_path, engine_kwargs):
    """In two processors one after the other: an error must not become the answer to half a prompt."""
    stage = prepare(model_path, engine_kwargs)
    first = run(
        llm, stage, names_table(["good", "empty"]), lambda row: {"id": row["id"], "text": row["generated_text"]}
    )
    second = prepare(model_path, engine_kwargs, lambda row: {"prompt": f"Say {row['text']}"})
    for postprocess in (None, lambda row: row):
        blocks = [done for block in first for done in run(llm, second, block, postprocess)]
        good, bad = pa.concat_tables(blocks, promote_options="default").sort_by("id").to_pylist()
        assert (good["error_type"], good["num_generated_tokens"]) == (None, 8)
        assert (bad["error_type"], bad["error_stage"]) == ("INVALID_PROMPT", "encode")
        assert (bad["error_message"], bad["generated_text"]) == ("prompt: is empty", None)


def test_nan_in_one_row(model_path, engine_kwargs, expected, tmp_path):
    shutil.copytree(model_path, tmp_path / "nan")
    weights = load_file(tmp_path / "nan" / "model.safetensors")
    weights["model.embed_tokens.weight"][AutoTokenizer.from_pretrained(model_path)("~")["input_ids"][0]] = float("nan")
    save_file(weights, tmp_path / "nan" / "model.safetensors", {"format": "pt"})
    processor = LLMProcessor(str(tmp_path / "nan"), sampling_params=GREEDY, **engine_kwargs)
    blocks = list(processor(pa.table({"prompt": ["ab", "a~b", "cd"]})))
    rows = {row["prompt"]: row for block in blocks for row in block.to_pylist()}
    assert (rows["a~b"]["error_type"], rows["a~b"]["error_stage"]) == ("NAN_LOGITS", "engine")
    assert [rows[prompt]["generated_tokens"] for prompt in ("ab", "cd")] == [expected("ab"), expected("cd")]
    processor.close()


def test_an_engine_that_cannot_be_replaced_stops_the_call(model_path, engine_kwargs, tmp_path):
    shutil.copytree(model_path, tmp_path / "model")
    processor = LLMProcessor(str(tmp_path / "model"), **engine_kwargs)
    rows = {"prompt": ["a"] * 4, "sampling_params": [dict(GREEDY, max_tokens=200)] * 4}
    list(processor(pa.table({"prompt": ["a"]})))  # it has its tokenizer now
    shutil.rmtree(tmp_path / "model")
    processor._engine._child._process.kill()
    with pytest.raises(RuntimeError, match=r"engine (cannot go on|died)") as caught:
        list(processor(pa.table(rows)))
    assert isinstance(caught.value.__cause__, ConfigError)
    processor.close()


ROWS = [{"prompt": "a<eos>b"}, {"messages": [{"role": "user", "content": "a<eos>b"}]}, {"prompt": ""}]


def ends(inputs):
    return [str(row) if isinstance(row, RowError) else row.prompt_token_ids for row in inputs.encode_batch(ROWS)]


def test_inputs_take_their_tokenizer_along(model_path, engine_kwargs, tmp_path):
    """To a process that needs neither the model's files nor torch, from one that has rendered a template already."""
    shutil.copytree(model_path, tmp_path / "model")
    inputs = InputProcessor(EngineConfig.parse(model=str(tmp_path / "model"), **engine_kwargs))
    want, sent = ends(inputs), pickle.dumps(inputs)
    shutil.rmtree(tmp_path / "model")
    code = f"""if True:
        import json, pickle, sys
        from rayinfer.errors import RowError
        inputs = pickle.load(sys.stdin.buffer)
        {inspect.getsource(ends).replace(chr(10), chr(10) + " " * 8)}
        ROWS = {ROWS!r}
        print(json.dumps(ends(inputs)), 'torch' in sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", code], input=sent, capture_output=True, timeout=400)
    assert done.stdout.decode().strip() == f"{json.dumps(want)} False", done.stderr


def test_a_tokenizer_of_other_code_is_made_anew(model_path, engine_kwargs):
    """Its module may not be there where it comes to."""
    inputs = InputProcessor(EngineConfig.parse(model=model_path, **engine_kwargs))
    kind = type(inputs.tokenizer)
    inputs.tokenizer.__class__ = type("Other", (kind,), {})
    again = pickle.loads(pickle.dumps(inputs))
    assert (type(again.tokenizer), ends(again)) == (kind, ends(inputs))
    assert inputs.with_template(None, None).tokenizer is inputs.tokenizer
