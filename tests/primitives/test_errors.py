from __future__ import annotations

import pickle

import pytest

import tinsmith

ERRORS = [
    tinsmith.InvalidInput,
    tinsmith.NotFound,
    tinsmith.Unavailable,
    tinsmith.OutOfCapacity,
    tinsmith.Busy,
    tinsmith.OpCancelled,
    tinsmith.EnvironmentFailure,
    tinsmith.RolloutFailure,
]


@pytest.mark.parametrize("error", ERRORS)
def test_every_error_is_a_tinsmith_error_and_travels_between_processes(error):
    assert issubclass(error, tinsmith.TinsmithError)
    back = pickle.loads(pickle.dumps(error("what, where, what to do")))
    assert type(back) is error
    assert str(back) == "what, where, what to do"


def test_a_busy_service_says_when_to_come_back():
    back = pickle.loads(pickle.dumps(tinsmith.Busy("come again", 2.5)))
    assert (str(back), back.retry_after_s) == ("come again", 2.5)


def test_errors_are_also_pythons_own_kinds():
    assert issubclass(tinsmith.InvalidInput, ValueError)
    assert issubclass(tinsmith.NotFound, LookupError)
