"""A server in a process of its own, which is started again when it dies."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from ..primitives.errors import TinsmithError, Unavailable

STEADY_S = 60.0  # one that lived so long had started well
GIVE_UP = 5  # quick deaths in a row
LONGEST_PAUSE_S = 30.0
REFUSED = 2  # the exit status of one that said what it cannot do

Say = Callable[[str], None]


def supervise(server: Callable[..., None], args: tuple[Any, ...], say: Say) -> int:
    """Run `server(*args)` (picklable) until it returns; again, after a pause that grows, when it dies
    otherwise. SIGINT and SIGTERM go on to it, and then it is not started again. It ends with this
    process, however that ends. Returns its exit status.

    Raises:
        Unavailable: it died quickly `GIVE_UP` times in a row.
    """
    stopping, running = threading.Event(), list[int]()

    def stop(number: int, _: object) -> None:
        stopping.set()
        for pid in running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        quick = 0
        for life in range(sys.maxsize):
            began = time.monotonic()
            process = multiprocessing.get_context("spawn").Process(
                target=_serve, args=(server, args), name="tinsmith-server"
            )
            process.start()
            assert process.pid is not None
            running[:] = [process.pid]
            process.join()
            running.clear()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it started and left behind
            status, lived = process.exitcode or 0, time.monotonic() - began
            quick = quick + 1 if lived < STEADY_S else 0
            if status == 0 or stopping.is_set() or (status == REFUSED and life == 0):
                return status
            died = f"signal {-status}" if status < 0 else f"exit status {status}"
            if quick >= GIVE_UP:
                raise Unavailable(
                    f"the server died {quick} times in a row within {STEADY_S:.0f} s of its start "
                    f"({died}); what it said last is above. Runs are kept: start it again when that is "
                    "mended"
                )
            pause = min(0.5 * 2**quick, LONGEST_PAUSE_S)
            say(f"the server died ({died}): starting it again in {pause:g} s")
            stopping.wait(pause)
            if stopping.is_set():
                return status
        raise AssertionError("unreachable")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _serve(server: Callable[..., None], args: tuple[Any, ...]) -> None:
    # A group of its own, with all that it starts: Ctrl-C reaches it once, through the supervisor.
    os.setsid()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        server(*args)
    except TinsmithError as error:
        print(f"tinsmith: {error}", file=sys.stderr, flush=True)
        raise SystemExit(REFUSED) from None


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.killpg(0, signal.SIGKILL)
