"""The short form of `make fuzz`: some hundred cases, the same every time."""

from __future__ import annotations

import functools

import pytest

from tests.fuzz import files, native, web
from tests.fuzz.driver import run


def check(name, kind, cases: int) -> None:
    report = run(name, kind, 0, range(cases))
    assert not report.findings, "\n\n".join(report.findings)
    assert len(report.outcomes) > 1, report.outcomes


@pytest.mark.parametrize(
    ("name", "kind"), [("logs", files.logs), ("checkpoints", files.checkpoints)]
)
def test_damaged_files_are_read_or_refused_with_a_typed_error(name, kind):
    check(name, kind, 150)


def test_odd_requests_are_done_or_refused_with_a_typed_error(service):
    check("http", functools.partial(web.requests_to, service), 60)


def test_odd_calls_are_done_or_refused_with_a_typed_error(service):
    check("client", functools.partial(native.calls_of, service), 150)
