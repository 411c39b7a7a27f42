"""Environments that go wrong in every way that the tests ask for."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import time
from typing import Any

from tinsmith.envs import Env


class Misbehaving(Env):
    """Does what the action says; `made` runs in the constructor."""

    def __init__(self, made: str = "", turns: int = 3) -> None:
        self.turns = turns
        self.act(made)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        self.turn = 0
        return f"pid {os.getpid()} draw {random.Random(seed).random()}", {"options": options}

    async def step(self, action: str) -> Any:
        await asyncio.sleep(0)
        self.turn += 1
        self.act(action)
        return f"you said {action}", 1.0, self.turn == self.turns, False, {"turn": self.turn}

    def act(self, action: str) -> None:
        if action == "raise":
            raise ValueError("this environment is broken")
        if action == "hang":
            time.sleep(3600)
        if action == "exit":
            os._exit(7)
        if action == "abort":
            os.kill(os.getpid(), signal.SIGABRT)
        if action == "hog":
            hoard = []
            while True:
                hoard.append(bytearray(1 << 20))
        if action == "spawn":
            self.spawned = subprocess.Popen(["sleep", "3600"])


def chatter(seed: int | None = None) -> Misbehaving:
    return Misbehaving()
