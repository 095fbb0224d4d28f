"""Work on several modules at once: they are independent of each other."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


def parallel_map(
    function: Callable[[T], R], items: Iterable[T], *, at_once: int | None = None
) -> Iterator[R]:
    """`map`, with as many items in work as torch has threads; results in order.

    The matrices of one module are too small to share between threads with profit: one thread an
    item is faster, and does not stand still at barriers when the machine is busy. Not more than
    one item a thread is in memory beyond those whose results were taken. With `at_once` fewer than
    threads, so many items share these.
    """
    threads = torch.get_num_threads()
    workers = threads if at_once is None else max(1, min(threads, at_once))
    waiting = iter(items)
    each = threads // workers
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(each,)) as pool:
        futures = [pool.submit(function, item) for item in islice(waiting, workers)]
        try:
            while futures:
                yield futures.pop(0).result()
                futures += [pool.submit(function, item) for item in islice(waiting, 1)]
        finally:
            for future in futures:
                future.cancel()
            torch.set_num_threads(threads)
