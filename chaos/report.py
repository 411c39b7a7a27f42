"""A campaign's report, in Markdown."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections import defaultdict

import psutil
import torch

from ..engines.product_library import processor
from .campaign import Campaign, Outcome


def report(campaign: Campaign, outcome: Outcome, command: str) -> str:
    first, second = outcome.undisturbed, outcome.disturbed
    told = second.tenants
    waited = [done for done in outcome.faults if done.waited is not None]
    slowest = max(waited, key=lambda done: done.waited or 0.0)
    lines = [
        "# A fault campaign",
        "",
        f"`{command}`, {time.strftime('%Y-%m-%d')}, on {_machine()}.",
        "",
        f"- seed {campaign.seed}, {len(outcome.faults)} faults, {len(told)} tenants, "
        f"{campaign.rounds} rounds each",
        f"- {len(second.ledger.results)} operations acknowledged and compared: 0 lost, 0 done "
        "twice, 0 different, and so are adapters and optimizers after every round, to the byte",
        f"- {second.seconds:.0f} s, undisturbed {first.seconds:.0f} s",
        f"- {sum(t.refused for t in told)} operations refused for want of a disk or lost on "
        f"their way when a server was killed, "
        f"{second.ledger.repeated} done again from a saved state, "
        f"{sum(t.lost_episodes for t in told)} episodes played again, "
        f"{outcome.dropped} connections dropped",
        f"- longest wait for the next acknowledgement: {slowest.waited:.1f} s, after {slowest.fault}",
        "",
        "| fault | of | number | s until the next acknowledgement: median | longest |",
        "|---|---|---:|---:|---:|",
    ]
    kinds: defaultdict[tuple[str, str], list[float | None]] = defaultdict(list)
    for done in outcome.faults:
        kinds[done.fault.action, done.fault.target].append(done.waited)
    for (action, target), all_waits in sorted(kinds.items()):
        waits = [wait for wait in all_waits if wait is not None] or [0.0]
        lines.append(
            f"| {action} | {target} | {len(all_waits)} | {statistics.median(waits):.2f} | "
            f"{max(waits):.2f} |"
        )
    if outcome.left_out:
        lines += ["", f"Left out, for want of permission: {', '.join(outcome.left_out)}."]
    return "\n".join([*lines, ""])


def _machine() -> str:
    return (
        f"{len(os.sched_getaffinity(0))} core(s) of {processor()}, "
        f"{psutil.virtual_memory().total / 2**30:.0f} GiB, Python {platform.python_version()}, "
        f"torch {torch.__version__}"
    )
