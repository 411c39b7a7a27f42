from __future__ import annotations

import threading
from functools import partial

import numpy as np

from tinsmith.primitives.window import Window


def test_no_more_than_fits_is_under_way_and_the_lowest_numbers_go_first():
    window, sent = Window(10), []

    def enter(number: int, size: int) -> None:
        window.enter(number, size, lambda: sent.append(number))

    for number, size in ((1, 4), (2, 6), (4, 1), (3, 20), (5, 1)):
        enter(number, size)
    assert sent == [1, 2]
    window.leave(2)
    assert sent == [1, 2]  # 3 weighs more than there is room for, and 4 may not overtake it
    window.leave(1)
    assert sent == [1, 2, 3]  # nothing below it is under way
    window.leave(3)
    assert sent == [1, 2, 3, 4, 5]


def test_a_number_that_others_wait_for_is_let_through():
    window, sent = Window(10), []
    window.enter(2, 10, lambda: sent.append(2))
    window.enter(1, 10, lambda: sent.append(1))
    assert sent == [2, 1]


def test_threads_lose_nothing():
    rng = np.random.default_rng(0)
    sizes = rng.integers(0, 8, 400).tolist()
    window, done, lock = Window(10), [], threading.Lock()

    def land(number: int) -> None:
        with lock:
            done.append(number)
        window.leave(number)

    def send(number: int) -> None:
        threading.Timer(0.001, land, (number,)).start()

    def enter(numbers: list[int]) -> None:
        for number in numbers:
            window.enter(number, sizes[number], partial(send, number))

    threads = [
        threading.Thread(target=enter, args=(part.tolist(),))
        for part in np.array_split(rng.permutation(len(sizes)), 4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    while threading.active_count() > 1 and len(done) < len(sizes):
        pass
    assert sorted(done) == list(range(len(sizes)))
