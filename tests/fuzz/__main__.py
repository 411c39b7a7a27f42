"""`python -m tests.fuzz`: cases by the thousand, of every kind or of one.

--cases 10000   in all, shared out among the kinds
--seed 0        the same seed gives the same cases
--kind logs     of that kind alone (http, client, checkpoints, logs)
--only 1234     that case alone, to see a finding again
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping

from tests.fuzz import files, native, web
from tests.fuzz.driver import Kind, Report, run

KINDS: dict[str, tuple[Kind, float]] = {  # and their parts of all cases
    "logs": (files.logs, 0.3),
    "checkpoints": (files.checkpoints, 0.2),
    "http": (web.requests, 0.35),
    "client": (native.calls, 0.15),
}


def table(reports: Mapping[str, Report]) -> str:
    lines = ["| kind | cases | seconds | outcomes |", "|---|---|---|---|"]
    for name, report in reports.items():
        told = ", ".join(f"{count} {what}" for what, count in report.outcomes.most_common())
        cases = sum(report.outcomes.values())
        lines.append(f"| {name} | {cases:,} | {report.seconds:,.0f} | {told} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=KINDS)
    parser.add_argument("--only", type=int)
    asked = parser.parse_args()
    reports = {}
    for name, (kind, part) in KINDS.items():
        if asked.kind in (None, name):
            count = round(asked.cases * (part if asked.kind is None else 1))
            numbers = range(count) if asked.only is None else range(asked.only, asked.only + 1)
            reports[name] = run(name, kind, asked.seed, numbers, progress=True)
    print(table(reports))
    sys.exit(any(report.findings for report in reports.values()))


if __name__ == "__main__":
    main()
