"""parallel_map equals a loop, on several threads and after a fork."""

import multiprocessing
import threading
from collections.abc import Iterator

import pytest

from miro.utils import threads
from miro.utils.threads import parallel_map


@pytest.fixture
def four_cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(threads, "default_num_workers", lambda: 4)
    threads._pool.cache_clear()
    yield
    threads._pool.cache_clear()


def squares(count: int) -> list[int]:
    return parallel_map(lambda n: n * n, range(count))


@pytest.mark.parametrize("count", [0, 1, 2, 3, 17, 100])
@pytest.mark.usefixtures("four_cores")
def test_results_are_those_of_a_loop_in_order(count: int) -> None:
    assert squares(count) == [n * n for n in range(count)]


@pytest.mark.usefixtures("four_cores")
def test_all_threads_run_concurrently() -> None:
    all_four = threading.Barrier(4, timeout=30)

    assert sorted(parallel_map(lambda _: all_four.wait(), range(4))) == [0, 1, 2, 3]


@pytest.mark.usefixtures("four_cores")
def test_an_error_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        parallel_map(lambda n: 1 // n, [3, 2, 1, 0])


@pytest.mark.usefixtures("four_cores")
def test_a_forked_process_has_its_own_pool() -> None:
    assert squares(9) == [n * n for n in range(9)]
    forked = multiprocessing.get_context("fork").Pool(1)

    with forked:
        assert forked.apply_async(squares, (9,)).get(timeout=30) == [n * n for n in range(9)]
