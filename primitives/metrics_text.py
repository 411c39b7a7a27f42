"""Metric families as Prometheus's text format, by its own library."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def metrics_text(families: Iterable[Any]) -> str:
    """`families`: of `prometheus_client`, each name once."""
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.registry import Collector

    class Given(Collector):
        def collect(self) -> Iterable[Any]:
            return families

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Given())
    return generate_latest(registry).decode()
