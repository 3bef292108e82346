"""The user's functions, called row by row: whatever one does costs its row alone.

What blocks cannot always be interrupted, and what crashes takes its process along. So a row that takes too long ends
the process; Ray runs the task again, and then the function runs apart, in a process that can be ended for a row.
"""

import faulthandler
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from rayinfer.errors import ErrorType, RowError, Stage, describe
from rayinfer.processors.ray_compat import in_task, task_attempt

RowFunction = Callable[[dict[str, Any]], Mapping[str, Any]]
Answer = dict[str, Any] | RowError  # what a function returns for a row, or why it does not
REARM_SECONDS = 1.0  # the limit is kept to so much: setting the watchdog for every row would take longer than the row


def call_all(function: RowFunction, rows: Sequence[Mapping[str, Any]], stage: Stage, seconds: float) -> list[Answer]:
    """What the function returns for each row, or why it does not.

    Args:
        stage: whose error the row gets. seconds: that one row may take.
    """
    if task_attempt() > 1 and not hasattr(function, "control_tokens"):  # a job's template has limits of its own
        return _call_apart(function, rows, stage, seconds)
    watched, armed, answers = in_task(), -math.inf, []
    try:
        for row in rows:
            if watched and time.monotonic() - armed > REARM_SECONDS:
                armed = time.monotonic()
                faulthandler.dump_traceback_later(seconds + REARM_SECONDS, file=2, exit=True)
            answers.append(_call(function, row, stage))
    finally:
        faulthandler.cancel_dump_traceback_later()
    return answers


def _call_apart(function: RowFunction, rows: Sequence[Mapping[str, Any]], stage: Stage, seconds: float) -> list[Answer]:
    answers: list[Answer] = []
    apart: Any = None
    for row in rows:
        try:
            if apart is None:
                apart = _Apart.remote(function)  # type: ignore[attr-defined]
                ray.get(apart.__ray_ready__.remote())
            answers.append(ray.get(apart.call.remote(row, stage), timeout=seconds))
        except RayTaskError as error:  # what it returned may not pickle
            answers.append(failed(stage, f"raised {describe(error.cause or error, row)}"))
        except (GetTimeoutError, RayActorError) as error:
            late = isinstance(error, GetTimeoutError)
            answers.append(failed(stage, f"did not return in {seconds:g} s" if late else "ended its process"))
            ray.kill(apart)
            apart = None
    return answers


@ray.remote(num_cpus=0)
class _Apart:
    def __init__(self, function: RowFunction):
        self._function = function

    def call(self, row: Mapping[str, Any], stage: Stage) -> Answer:
        return _call(self._function, row, stage)


def _call(function: RowFunction, row: Mapping[str, Any], stage: Stage) -> Answer:
    try:
        result = function(dict(row))
        if isinstance(result, Mapping):
            if any(not isinstance(name, str) or utf8(name) != name for name in result):
                raise TypeError("it returned a key that names no column: want strings that can be written as UTF-8")
            return dict(result)
        problem = f"returned {type(result).__name__}, want a dict"
    except RowError as error:  # the function says itself what is wrong with the row
        error.stage = error.stage or stage
        return error
    except (Exception, SystemExit) as error:  # the user's code raises what it likes
        problem = f"raised {describe(error, row)}"
    return failed(stage, problem)


def failed(stage: Stage, problem: str) -> RowError:
    """The error of a row that a user's function could not take."""
    return RowError(ErrorType(f"{stage}_error".upper()), f"{stage} {problem}", stage)


def utf8(value: Any) -> str:
    """Text that Arrow can take: a string may hold halves of surrogate pairs, an object refuse to be printed."""
    try:
        return str(value).encode(errors="backslashreplace").decode()
    except Exception:
        return f"<{type(value).__name__}>"
