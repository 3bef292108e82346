"""`build_processor`: prepare rows on CPUs, answer them in engines, finish them on CPUs; all as one lazy Dataset."""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from ray.data import ActorPoolStrategy, Dataset, TaskPoolStrategy

from rayinfer.config import EngineConfig
from rayinfer.errors import ConfigError
from rayinfer.processors.columns import refuse_taken
from rayinfer.processors.config import Concurrency, EngineProcessorConfig, bounds
from rayinfer.processors.engine_pool import Membership, SharedProcessor
from rayinfer.processors.functions import RowFunction
from rayinfer.processors.llm_processor import LLMProcessor
from rayinfer.processors.ray_compat import bear_slow_engines, cluster_resources, map_blocks
from rayinfer.processors.stages import Prepare, finish

if TYPE_CHECKING:
    from rayinfer.inputs import InputProcessor

MAX_WARM = 4, 16  # workers, of all engines on CPUs, on GPUs: of the last stage's tasks no more run at once


def build_processor(
    config: EngineProcessorConfig, preprocess: RowFunction | None = None, postprocess: RowFunction | None = None,
    preprocess_map_kwargs: Mapping[str, Any] | None = None, postprocess_map_kwargs: Mapping[str, Any] | None = None,
    stats_actor: Any = None,
) -> Processor:  # fmt: skip
    """Describe what is to be done with a dataset; nothing is read, started or loaded here.

    Args:
        preprocess: takes a row, returns the columns to add: `messages`, `prompt` or `prompt_token_ids`, and maybe
            `sampling_params`. Without it the rows have these columns.
        postprocess: takes a row with all columns, those added by preprocess and the outputs, and returns the row of
            the result, to which `error_type`, `error_stage` and `error_message` are appended. A failed row comes with
            its outputs None. Without it the result has all columns.
            Both may be called again for a row, when a process is lost. A row fails with which they take over
            `function_timeout_s`, or end their process.
        preprocess_map_kwargs, postprocess_map_kwargs: for `map_batches` of these two stages: num_cpus, memory,
            concurrency and the like.
        stats_actor: handle of a StatsBoard that engines report to.

    Processors of one job whose configs name the same `engine_pool` share its engines.

    A column of the dataset that has the name of an output, such as `generated_text`, is refused, as it would be lost.
    The outputs of an earlier processor, whose tables have at least two of the three error columns, are replaced; what
    preprocess returns under such a name is left out.
    """
    if not isinstance(config, EngineProcessorConfig):
        raise ConfigError(f"config: want an EngineProcessorConfig, got {type(config).__name__}")
    map_kwargs = dict(preprocess_map_kwargs or {}), dict(postprocess_map_kwargs or {})
    return Processor(config, preprocess, postprocess, *map_kwargs, stats_actor)


@dataclass(frozen=True)
class Processor:
    """Call it on a Dataset to get the Dataset of the results."""

    config: EngineProcessorConfig
    preprocess: RowFunction | None = None
    postprocess: RowFunction | None = None
    preprocess_map_kwargs: dict[str, Any] = field(default_factory=dict)
    postprocess_map_kwargs: dict[str, Any] = field(default_factory=dict)
    stats_actor: Any = None
    any_rows: bool = False  # see LLMProcessor; only for a caller who checks the result by key
    inputs: InputProcessor | None = None  # of the model on a CPU, if the caller has one

    def __call__(self, dataset: Dataset) -> Dataset:
        """Add the three stages to a dataset's plan, after a look at the model's files and the cluster's resources.

        Raises:
            ConfigError: the model, its tokenizer or the resources cannot do, or a column has the name of an output; no
                engine has started then. (Of columns that only the rows tell, the first block raises it.)
        """
        from rayinfer.inputs import InputProcessor

        config = self.config
        refuse_taken(dataset.columns(fetch_if_missing=False) or ())
        num_cpus, num_gpus, prepare_cpus, num_engines = self._resources()
        engine = config.engine_config()
        if engine.device == "auto":
            engine = engine.model_copy(update={"device": "cuda" if num_gpus else "cpu"})
        inputs = self.inputs or InputProcessor(engine.model_copy(update={"device": "cpu"}))  # it needs no weights
        batch_size, num_calls = rows_in_flight(engine, config)
        names = ("sampling_params", "on_error", "chat_template", "chat_template_kwargs")
        common, seconds = {name: getattr(config, name) for name in names}, config.function_timeout_s

        prepare: dict[str, Any] = {"num_cpus": prepare_cpus} | self.preprocess_map_kwargs
        prepare.setdefault("compute", actor_pool(prepare.pop("concurrency", config.tokenizer_concurrency)))
        inputs = inputs.with_template(config.chat_template, config.chat_template_kwargs)
        own = {"inputs": inputs, "preprocess": self.preprocess, "batch_size": batch_size, "seconds": seconds}
        prepare["fn_constructor_kwargs"] = own | {name: common[name] for name in ("sampling_params", "on_error")}
        dataset = dataset.map_batches(Prepare, batch_size=4 * batch_size, batch_format="pyarrow", **prepare)
        low, high = bounds(config.concurrency)
        options = config.model_dump(include={"accelerator_type", "runtime_env"}, exclude_none=True)
        options |= {"num_cpus": num_cpus} | ({"num_gpus": num_gpus} if num_gpus else {})
        llm_kwargs = engine.model_dump(exclude_unset=True) | common
        # Workers of another runtime environment would be of no use to the last stage.
        num_warm = 0 if config.runtime_env else max(1, MAX_WARM[num_gpus > 0] // high)
        llm_kwargs |= {"stats_actor": self.stats_actor, "any_rows": self.any_rows, "num_warm": num_warm}
        if config.engine_pool is not None:
            llm_kwargs["place"] = Membership(config.engine_pool, uuid.uuid4().hex, engine, high, options)
            options = {"num_cpus": 0}
        # Ray grows a pool only when its actors have near twice the calls that they can run, its default, and only into
        # nodes that are there. For actors that wait from the start its autoscaler brings nodes at once; newer Rays give
        # waiting ones up after 10 s, and ask again when there is a node.
        most = num_calls + 2 if low == high else None
        engines = actor_pool(config.concurrency, max_tasks_in_flight_per_actor=most, initial_size=num_engines)
        operator = LLMProcessor if config.engine_pool is None else SharedProcessor
        options |= {"fn_constructor_kwargs": llm_kwargs, "compute": engines, "max_concurrency": num_calls}
        dataset = map_blocks(dataset, operator, batch_size, batch_format="pyarrow", **options)
        finish_kwargs = dict(self.postprocess_map_kwargs)
        if "concurrency" in finish_kwargs:
            finish_kwargs["compute"] = TaskPoolStrategy(size=bounds(finish_kwargs.pop("concurrency"))[1])
        finish_kwargs["fn_kwargs"] = {"postprocess": self.postprocess, "on_error": config.on_error, "seconds": seconds}
        # Each block when it comes: rows that wait for others to fill a batch may wait for long.
        dataset = dataset.map_batches(cast(Any, finish), batch_size=None, batch_format="pyarrow", **finish_kwargs)
        bear_slow_engines(dataset)
        return dataset

    def _resources(self) -> tuple[float, float, float, int]:
        """CPUs and GPUs of one engine, CPUs of one tokenizer actor, and engines to begin with.

        Actors hold their CPUs as long as the job runs. When they hold all of them, the read tasks wait for ever,
        without a word, so one CPU is left: by taking less, or by refusing what the user asked for.
        """
        config = self.config
        cluster = cluster_resources()
        total_cpus, total_gpus = cluster.get("CPU", 0.0), cluster.get("GPU", 0.0)
        device = config.engine_kwargs.get("device", "auto")
        num_gpus = config.num_gpus
        if num_gpus is None:
            wants_gpu = config.accelerator_type is not None or device.startswith("cuda")
            num_gpus = 1.0 if wants_gpu or (device == "auto" and total_gpus > 0) else 0.0
        engines, most = bounds(config.concurrency)
        prepare = self.preprocess_map_kwargs
        fixed = bounds(prepare.get("concurrency", config.tokenizer_concurrency))[0]
        tokenizers, prepare_cpus = getattr(prepare.get("compute"), "min_size", fixed), prepare.get("num_cpus")
        given = engines * (config.num_cpus or 0) + tokenizers * (prepare_cpus or 0)
        if given and given > total_cpus - 1:
            actors = f"{engines} engines and {tokenizers} tokenizer actors"
            text = f"{actors} would hold {given:g} of the cluster's {total_cpus:g} CPUs, and reading needs one"
            raise ConfigError(f"num_cpus: {text}; set a smaller num_cpus (0 is allowed) or concurrency")
        # Engines on GPUs are all asked for in the beginning, those that need a new node too.
        taking = most if num_gpus else engines
        wanted = given + taking * (config.num_cpus is None) + tokenizers * (prepare_cpus is None)
        default = 1.0 if wanted <= total_cpus - 1 and config.engine_pool is None else 0.0  # others take some too
        num_cpus = default if config.num_cpus is None else config.num_cpus
        prepare_cpus = default if prepare_cpus is None else prepare_cpus
        fitting = int((total_cpus - 1 - tokenizers * prepare_cpus) // num_cpus) if num_cpus else taking
        return num_cpus, num_gpus, prepare_cpus, max(engines, min(most, fitting))


def actor_pool(size: Concurrency, **kwargs: Any) -> ActorPoolStrategy:
    low, high = bounds(size)
    return ActorPoolStrategy(min_size=low, max_size=high, **kwargs)


def rows_in_flight(engine: EngineConfig, config: EngineProcessorConfig) -> tuple[int, int]:
    """Rows of a call, and calls at once in an engine.

    A call ends with its longest row; with lengths from 0 to the maximum, half of a call's rows run at any time, so
    twice what the engine runs at once is given to it.
    """
    from rayinfer.engine import DEFAULT_MAX_NUM_SEQS

    num_seqs = engine.max_num_seqs or DEFAULT_MAX_NUM_SEQS[engine.device.partition(":")[0]]
    batch_size = config.batch_size or max(8, num_seqs // 8)
    return batch_size, config.max_concurrent_batches or math.ceil(2 * num_seqs / batch_size) + 1
