from __future__ import annotations

import random

import pytest

from tinsmith.envs import Env, check_env
from tinsmith.primitives.errors import InvalidInput


class Good(Env):
    draw = 0.0

    async def reset(self, *, seed=None, options=None):
        self.draw = random.Random(seed).random()
        return f"{self.draw}", {}

    def step(self, action):
        return action, 0.0, False, False, {"draw": self.draw}


def broken(**methods) -> Env:
    return type("Broken", (Good,), methods)()


def test_sound_environments_pass():
    check_env("calculator")
    check_env("calculator", terms=4, split="eval")
    check_env(Good())


@pytest.mark.parametrize(
    ("methods", "told"),
    [
        ({"reset": lambda self: ("x", {})}, r"reset cannot be called as reset\(\*, seed=None"),
        ({"step": lambda self: None}, r"step cannot be called as step\(action\)"),
        ({"reset": lambda self, seed, options: "x"}, r"reset must return \(observation, info\)"),
        ({"reset": lambda self, seed, options: (3, {})}, "must be a str or a list of messages"),
        (
            {"reset": lambda self, seed, options: ([{"role": "user"}], {})},
            "message 0 of an observation: `content` must be a str",
        ),
        ({"step": lambda self, action: ("x", 1.0, True, {})}, "step must return"),
        ({"step": lambda self, action: ("x", 1.0, 1, False, {})}, "terminated must be a bool"),
        ({"step": lambda self, a: ("x", "much", True, False, {})}, "reward must be a number"),
        ({"step": lambda self, a: ("x", float("nan"), True, False, {})}, "reward must be finite"),
        ({"step": lambda self, action: ("x", 1.0, True, False, None)}, "info must be a dict"),
        ({"step": lambda self, action: ([], 1.0, False, False, {})}, "holds no message"),
        (
            {"reset": lambda self, seed, options: (f"{random.random()}", {})},
            "reset gave another outcome for the same seed",
        ),
        (
            {"step": lambda self, action: ("x", random.random(), True, False, {})},
            "step 1 gave another outcome for the same seed",
        ),
        (
            {"step": lambda self, action: ("x", 0.0, True, False, {"o": object()})},
            "info of step 1 holds what is not plain data",
        ),
    ],
)
def test_what_is_wrong_is_said(methods, told):
    with pytest.raises(InvalidInput, match=f"environment 'Broken':\n- .*{told}"):
        check_env(broken(**methods))
