"""Engines that several processors of a job share, so that a model is loaded once on a GPU.

No pool of Ray Data can own them: the first processor's ends while the second one still has rows. So they are actors of
their own, which an `EnginePool` starts, and ends when Ray says that their users are gone. A user, the SharedProcessor
in an actor of Ray Data, hands its calls on to one engine, where their rows run in one batch with those of the other
processors. When an engine is lost, Ray starts it again and runs its calls again, as it does with Ray Data's own actors.
"""

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import ray
from ray.data.block import DataBatch
from ray.exceptions import RayActorError

from rayinfer.config import EngineConfig
from rayinfer.engine_process import EngineProcess
from rayinfer.errors import ConfigError
from rayinfer.processors.llm_processor import LLMProcessor
from rayinfer.processors.ray_compat import is_dead, restart_actor

IDLE_SECONDS = 5.0  # that an engine without users stays: another processor may be about to begin
POLL_SECONDS = 1.0
RESTART_SECONDS = 60.0  # until Ray has ended this process
MAX_CALLS = 128  # at once in an engine's actor; more wait


@dataclass(frozen=True)
class Membership:
    """What the actors of one processor need to find their engines."""

    pool: str
    processor: str  # whose actors are to be spread over the engines
    config: EngineConfig
    max_engines: int
    options: dict[str, Any]  # of an engine's actor: num_gpus and the like


class SharedProcessor:
    """An LLMProcessor whose engine is one of a pool.

    Args:
        place: the pool. kwargs: of LLMProcessor.

    Raises:
        ConfigError: as LLMProcessor does, or the pool's engines have other settings.
    """

    yields_blocks = True

    def __init__(self, place: Membership, **kwargs: Any):
        self._processor = place.processor, kwargs
        here = ray.get_runtime_context()
        options: Any = {"name": place.pool, "get_if_exists": True, "lifetime": "detached"}
        options["namespace"] = f"rayinfer-{here.get_job_id()}"  # pools of other jobs are others
        while True:
            with contextlib.suppress(RayActorError):  # the pool that was found was about to end
                pool = EnginePool.options(**options).remote()  # type: ignore[attr-defined]
                self._engine: Any = ray.get(pool.join.remote(here.get_actor_id(), place))
                ray.get(self._engine.load.remote(*self._processor))
                return

    def __call__(self, batch: DataBatch) -> Iterator[pa.Table]:
        try:
            for block in self._engine.answer.remote(batch, *self._processor):
                yield ray.get(block)
        except RayActorError:  # for good: the pool was lost, and its engines with it
            restart_actor()  # which looks for another one; Ray gives it this call again
            time.sleep(RESTART_SECONDS)
            raise


@ray.remote(max_restarts=-1, max_task_retries=-1)
class _Engine:
    """The actor of one engine, with an LLMProcessor for each processor that uses it."""

    def __init__(self, config: EngineConfig):
        self._config, self._lock = config, threading.Lock()
        self._engine: EngineProcess | None = None
        self._processors: dict[str, LLMProcessor] = {}

    def load(self, name: str, kwargs: dict[str, Any]) -> None:
        """Be ready for a processor's calls."""
        with self._lock:
            self._engine = self._engine or EngineProcess(self._config)
            if name not in self._processors:
                self._processors[name] = LLMProcessor(engine=self._engine, **kwargs)

    @ray.method(num_returns="streaming")
    def answer(self, batch: DataBatch, name: str, kwargs: dict[str, Any]) -> Iterator[pa.Table]:
        self.load(name, kwargs)  # Ray may have started this actor again
        yield from self._processors[name](batch)


@dataclass(eq=False)
class _Place:
    """An engine of a pool, and its users: the id of each one's actor -> its processor."""

    actor: Any
    users: dict[str, str] = field(default_factory=dict)
    used: float = 0.0  # when there last was one


@ray.remote(num_cpus=0)
class EnginePool:
    """The engines of one name. It ends, and they with it, when nobody uses them, whoever was the first."""

    def __init__(self) -> None:
        self._lock, self._joined = threading.Lock(), time.monotonic()
        self._config: EngineConfig | None = None
        self._engines: list[_Place] = []
        threading.Thread(target=self._tend, name="rayinfer-pool", daemon=True).start()

    def join(self, user: str, place: Membership) -> Any:
        """The actor of the engine that a user is to have: one without others of its processor, if there may be more.

        Raises:
            ConfigError: the engines have other settings.
        """
        with self._lock:
            self._config, self._joined = self._config or place.config, time.monotonic()
            pairs = {name: (value, getattr(place.config, name)) for name, value in self._config}
            if wrong := [f"{name} is {a!r} and {b!r}" for name, (a, b) in pairs.items() if a != b]:
                text = f"engine_pool = {place.pool!r}: processors that share engines want the same settings, but "
                raise ConfigError(f"{text}{', '.join(wrong)}; give one of them another name")
            for engine in self._engines:
                engine.users.pop(user, None)
            best = min(self._engines, key=lambda e: (place.processor in e.users.values(), len(e.users)), default=None)
            if best is None or (place.processor in best.users.values() and len(self._engines) < place.max_engines):
                options: Any = {"max_concurrency": MAX_CALLS, **place.options}
                best = _Place(_Engine.options(**options).remote(place.config))  # type: ignore[attr-defined]
                self._engines.append(best)
            best.users[user], best.used = place.processor, self._joined
            return best.actor

    def _tend(self) -> None:
        while True:
            time.sleep(POLL_SECONDS)
            with self._lock:
                now = time.monotonic()
                for engine in list(self._engines):
                    engine.users = {user: name for user, name in engine.users.items() if not is_dead(user)}
                    engine.used = now if engine.users else engine.used
                    if now - engine.used > IDLE_SECONDS:
                        self._engines.remove(engine)
                        ray.kill(engine.actor)
                if not self._engines and now - self._joined > IDLE_SECONDS:
                    ray.kill(ray.get_runtime_context().current_actor)
