"""Work ahead of the device: order, bound, errors, and that it really runs beside the consumer."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from bitquake.model_wrappers.prefetch import prefetch


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def test_order_is_kept_although_later_items_are_done_first(executor: ThreadPoolExecutor) -> None:
    done: list[int] = []

    def work(i: int) -> int:
        time.sleep(0.02 if i % 4 == 0 else 0.0)
        done.append(i)
        return i * i

    assert list(prefetch(work, range(24), executor, depth=6)) == [i * i for i in range(24)]
    assert done != sorted(done)


def test_no_more_than_depth_items_are_ahead(executor: ThreadPoolExecutor) -> None:
    started: list[int] = []
    consumed = 0
    for _ in prefetch(lambda i: started.append(i), range(50), executor, depth=5):
        time.sleep(0.001)
        assert len(started) <= consumed + 5
        consumed += 1
    assert consumed == 50


def test_it_runs_beside_the_consumer(executor: ThreadPoolExecutor) -> None:
    threads = set()

    def work(i: int) -> None:
        threads.add(threading.get_ident())
        time.sleep(0.02)

    began = time.perf_counter()
    for _ in prefetch(work, range(16), executor, depth=8):
        time.sleep(0.005)
    assert time.perf_counter() - began < 16 * 0.025
    assert threading.get_ident() not in threads


def test_an_error_comes_at_its_place(executor: ThreadPoolExecutor) -> None:
    results = prefetch(lambda i: 6 // i, [3, 2, 0, 1], executor, depth=4)
    assert [next(results), next(results)] == [2, 3]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_without_threads_it_works_one_at_a_time() -> None:
    seen: list[int] = []
    results = prefetch(lambda i: seen.append(i), range(5), None, depth=3)
    next(results)
    assert seen == [0]
