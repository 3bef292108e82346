"""What the engines of a job are doing, gathered in one light actor for whoever draws the live line."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import ray

_FRESH_S = 10.0  # an engine that has been silent for longer runs nothing


@ray.remote(num_cpus=0, max_restarts=-1)  # its node may go; what is counted then begins anew
class StatsBoard:
    """Make one with `StatsBoard.remote()` and hand it to `build_processor(..., stats_actor=board)`."""

    def __init__(self) -> None:
        self._engines: dict[str, tuple[float, dict[str, Any]]] = {}

    def report(self, engine_id: str, stats: Mapping[str, Any]) -> None:
        """Keep an engine's newest EngineStats, as a dict."""
        self._engines[engine_id] = (time.monotonic(), dict(stats))

    def snapshot(self) -> dict[str, float]:
        """Sums over the engines, `kv_usage` as their mean, and of `num_engines` that reported of late, `num_busy`."""
        fresh = [stats for at, stats in self._engines.values() if time.monotonic() - at < _FRESH_S]
        total = Counter[str](num_engines=len(fresh))
        for _, stats in self._engines.values():
            total.update(stats)
        for name in ("num_running", "num_waiting"):  # of now; all other counts only grow
            total[name] = sum(stats[name] for stats in fresh)
        total["num_busy"] = sum(stats["num_running"] > 0 for stats in fresh)
        return {**total, "kv_usage": sum(stats["kv_usage"] for stats in fresh) / max(1, len(fresh))}


def report_every_second(board: Any, engine_id: str, stats: Callable[[], Any]) -> Callable[[], None]:
    """Send `stats()` to the board from a thread of its own; returns what ends it, after a last report."""
    ended = threading.Event()

    def run() -> None:
        last = False
        while not last:
            last = ended.wait(1.0)
            board.report.remote(engine_id, asdict(stats()))

    thread = threading.Thread(target=run, name="rayinfer-stats", daemon=True)
    thread.start()

    def end() -> None:
        ended.set()
        thread.join(timeout=5)

    return end
