"""Work in threads, in order: Pillow gives up the GIL while it decodes and resizes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal, TypeVar

from dualcl.benchmark.core.machine import usable_cpus

T = TypeVar("T")
R = TypeVar("R")
MAX_AUTO_WORKERS = 8


def loader_workers(asked: int | Literal["auto"]) -> int:
    """Processes or threads that make batches."""
    return min(usable_cpus(), MAX_AUTO_WORKERS) if asked == "auto" else asked


def in_threads(work: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """`work` of each item, in order, from threads: Pillow gives up the GIL while it decodes and resizes.

    An error or an interrupt drops what has not begun, instead of finishing it first.
    """
    pool = ThreadPoolExecutor(max(1, workers))
    try:
        yield from pool.map(work, items)
    finally:
        pool.shutdown(cancel_futures=True)


def prepared(work: Callable[[T], R], items: Iterable[T], workers: int, ahead: int) -> Iterator[R]:
    """`work` of each item, in order, from threads that are at most `ahead` items in front of the reader.

    Without `workers` nothing runs ahead. An error, an interrupt or a reader who leaves drops what has not begun.
    """
    if workers == 0:
        yield from map(work, items)
        return
    pool = ThreadPoolExecutor(workers)
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
