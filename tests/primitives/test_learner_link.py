"""Operations whose learner died wait for the next one."""

from __future__ import annotations

from concurrent.futures import Future

import pytest

from tinsmith.primitives.errors import CorruptLog, StorageFailure, Unavailable
from tinsmith.primitives.learner_link import Answered, LearnerLink, RunGrant
from tinsmith.primitives.op import completed, failed


class Answering:
    """A handle whose calls get these answers, one after the other; the last one stays."""

    def __init__(self, **answers: list[object]) -> None:
        self.answers = {"ping": ["here"], **answers}
        self.calls: list[str] = []

    def call(self, method: str, *args: object) -> Future:
        self.calls.append(method)
        left = self.answers[method]
        answer = left.pop(0) if len(left) > 1 else left[0]
        return failed(answer) if isinstance(answer, Exception) else completed(answer)


def grant(learner: Answering) -> RunGrant:
    return RunGrant("run", "tiny", "/tiny", learner, 1)


def test_while_the_disk_is_full_nobody_is_told_that_an_operation_was_not_done():
    """The learner that died may have written it down, and then the next one does it."""
    dead, next_one = Answering(submit=[Unavailable("gone")]), Answering(submit=["result"])
    full = StorageFailure("no room")
    controller = Answering(reopen_run=[full, full, grant(next_one)])
    link = LearnerLink(grant(dead), controller, lambda: Answered(1))
    assert link.submit(1, "optim_step", {}).result(30) == "result"
    assert (dead.calls, next_one.calls) == (["submit"], ["submit"])
    assert controller.calls.count("reopen_run") == 3


def test_a_run_that_cannot_be_recovered_says_so_at_once():
    dead = Answering(submit=[Unavailable("gone")])
    link = LearnerLink(
        grant(dead), Answering(reopen_run=[CorruptLog("damaged")]), lambda: Answered(1)
    )
    with pytest.raises(CorruptLog, match="damaged"):
        link.submit(1, "optim_step", {}).result(30)


def test_when_the_service_is_closed_an_operation_fails():
    closed = Unavailable("the service is closed")
    gone = Answering(submit=[closed], reopen_run=[closed], ping=[closed])
    with pytest.raises(Unavailable, match="closed"):
        LearnerLink(grant(gone), gone, lambda: Answered(1)).submit(1, "optim_step", {}).result(30)
