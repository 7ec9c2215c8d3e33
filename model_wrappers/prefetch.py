"""Work done ahead of its use, by threads, in order, with a bound on how much is in flight."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def prefetch(
    work: Callable[[Item], Result], items: Iterable[Item], executor: Executor | None, depth: int
) -> Iterator[Result]:
    """Yield ``work(item)`` for each item, in the order of the items, computing at most ``depth`` of them ahead.

    Args:
        work: called in the executor's threads; its exceptions are raised where its result would be yielded.
        items: consumed in the caller's thread.
        executor: None calls ``work`` in the caller's thread, one item at a time.
        depth: bound on results that are computed or being computed, at least 1.
    """
    if executor is None:
        yield from map(work, items)
        return
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            pending.append(executor.submit(work, item))
            if len(pending) >= depth:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()
