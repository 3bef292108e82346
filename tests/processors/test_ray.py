"""The processors in a real Ray: whole pipelines, a lost worker, what is refused before anything starts."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import ray

from rayinfer import LLM, ConfigError, SamplingParams
from rayinfer.processors import EngineProcessorConfig, LLMProcessor, StatsBoard, build_processor
from rayinfer.processors.ray_compat import map_blocks

NUM_ROWS = 40
BAD_ROWS = {5: {"prompt": ""}, 11: {"prompt": "x" * 300}, 23: {"prompt": "a", "sampling_params": {"top_p": 7}}}


def ask(row):
    if row["id"] in BAD_ROWS:
        return BAD_ROWS[row["id"]]
    params = {"temperature": 0, "max_tokens": 4 + row["id"] % 9, "ignore_eos": True}
    return {"messages": [{"role": "user", "content": f"say {row['id']}"}], "sampling_params": params}


def answer(row):
    return {
        "id": row["id"],
        "text": row["generated_text"],
        "tokens": row["generated_tokens"],
        "n": row["num_input_tokens"],
    }


@pytest.fixture(scope="module")
def config(model_path, engine_kwargs):
    return EngineProcessorConfig(model_source=model_path, engine_kwargs=engine_kwargs, batch_size=4)


@pytest.fixture(scope="module")
def expected(model_path, engine_kwargs):
    """Text, tokens and prompt length by LLM.chat, a row at a time."""
    llm = LLM(model_path, **engine_kwargs)
    rows = {}
    for id in set(range(NUM_ROWS)) - set(BAD_ROWS):
        asked = ask({"id": id})
        (output,) = llm.chat(asked["messages"], SamplingParams(**asked["sampling_params"]), use_tqdm=False)
        completion = output.outputs[0]
        rows[id] = (completion.text, completion.token_ids, len(output.prompt_token_ids))
    return rows


def check(rows, expected):
    assert sorted(row["id"] for row in rows) == list(range(NUM_ROWS))
    for row in rows:
        if row["id"] in BAD_ROWS:
            assert row["error_type"], row
            assert (row["text"], row["tokens"], row["n"]) == (None, None, None)
        else:
            assert (row["text"], list(row["tokens"]), row["n"]) == expected[row["id"]]
            assert (row["error_type"], row["error_message"]) == (None, None)


def test_pipeline_to_parquet_and_back(local_ray, config, expected, tmp_path):
    board = StatsBoard.remote()
    processor = build_processor(config, preprocess=ask, postprocess=answer, stats_actor=board)
    processor(ray.data.range(NUM_ROWS, override_num_blocks=3)).write_parquet(str(tmp_path))
    check(ray.data.read_parquet(str(tmp_path)).take_all(), expected)
    deadline = time.monotonic() + 300
    while (stats := ray.get(board.snapshot.remote())).get("num_finished") != len(expected):
        assert time.monotonic() < deadline, stats
        time.sleep(0.1)
    assert stats["num_generated_tokens"] == sum(len(tokens) for _, tokens, _ in expected.values())


def test_ray_data_llm_takes_the_config(local_ray, config, expected):
    reason = "it needs packages that Ray Data alone does not bring, aiohttp for one"
    ray_data_llm = pytest.importorskip("ray.data.llm", reason=reason, exc_type=ImportError)
    processor = ray_data_llm.build_processor(config, preprocess=ask, postprocess=answer)
    check(processor(ray.data.range(NUM_ROWS, override_num_blocks=3)).take_all(), expected)
    assert "vllm" not in sys.modules


def test_bare_map_batches_streams_and_survives_a_lost_worker(local_ray, model_path, engine_kwargs, tmp_path):
    """Numpy batches, no build_processor. The first worker dies with blocks handed out and others not."""
    died = str(tmp_path / "died")

    class DiesOnce(LLMProcessor):
        def __call__(self, batch):
            for number, block in enumerate(super().__call__(batch)):
                if number == 2 and not os.path.exists(died):
                    Path(died).touch()
                    time.sleep(1)  # let the consumer take the first blocks
                    os._exit(1)
                yield block.append_column("at", [[time.time()] * block.num_rows])
                time.sleep(0.05)

    def table(row):
        return {
            "id": row["id"],
            "prompt": f"row {row['id']}",
            "sampling_params": {"max_tokens": 4 + 50 * (row["id"] % 4)},
        }

    dataset = ray.data.range(64, override_num_blocks=4).map(table).map_batches(
        DiesOnce,
        fn_constructor_kwargs=dict(model=model_path, sampling_params=dict(temperature=0), **engine_kwargs),
        compute=ray.data.ActorPoolStrategy(size=1, max_tasks_in_flight_per_actor=4),
        max_concurrency=4,
        batch_size=16,
        num_cpus=0,
    )  # fmt: skip
    ids, delays, attempts = [], [], set()
    for batch in dataset.iter_batches(batch_size=None, prefetch_batches=0):
        delays.append(time.time() - batch["at"][0])
        ids += batch["id"].tolist()
        attempts |= set(batch["attempts"].tolist())
    assert os.path.exists(died)
    assert sorted(ids) == list(range(64))
    assert 2 in attempts
    assert len(delays) >= 12  # blocks of a quarter of a call, not one for each call


def test_a_long_row_holds_no_call_and_no_row(local_ray, config, expected):
    """With any_rows: of each batch one row is far longer than the rest, and 2 calls run at once."""
    longest = 1500  # takes far longer than Ray takes to bring the next calls

    def ask_long(row):
        asked = ask(row)
        if row["id"] % 4 == 0 and row["id"] not in BAD_ROWS:
            asked["sampling_params"] |= {"max_tokens": longest}
        return asked

    length = {"max_model_len": 2048, "hf_overrides": {"max_position_embeddings": 2048}}
    few = config.model_copy(update={"max_concurrent_batches": 2, "engine_kwargs": config.engine_kwargs | length})
    processor = replace(build_processor(few, preprocess=ask_long), any_rows=True)
    rows = processor(ray.data.range(NUM_ROWS, override_num_blocks=1)).take_all()
    assert sorted(row["id"] for row in rows) == list(range(NUM_ROWS))
    good = [row for row in rows if row["id"] not in BAD_ROWS]
    is_long = [row["id"] % 4 == 0 for row in good]
    for row, long in zip(good, is_long, strict=True):
        assert row["num_generated_tokens"] == (longest if long else len(expected[row["id"]][1]))
        assert list(row["generated_tokens"])[:4] == expected[row["id"]][1][:4]
    first_long = is_long.index(True)
    assert first_long > 6, "more short rows than two calls hold came before a long one"


def test_refused_before_an_actor_starts(local_ray, model_path, engine_kwargs, tmp_path):
    (tmp_path / "config.json").write_text((Path(model_path) / "config.json").read_text())  # no weights
    dataset = ray.data.range(4)
    for source in (str(tmp_path), str(tmp_path / "nowhere")):
        processor = build_processor(EngineProcessorConfig(model_source=source, engine_kwargs=engine_kwargs))
        with pytest.raises(ConfigError):
            processor(dataset)
    processor = build_processor(EngineProcessorConfig(model_source=model_path, engine_kwargs=engine_kwargs), ask)
    mine = ray.data.from_items([{"id": 1, "generated_text": "mine"}])
    with pytest.raises(ConfigError, match="column 'generated_text': an output has this name"):
        processor(mine)
    greedy = EngineProcessorConfig(model_source=model_path, concurrency=8, num_cpus=1)
    with pytest.raises(ConfigError, match="reading needs one"):
        build_processor(greedy)(dataset)


def test_processors_in_a_chain_and_a_column_that_only_rows_tell(local_ray, config):
    """The second one's outputs take the place of the first one's; a column of the user's is not lost without a word."""
    both = config.model_copy(update={"engine_pool": "chain"})  # two engines want more CPUs than this Ray has
    again = build_processor(both, preprocess=lambda row: {"prompt": f"again: {row['generated_text']}"})
    params = {"max_tokens": 3, "temperature": 0, "ignore_eos": True}  # a column of the first one's result, as JSON
    first = build_processor(both, lambda row: {"prompt": f"row {row['id']}", "sampling_params": params})
    rows = again(first(ray.data.range(4))).take_all()
    assert sorted(row["id"] for row in rows) == list(range(4))
    assert all(row["prompt"].startswith("again: ") and row["error_type"] is None for row in rows), rows
    assert {row["num_generated_tokens"] for row in rows} == {3}
    mine = ray.data.range(4).map(lambda row: {**row, "generated_text": "mine"})
    with pytest.raises(Exception, match="column 'generated_text': an output has this name"):
        build_processor(config, preprocess=ask)(mine).take_all()


def test_on_error_raise_stops_the_job(local_ray, model_path, engine_kwargs):
    config = EngineProcessorConfig(model_source=model_path, engine_kwargs=engine_kwargs, batch_size=4, on_error="raise")
    with pytest.raises(Exception, match=r"row \d of its batch, id='(5|11|23)': (INVALID|PROMPT)_"):
        build_processor(config, preprocess=ask)(ray.data.range(NUM_ROWS)).take_all()


def test_many_engines_make_no_more_workers_ready_than_one(local_ray, config, monkeypatch):
    """They are processes of some hundred MB: 16 for each of a node's 8 engines would be too many."""
    made = []

    def note(dataset, operator, batch_size, **options):
        made.append(options["fn_constructor_kwargs"]["num_warm"])
        return map_blocks(dataset, operator, batch_size, **options)

    monkeypatch.setattr("rayinfer.processors.processor.map_blocks", note)
    for changes in ({}, {"concurrency": (1, 8)}, {"concurrency": 40}, {"runtime_env": {"env_vars": {"A": "1"}}}):
        build_processor(config.model_copy(update=changes))(ray.data.range(4))
    assert made == [4, 1, 1, 0]


def test_config_errors_name_the_key():
    for wrong, match in [
        ({"engine_kwargs": {"max_num_seq": 4}}, "max_num_seqs"),
        ({"engine_kwargs": {"model": "b"}}, "model_source"),
        ({"concurency": 2}, "concurrency"),
        ({"concurrency": (3, 2)}, "m <= n"),
        ({"sampling_params": {"temprature": 1}}, "temperature"),
        ({"task_type": "embed"}, "generate"),
        ({"on_error": "ignore"}, "record"),
    ]:
        with pytest.raises(ConfigError, match=match):
            EngineProcessorConfig(model_source="m", **wrong)


def test_building_does_nothing():
    """No Ray, no torch, no file: the model does not even exist."""
    code = (
        "import sys, ray\n"
        "from rayinfer.processors import EngineProcessorConfig, build_processor, LLMProcessor\n"
        "build_processor(EngineProcessorConfig(model_source='/nowhere'), preprocess=lambda row: row)\n"
        "assert not ray.is_initialized()\n"
        "assert not {'torch', 'transformers', 'vllm'} & set(sys.modules)\n"
    )
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stderr
