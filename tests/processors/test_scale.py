"""Pools that grow, runs that may take long, actors that leave a node, calls that yield nothing."""

from __future__ import annotations

import os
import time

import pytest
import ray
from ray.data import DataContext

from rayinfer.errors import ConfigError
from rayinfer.processors import EngineProcessorConfig, build_processor
from rayinfer.processors import processor as processor_module
from rayinfer.processors.drain import DrainWatch
from rayinfer.processors.ray_compat import IDLE, ending_nodes, finished_blocks, restart_actor

GUARD = "execution_no_progress_timeout_s"


def test_engines_to_begin_with(local_ray, model_path, engine_kwargs):
    """Of (CPUs, GPUs of an engine, CPUs of a tokenizer, engines) on a machine of three CPUs and no GPU."""
    for concurrency, num_gpus, expected in [
        ((1, 4), 1, (0.0, 1, 0.0, 4)),  # on a GPU: all, and no CPU, for reading needs one
        ((1, 2), 0, (1.0, 0, 1.0, 1)),  # on a CPU: those that leave one
        ((2, 4), 0, (0.0, 0, 0.0, 2)),
        (2, 1, (0.0, 1, 0.0, 2)),
    ]:
        config = EngineProcessorConfig(
            model_source=model_path, engine_kwargs=engine_kwargs, concurrency=concurrency, num_gpus=num_gpus
        )
        assert build_processor(config)._resources() == expected, concurrency


def test_tokenizers_of_map_kwargs_are_counted(monkeypatch, model_path, engine_kwargs):
    """Eight of one CPU each would leave none of eight to the read tasks, which then wait for ever."""
    monkeypatch.setattr(processor_module, "cluster_resources", lambda: {"CPU": 8.0})
    config = EngineProcessorConfig(model_source=model_path, engine_kwargs=engine_kwargs)
    for size in ({"concurrency": 8}, {"concurrency": (8, 9)}, {"compute": ray.data.ActorPoolStrategy(size=8)}):
        assert build_processor(config, preprocess_map_kwargs=size)._resources()[2] == 0.0
        with pytest.raises(ConfigError, match="8 tokenizer actors would hold 8 of the cluster's 8 CPUs"):
            build_processor(config, preprocess_map_kwargs={**size, "num_cpus": 1})._resources()


@pytest.mark.skipif(not hasattr(DataContext, GUARD), reason="this Ray ends no run that is slow")
def test_a_run_may_take_long_unless_its_user_says_otherwise(local_ray, model_path, engine_kwargs):
    processor = build_processor(EngineProcessorConfig(model_source=model_path, engine_kwargs=engine_kwargs))
    dataset = processor(ray.data.range(4))
    assert getattr(dataset.map(dict).context, GUARD) == -1
    assert dataset.context.autoscaling_config.actor_pool_util_downscaling_threshold == IDLE
    source = ray.data.range(4)
    setattr(source.context, GUARD, 77)
    source.context.autoscaling_config.actor_pool_util_downscaling_threshold = 0.25
    theirs = processor(source).context
    assert (getattr(theirs, GUARD), theirs.autoscaling_config.actor_pool_util_downscaling_threshold) == (77, 0.25)
    unchanged = DataContext.get_current()
    assert getattr(unchanged, GUARD) > 0
    assert unchanged.autoscaling_config.actor_pool_util_downscaling_threshold > IDLE


def test_an_actor_that_leaves_is_started_again_with_its_calls(local_ray, tmp_path):
    @ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
    class Leaves:
        def answer(self, path):
            if not os.path.exists(path):
                open(path, "w").close()
                restart_actor()
                time.sleep(400)  # Ray ends the process a moment later
                raise RuntimeError("it did not leave")
            return os.getpid(), ending_nodes()

    actor = Leaves.remote()
    assert ray.get(actor.answer.remote(str(tmp_path / "seen")), timeout=300)[1] == {}


def test_a_call_that_yields_nothing_leaves_no_block(local_ray):
    """Ray makes a block without rows and columns of it, in which no writer finds the rows' numbers."""

    def answer(table):
        if table["id"][0].as_py() == 1:
            yield table

    dataset = ray.data.range(3, override_num_blocks=3).map_batches(answer, batch_size=None, batch_format="pyarrow")
    blocks = [(ray.get(ref).to_pydict(), num_rows) for ref, num_rows, _ in finished_blocks(dataset)]
    assert blocks == [({"id": [1]}, 1)]


def test_calls_of_a_process_that_stays(local_ray):
    watch = DrainWatch()
    with watch.call(), watch.call():
        assert not watch.leaving
    watch.close()
