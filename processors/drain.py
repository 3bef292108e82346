"""The notice that an engine's node will end: a spot machine that is taken back, a node that is scaled away.

Ray knows of it ("draining") and gives no new calls to the node's actors. What is left to do here: let the calls that
run go on as long as there is time, then hand on what is done and leave, so that Ray starts the engine elsewhere while
this node is still there.
"""

import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from rayinfer.processors.ray_compat import ending_nodes, restart_actor

POLL_SECONDS = 3.0
UNKNOWN_SECONDS = 30.0  # of a node whose end nobody has named: the shortest notice that clouds give
MARGIN_SECONDS = 15.0  # kept of the node's last seconds: for its blocks to be written, and copied to other nodes
CALLS_SECONDS = 5.0  # for calls to end once they are told to


class DrainWatch:
    """Counts an actor's calls, and restarts the actor before its node ends.

        with watch.call():
            ...  # until `watch.leaving` is true, or until it is done

    A call that ends because of `leaving` has answered a part of its rows, so that is for a caller who finds the others
    by key. Any other call goes on: it is lost with the actor, and Ray gives it to the next one, as it does with calls
    that come after the notice.
    """

    def __init__(self) -> None:
        self.leaving = self._noticed = False
        self._num_calls = 0
        self._lock, self._closed = threading.Lock(), threading.Event()
        if ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None:
            threading.Thread(target=self._run, name="rayinfer-drain", daemon=True).start()

    @contextmanager
    def call(self) -> Iterator[None]:
        while self._noticed and not self._closed.is_set():
            time.sleep(1)  # it came too late, and ends with this process
        with self._lock:
            self._num_calls += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_calls -= 1

    def close(self) -> None:
        self._closed.set()

    def _run(self) -> None:
        node, seconds = ray.get_runtime_context().get_node_id(), None
        while seconds is None:
            if self._closed.wait(POLL_SECONDS):
                return
            seconds = ending_nodes().get(node)
        self._noticed = True
        self._closed.wait(max(0.0, (UNKNOWN_SECONDS if math.isinf(seconds) else seconds) - MARGIN_SECONDS))
        self.leaving = True
        deadline = time.monotonic() + CALLS_SECONDS
        while self._num_calls and time.monotonic() < deadline:
            time.sleep(0.1)
        if not self._closed.is_set():
            restart_actor()
