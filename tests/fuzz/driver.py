"""Runs cases, each from its own seed, and looks after every one that nothing is broken.

A kind of cases is a context manager that yields `case(rng) -> outcome`; an outcome is a word for the
table: "done", an error's type, an HTTP status. Anything else that a case raises is a finding.
"""

from __future__ import annotations

import contextlib
import faulthandler
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import psutil

from tinsmith.primitives.errors import TinsmithError

Case = Callable[[np.random.Generator], str]
Kind = Callable[[], contextlib.AbstractContextManager[Case]]

CASE_SECONDS = 120.0  # that one case may take before the run is given up, with all stacks
MORE_BYTES = 2 << 30  # that the processes may take beyond what they had after a tenth of the cases
LOOK_EVERY = 50  # cases between looks at the memory


@dataclass
class Report:
    outcomes: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)
    seconds: float = 0.0


class Grows(AssertionError):
    """The processes took more memory than they may."""


def run(
    name: str, kind: Kind, seed: int, numbers: range, *, progress: bool = False, stop: int = 20
) -> Report:
    """Those cases of a kind. Gives up after `stop` findings."""
    report, began, allowed = Report(), time.perf_counter(), None
    settled = numbers.start + len(numbers) // 10
    with kind() as case:
        for number in numbers:
            rng = np.random.default_rng([seed, *name.encode(), number])
            faulthandler.dump_traceback_later(CASE_SECONDS, exit=True)
            try:
                report.outcomes[case(rng)] += 1
            except Exception:
                again = f"python -m tests.fuzz --kind {name} --seed {seed} --only {number}"
                report.findings.append(f"{again}\n{traceback.format_exc()}")
                report.outcomes["FINDING"] += 1
                print(f"FINDING: {report.findings[-1]}", flush=True)
                if len(report.findings) >= stop:
                    break
            finally:
                faulthandler.cancel_dump_traceback_later()
            if number % LOOK_EVERY == 0 and number >= settled:
                allowed = allowed or _memory() + MORE_BYTES
                if _memory() > allowed:
                    raise Grows(
                        f"{name}: {_memory():,} bytes at case {number}, {allowed:,} allowed"
                    )
            if progress and number % 100 == 0:
                print(f"{name}: {number}/{numbers.stop}", file=sys.stderr, flush=True)
    report.seconds = time.perf_counter() - began
    return report


def _memory() -> int:
    """Of this process and all that it started."""
    family, total = [psutil.Process(), *psutil.Process().children(recursive=True)], 0
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            total += process.memory_info().rss
    return total


def told(error: TinsmithError) -> str:
    """An error of ours, which says something, for the table."""
    assert str(error), error
    return type(error).__name__


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings that damage is meant to cause."""
    import logging

    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
