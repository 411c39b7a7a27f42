"""Operations whose learner died are sent to the one that takes its place."""

from __future__ import annotations

from concurrent.futures import Future

import pytest

from tinsmith.primitives.errors import Unavailable
from tinsmith.primitives.learner_link import LearnerLink, RunGrant
from tinsmith.primitives.op import completed, failed


class Answering:
    """A handle whose calls get this answer, at once."""

    def __init__(self, answer: object) -> None:
        self.answer = answer

    def call(self, method: str, *args: object) -> Future:
        return (failed if isinstance(self.answer, Exception) else completed)(self.answer)


def grant(learner: Answering) -> RunGrant:
    return RunGrant("run", "tiny", "/tiny", learner, 1)


def test_an_operation_goes_to_the_next_learner_also_when_the_controller_answers_at_once():
    dead, controller = Answering(Unavailable("gone")), Answering(grant(Answering("result")))
    assert LearnerLink(grant(dead), controller, lambda: 1).submit(1, "x", {}).result(30) == "result"


def test_when_the_service_is_closed_an_operation_fails():
    gone = Answering(Unavailable("the service is closed"))
    with pytest.raises(Unavailable, match="closed"):
        LearnerLink(grant(gone), gone, lambda: 1).submit(1, "x", {}).result(30)
