"""Everything that Ray Data has no public API for, tested with Ray 2.56 and 2.60: no other file imports `_internal`.

Ray Data gathers what a generator yields until `target_max_block_size` bytes (128 MiB) are full, so that an LLM's rows
would wait for the end of their call. A rule of the physical optimizer, which is where Ray decides the sizes of blocks,
turns that off for our functions alone; the setting on the DataContext would change reads and other operators too.
"""

import contextlib
import math
import time
from collections.abc import Callable, Generator
from dataclasses import replace
from typing import Any

import pyarrow as pa
import ray
from ray.data import Dataset
from ray.data._internal.logical.interfaces import Rule
from ray.data._internal.logical.optimizers import get_physical_ruleset
from ray.data._internal.logical.rules import FuseOperators
from ray.data._internal.output_buffer import OutputBlockSizeOption
from ray.data.block import BlockAccessor, DataBatch

IDLE = 0.05  # a pool of engines shrinks when it has calls for so few of its places
_GUARD = "execution_no_progress_timeout_s"


class _KeepYieldedBlocks(Rule):
    """One yield of a function with `yields_blocks = True` is one block, handed on at once."""

    @classmethod
    def dependencies(cls) -> list[type[Rule]]:
        return [FuseOperators]

    def apply(self, plan: Any) -> Any:
        for op in plan.dag.post_order_iter():
            logical = op._logical_operators[-1] if op._logical_operators else None
            if getattr(getattr(logical, "fn", None), "yields_blocks", False):
                op.override_target_max_block_size(None)
                last = op.get_map_transformer().get_transform_fns()[-1]
                last._output_block_size_option = OutputBlockSizeOption(disable_block_shaping=True)
        return plan


def keep_yielded_blocks() -> None:
    """Add the rule to this process's optimizer, once; plans without our functions stay as they are."""
    rules = get_physical_ruleset()
    if not any(rule.__qualname__ == _KeepYieldedBlocks.__qualname__ for rule in rules):
        rules.add(_KeepYieldedBlocks)


def map_blocks(dataset: Dataset, fn: Any, batch_size: int, **kwargs: Any) -> Dataset:
    """`map_batches` with one call for each input block, also on a GPU, where the public method wants a batch size.

    With a batch size, Ray joins blocks that are smaller, and a task that then holds two batches runs them one after the
    other, the second one often small. Ray before 2.60 gets `batch_size` for lack of a way around it.
    """
    if hasattr(dataset, "map_batches_internal"):
        return dataset.map_batches_internal(fn, batch_size=None, **kwargs)
    return dataset.map_batches(fn, batch_size=batch_size, **kwargs)


def to_arrow(batch: DataBatch) -> pa.Table:
    """A batch of any of Ray Data's formats as a table."""
    return BlockAccessor.for_block(BlockAccessor.batch_to_block(batch)).to_arrow()


def take_rows(table: pa.Table, indices: list[int]) -> pa.Table:
    """Rows by index; Ray's own, because Arrow's cannot take from tensor columns."""
    return BlockAccessor.for_block(table).take(indices)


def finished_blocks(dataset: Dataset) -> Generator[tuple[ray.ObjectRef, int, int], None, None]:
    """Run a dataset; yields the reference, rows and bytes of each block as it is finished. No row comes here.

    A call that yields nothing, as calls with `any_rows` may, leaves a block without rows and columns: none of ours.
    """
    for bundle in dataset.iter_internal_ref_bundles():
        for ref, metadata in zip(bundle.block_refs, bundle.metadata, strict=True):
            if metadata.num_rows != 0:
                yield ref, metadata.num_rows or 0, metadata.size_bytes or 0


def bear_slow_engines(dataset: Dataset) -> None:
    """Change what Ray does to a dataset whose rows take long and whose actors start slowly; a user's own setting stays.

    Newer Rays end a run in which no block moves for 30 minutes: a full engine of long answers can take longer, and so
    can a node to come; a step that hangs is noticed by the engine. And they end idle actors of a pool that has calls
    for half of its places: that is so at the moment when new engines are ready, before they get any.
    """
    from ray.data import context

    own, scaling = dataset.context, dataset.context.autoscaling_config
    if getattr(own, _GUARD, None) == getattr(context, f"DEFAULT_{_GUARD.upper()}", None) is not None:
        setattr(own, _GUARD, -1.0)
    if scaling.actor_pool_util_downscaling_threshold == context.DEFAULT_ACTOR_POOL_UTIL_DOWNSCALING_THRESHOLD:
        own.autoscaling_config = replace(scaling, actor_pool_util_downscaling_threshold=IDLE)


def ending_nodes() -> dict[str, float]:
    """Ids of the nodes that were told to end ("draining"), with the seconds left; inf where nobody said how many."""
    nodes = ray._private.state.state.get_draining_nodes()
    return {id: at_ms / 1000 - time.time() if at_ms else math.inf for id, at_ms in nodes.items()}


def restart_actor() -> None:
    """End the actor whose process this is; Ray starts it again, on a node that stays, and runs its calls again."""
    ray.kill(ray.get_runtime_context().current_actor, no_restart=False)


def is_dead(actor_id: str) -> bool:
    """Whether an actor has ended for good."""
    return ray._private.state.state.actor_table(actor_id).get("State", "DEAD") == "DEAD"


def in_task() -> bool:
    """Whether this process is a worker that runs a task or a call of an actor."""
    return ray.is_initialized() and ray.get_runtime_context().get_task_id() is not None


def task_attempt() -> int:
    """1 in a task's first run, 2 when Ray runs it again after a worker or node was lost; 1 outside of Ray."""
    if not ray.is_initialized():
        return 1
    worker: Any = ray._private.worker.global_worker
    return worker.core_worker.get_current_task_attempt_number() + 1


def cluster_resources() -> dict[str, float]:
    """What the cluster has, or what its autoscaler may grow it to where that is more. Starts Ray if none runs."""
    if not ray.is_initialized():
        ray.init()
    most = ray._private.state.state.get_max_resources_from_cluster_config() or {}
    return {key: max(value, most.get(key, 0)) for key, value in ({**most, **ray.cluster_resources()}).items()}


def register_with_ray_data_llm(config_type: type, builder: Callable[..., Any]) -> None:
    """Let `ray.data.llm.build_processor` take our config. Without ray.data.llm (it needs aiohttp) there is no need."""
    with contextlib.suppress(ImportError):
        from ray.llm._internal.batch.processor.base import ProcessorBuilder

        if config_type.__name__ not in ProcessorBuilder._registry:
            ProcessorBuilder.register(config_type, builder)
