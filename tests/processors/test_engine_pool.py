"""Two processors over one engine, which dies while both have rows in it; and who gets which engine of a pool."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace

import pytest
import ray

from rayinfer import LLM, ConfigError, EngineConfig, SamplingParams
from rayinfer.processors import EngineProcessorConfig, StatsBoard, build_processor
from rayinfer.processors.engine_pool import EnginePool, Membership
from rayinfer.processors.ray_compat import is_dead

NUM_ROWS = 60
GREEDY = {"temperature": 0, "max_tokens": 24, "ignore_eos": True}


def actors(name: str) -> list[dict]:
    return [actor for actor in ray._private.state.actors().values() if actor["ActorClassName"] == name]


def wait_for(condition) -> None:
    deadline = time.monotonic() + 400
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.2)


def answers(llm: LLM, prompts: list[str]) -> list[str]:
    return [output.outputs[0].text for output in llm.generate(prompts, SamplingParams(**GREEDY), use_tqdm=False)]


def test_two_processors_over_one_engine_that_dies(local_ray, model_path, engine_kwargs):
    config = EngineProcessorConfig(
        model_source=model_path, engine_kwargs=engine_kwargs, sampling_params=GREEDY, batch_size=4, engine_pool="both"
    )
    board = StatsBoard.remote()
    first = build_processor(
        config,
        preprocess=lambda row: {"prompt": f"row {row['id']}" if row["id"] != 7 else ""},
        postprocess=lambda row: {"id": row["id"], "one": row["generated_text"]},
        stats_actor=board,
    )
    second = build_processor(
        config,
        preprocess=lambda row: {"prompt": f"again: {row['one']}"},
        postprocess=lambda row: {"id": row["id"], "one": row["one"], "two": row["generated_text"]},
        stats_actor=board,
    )
    rows, killed, before = [], False, len(actors("_Engine"))
    for row in second(first(ray.data.range(NUM_ROWS, override_num_blocks=8))).iter_rows():
        rows.append(row)
        if not killed:  # the second one has answered rows, and the first is not done
            (engine,) = [actor for actor in actors("_Engine") if actor["State"] == "ALIVE"]
            os.kill(engine["Pid"], signal.SIGKILL)
            killed = True
    assert sorted(row["id"] for row in rows) == list(range(NUM_ROWS))
    good = [row for row in rows if row["id"] != 7]
    (bad,) = [row for row in rows if row["id"] == 7]
    assert (bad["error_type"], bad["one"], bad["two"]) == ("INVALID_PROMPT", None, None)
    llm = LLM(model_path, **engine_kwargs)
    assert [row["one"] for row in good] == answers(llm, [f"row {row['id']}" for row in good])
    assert [row["two"] for row in good] == answers(llm, [f"again: {row['one']}" for row in good])
    assert len(actors("_Engine")) == before + 1  # one in all
    assert max(int(actor["NumRestarts"]) for actor in actors("_Engine")) == 1
    assert ray.get(board.snapshot.remote())["num_engines"] <= 2  # before and after
    wait_for(lambda: all(actor["State"] == "DEAD" for name in ("_Engine", "EnginePool") for actor in actors(name)))


def test_who_gets_which_engine(local_ray):
    @ray.remote(num_cpus=0)
    class User:
        def id(self) -> str:
            return ray.get_runtime_context().get_actor_id()

    config = EngineConfig.parse(model="some/model")
    first, second = (Membership("pool", name, config, 2, {"num_cpus": 0}) for name in ("summarize", "classify"))
    other = replace(first, config=config.model_copy(update={"max_model_len": 99}))
    pool = EnginePool.remote()
    users = [User.remote() for _ in range(4)]
    ids = ray.get([user.id.remote() for user in users])
    join = lambda user, place: ray.get(pool.join.remote(user, place))._actor_id  # noqa: E731
    engines = [join(id, first) for id in ids[:2]]
    assert len(set(engines)) == 2
    assert {join(id, second) for id in ids[2:]} == set(engines)  # shared with the other processor
    assert join(ids[0], first) == engines[0]  # it looks for its engine again
    with pytest.raises(ConfigError, match=r"engine_pool = 'pool'.*but max_model_len is None and 99; give"):
        join(ids[0], other)
    pool_id = pool._actor_id.hex()
    del users[1:]
    wait_for(lambda: is_dead(engines[1].hex()))
    assert not is_dead(pool_id)  # the other one has a user
    assert not is_dead(engines[0].hex())
    users.clear()
    wait_for(lambda: is_dead(pool_id) and is_dead(engines[0].hex()))
