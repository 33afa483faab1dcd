"""The same function over many items in several processes, in order."""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from multiprocessing import get_context
from typing import Any, TypeVar

import torch

from drape.errors import ConfigError, WorkerError

__all__ = ["end_workers", "mapped"]

Item = TypeVar("Item")
Result = TypeVar("Result")
STARTED: list[ProcessPoolExecutor] = []
AHEAD = 2  # items per process that wait, so that not all of them are in memory


def mapped(function: Callable[[Item], Result], items: Iterable[Item], jobs: int = 1) -> Iterator[Result]:
    """`function` of each item, in order; with more than one job in as many processes with one thread each.

    Args:
        function: of a module, so that another process can import it.  items: taken one by one as they are needed.

    Raises:
        ConfigError: jobs is below 1.
        WorkerError: a process was killed.
        Exception: whatever the function raises, also in another process.
    """
    if jobs < 1:
        raise ConfigError(f"jobs={jobs}; expected 1 or more.")
    if jobs == 1:
        yield from map(function, items)
        return
    pool, waiting = workers(jobs), deque[Future[bytes]]()
    try:
        for item in items:
            waiting.append(pool.submit(call, pickle.dumps((function, item))))
            if len(waiting) >= AHEAD * jobs:
                yield pickle.loads(waiting.popleft().result())
        while waiting:
            yield pickle.loads(waiting.popleft().result())
    except BrokenProcessPool as error:  # a process was killed, for want of memory as a rule
        end_workers()
        raise WorkerError(
            f"one of {jobs} processes ended before its work was done ({error}); give fewer --jobs, or more memory."
        ) from error
    finally:
        for future in waiting:
            future.cancel()


@cache
def workers(jobs: int) -> ProcessPoolExecutor:
    """Processes that stay for the next items until this one ends: each takes seconds to begin."""
    STARTED.append(ProcessPoolExecutor(jobs, get_context("spawn"), one_thread))
    return STARTED[-1]


def end_workers() -> None:
    """End all processes that wait for more; the next items start new ones."""
    workers.cache_clear()
    while STARTED:
        STARTED.pop().shutdown()


def one_thread() -> None:
    """Processes that compute side by side take one core each."""
    torch.set_num_threads(1)


def call(payload: bytes) -> bytes:
    """In another process: plain pickles, because tensors that share memory use up the files a process may open."""
    function, item = pickle.loads(payload)
    result: Any = function(item)
    return pickle.dumps(result)
