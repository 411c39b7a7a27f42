from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from tinsmith.envs import make
from tinsmith.primitives.errors import InvalidInput

SLOW = "tinsmith.envs.latency:SlowTools"


def test_delays_are_lognormal_with_the_mean_asked_for():
    env = make(SLOW, env="calculator", mean=2.0, sigma=0.8)
    delays = np.array([env.delay() for _ in range(4000)])
    law = stats.lognorm(s=0.8, scale=2.0 * math.exp(-0.32))
    assert law.mean() == pytest.approx(2.0)
    assert stats.kstest(delays, law.cdf).pvalue > 1e-4


def test_a_slow_environment_is_otherwise_the_one_it_slows():
    slow = make(SLOW, env="calculator", env_kwargs={"terms": 2, "split": "eval"}, mean=0.0)
    plain = make("calculator", terms=2, split="eval")
    messages, info = slow.reset(seed=3)
    assert (messages, info) == plain.reset(seed=3)
    action = "CALC({}+{})".format(*info["numbers"])
    assert slow.step(action) == plain.step(action)
    answer = f"ANSWER: {sum(info['numbers'])}"
    assert slow.step(answer) == plain.step(answer)


@pytest.mark.parametrize("wrong", [{"mean": -1.0}, {"sigma": math.nan}, {"mean": math.inf}])
def test_delays_that_cannot_be_are_refused(wrong):
    with pytest.raises(InvalidInput, match="mean and sigma"):
        make(SLOW, env="calculator", **wrong)
