"""Servers, which processes of their own import by this module's name."""

from __future__ import annotations

import os
import signal
import sys
import threading

import tinsmith


def lives(folder) -> int:
    """Starts another; how many there were before."""
    before = len(list(folder.iterdir()))
    (folder / f"{before}").touch()
    return before


def dies_twice(folder) -> None:
    life = lives(folder)
    if life == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    if life == 1:
        raise tinsmith.Unavailable("not now")  # which the first life would have ended with


def dies_always(folder) -> None:
    lives(folder)
    os._exit(7)


def refuses(folder) -> None:
    lives(folder)
    raise tinsmith.InvalidInput("the port is no port")


def drains(folder) -> None:
    asked = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: asked.set())
    lives(folder)
    while not asked.wait(0.1):
        pass
    (folder / "drained").touch()
    sys.exit(0)
