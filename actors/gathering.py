"""Metrics of many processes as one."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client.metrics_core import Metric

from ..primitives.errors import TinsmithError
from ..primitives.op import Op
from .handle import RayHandle

PATIENCE_S = 6.0  # with a process that does not answer
INNER_PATIENCE_S = PATIENCE_S / 2  # where who asks is itself waited for


async def gather(
    handles: Mapping[str, RayHandle], method: str = "metrics", patience_s: float = PATIENCE_S
) -> dict[str, Any]:
    """What those that answer in time say, by name."""
    names = list(handles)
    asked = (_ask(handles[name], method, patience_s) for name in names)
    answers = dict(zip(names, await asyncio.gather(*asked), strict=True))
    return {name: answer for name, answer in answers.items() if answer is not None}


async def _ask(handle: RayHandle, method: str, patience_s: float) -> Any:
    """None if it does not answer in time."""
    try:
        async with asyncio.timeout(patience_s):
            return await Op(handle.call(method))
    except (TinsmithError, TimeoutError):
        return None


def merge(parts: Iterable[tuple[Mapping[str, str], Iterable[Metric]]]) -> list[Metric]:
    """Families of the same name become one; the samples of a part get its labels."""
    merged: dict[str, Metric] = {}
    for labels, families in parts:
        for family in families:
            into = merged.get(family.name)
            if into is None:
                into = merged[family.name] = Metric(family.name, family.documentation, family.type)
            for sample in family.samples:
                if not sample.name.endswith(
                    "_created"
                ):  # when a counter began tells nobody anything
                    into.samples.append(sample._replace(labels={**labels, **sample.labels}))
    return list(merged.values())
