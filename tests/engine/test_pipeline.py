"""Work beside the model keeps its order, its bound and its errors."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from gn_detect.engine.predict_files import default_workers, drawing_processes, in_order, reading_threads
from gn_detect.errors import UserError


def test_results_come_in_order_and_at_most_so_many_lie_about() -> None:
    """Items are taken only when there is room for them."""
    taken, given, most = 0, 0, 0

    def items() -> Iterator[int]:
        nonlocal taken, most
        for number in range(40):
            taken += 1
            most = max(most, taken - given)
            yield number

    def slow_first(number: int) -> int:
        time.sleep(0.002 * (number % 3))
        return number * number

    with ThreadPoolExecutor(4) as pool:
        results = []
        for result in in_order(pool, slow_first, items(), 5):
            given += 1
            results.append(result)
    assert results == [number * number for number in range(40)]
    assert most <= 5


def test_the_pool_works_while_the_caller_does() -> None:
    """The second item is begun before the first result is asked for again."""
    begun = [threading.Event() for _ in range(3)]

    def note(number: int) -> int:
        begun[number].set()
        return number

    with ThreadPoolExecutor(1) as pool:
        results = in_order(pool, note, range(3), 2)
        assert next(results) == 0
        assert begun[1].wait(5)
        assert list(results) == [1, 2]


@pytest.mark.parametrize("pooled", [True, False])
def test_an_error_comes_in_its_turn(pooled: bool) -> None:
    def refuse(number: int) -> int:
        if number == 2:
            raise UserError("system-error", "item 2")
        return number

    with reading_threads(2 if pooled else 0) as pool:
        results = in_order(pool, refuse, range(5), 3)
        assert [next(results), next(results)] == [0, 1]
        with pytest.raises(UserError, match="item 2"):
            next(results)


def test_processes_are_started_for_many_pictures_alone() -> None:
    with drawing_processes(0, 1000) as pool:
        assert pool is None
    with drawing_processes(4, 3) as pool:
        assert isinstance(pool, ThreadPoolExecutor)
    with drawing_processes(2, 1000) as pool:
        assert pool is not None
        assert not isinstance(pool, ThreadPoolExecutor)
    assert default_workers() >= 1


def test_a_killed_process_is_an_error_with_a_remedy() -> None:
    with drawing_processes(1, 1000) as pool, pytest.raises(UserError, match="--workers"):
        list(in_order(pool, os._exit, range(3), 2))
