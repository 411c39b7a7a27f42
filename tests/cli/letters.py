"""A task that a tiny random model gets right about half the time: say a vowel first."""

from __future__ import annotations

from tinsmith.envs import Env, register


@register("say-a-vowel")
class SayAVowel(Env):
    def __init__(self, hint: str = "") -> None:
        self.hint = hint

    def reset(self, *, seed=None, options=None):
        return f"Say a vowel. {self.hint}", {}

    def step(self, action):
        right = any(letter in action for letter in "aeiou")
        return "", float(right), True, False, {}
