"""Which sampler a request goes to, and how many samplers there are: the rules by themselves."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest

from tinsmith import InvalidInput, Replicas
from tinsmith.actors.routing import CHUNK, SLACK, PrefixTable, choose, prefixes
from tinsmith.actors.scaling import Scaler


@dataclass
class Fake:
    number: int
    load: int = 0
    serving: Counter[str] = field(default_factory=Counter)


def test_the_longest_known_prefix_under_the_same_adapter_counts():
    table, tokens = PrefixTable(), np.arange(4 * CHUNK + 5)
    table.note(prefixes(tokens[: 2 * CHUNK], "a"), 1)
    table.note(prefixes(tokens[: 3 * CHUNK], "a"), 2)
    assert table.holder(prefixes(tokens, "a")) == 2
    assert table.holder(prefixes(tokens, "b")) is None
    assert table.holder(prefixes(tokens + 1, "a")) is None
    assert table.holder(prefixes(tokens[: CHUNK - 1], "a")) is None
    table.note(prefixes(np.concatenate([tokens[: 2 * CHUNK], tokens]), "a"), 3)
    assert table.holder(prefixes(tokens[: 2 * CHUNK + 1], "a")) == 3
    table.forget(2)
    assert table.holder(prefixes(tokens, "a")) == 3


def test_the_least_recently_given_prefixes_are_forgotten():
    table = PrefixTable(size=2)
    named = [prefixes(np.full(CHUNK, i), "a") for i in range(3)]
    for number in (0, 1):
        table.note(named[number], number)
    table.note(named[0], 0)
    table.note(named[2], 2)
    assert [table.holder(names) for names in named] == [0, None, 2]


def test_the_holder_is_taken_unless_it_is_much_busier_than_another():
    idle, busy = Fake(0, 1), Fake(1, 1 + SLACK)
    assert choose([idle, busy], 1, "run") is busy
    busy.load += 1
    assert choose([idle, busy], 1, "run") is idle
    assert choose([idle, busy], None, "run") is idle
    assert choose([idle, busy], 7, "run") is idle


def test_of_equally_loaded_ones_that_which_serves_the_adapter_is_taken():
    one, other = Fake(0, 3), Fake(1, 3, Counter(run=1))
    assert choose([one, other], None, "run") is other
    assert choose([one, other], None, "another") is one


def test_samplers_follow_the_load_after_a_while_and_within_limits():
    now = 0.0
    scaler = Scaler(Replicas(1, 4, 10, upscale_delay_s=5, downscale_delay_s=60), lambda: now)
    assert scaler.change(1, 35) == 0
    now = 4.9
    assert scaler.change(1, 35) == 0
    now = 5.1
    assert scaler.change(1, 35) == 3
    assert scaler.change(4, 500) == 0
    now = 50.0
    assert scaler.change(4, 11) == 0
    now = 109.0
    assert scaler.change(4, 11) == 0
    now = 110.0
    assert scaler.change(4, 11) == -2
    assert scaler.change(2, 11) == 0
    now = 115.0
    assert scaler.change(2, 0) == 0  # since when there is less to do, not since ever
    now = 175.0
    assert scaler.change(2, 0) == -1
    assert scaler.change(1, 0) == 0


@pytest.mark.parametrize("given", [0, -1])
def test_a_number_of_samplers_below_one_is_refused(given):
    with pytest.raises(InvalidInput, match="1 <= min_replicas"):
        Replicas.of(given)


def test_limits_that_contradict_each_other_are_refused():
    with pytest.raises(InvalidInput, match="got 3 and 2"):
        Replicas(3, 2)
    with pytest.raises(InvalidInput, match="target_ongoing_requests must be at least 1"):
        Replicas(1, 2, target_ongoing_requests=0)
    with pytest.raises(InvalidInput, match="max_requests must be at least 1"):
        Replicas(1, 2, max_requests=0)
    with pytest.raises(InvalidInput, match="upscale_delay_s must not be negative"):
        Replicas(1, 2, upscale_delay_s=-1)
