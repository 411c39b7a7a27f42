"""Names of base models: what clients call them, and what the cluster does."""

from __future__ import annotations

import asyncio
from pathlib import Path

from ..engines import models
from ..primitives.client import ServiceClient
from ..primitives.errors import InvalidInput, NotFound
from .settings import Settings


class ServedModels:
    """
    Args:
        only_listed: refuse names that neither `settings.models` nor the models folder holds, as
            where clients are not trusted with this machine's files.
    """

    def __init__(self, service: ServiceClient, settings: Settings, only_listed: bool) -> None:
        self._home = service.home
        self._listed = dict(settings.models)
        self._only_listed = only_listed
        self._resolved: dict[str, str] = {}

    async def list(self) -> list[tuple[str, int]]:
        """Names and context lengths of what is served."""
        if not self._listed:
            found = await asyncio.to_thread(models.local_models, self._home)
            return [(name, facts.max_context) for name, facts in found]
        served = []
        for name, target in self._listed.items():
            path = await asyncio.to_thread(models.resolve_model, target, self._home)
            served.append((name, models.model_facts(path).max_context))
        return served

    async def resolve(self, name: str) -> str:
        """What the cluster knows the model `name` by.

        Raises:
            NotFound: this server does not serve it.
        """
        if name in self._listed:
            return self._listed[name]
        if not self._listed and not self._only_listed:
            return name
        if name not in self._resolved:
            self._resolved[name] = await self._find(name)
        return self._resolved[name]

    async def _find(self, name: str) -> str:
        known = [model for model, _ in await self.list()]
        short = [model for model in known if model.rpartition("/")[2] == name]
        if name not in known and len(short) == 1:
            name = short[0]
        if name not in known:
            raise NotFound(f"base model {name!r} is not served here: {', '.join(known) or 'none'}")
        return self._listed.get(name, name)


def parse_served(models_given: list[str]) -> dict[str, str]:
    """`--model` options, each `NAME` or `ALIAS=NAME`, by what clients call them.

    Raises:
        InvalidInput: an empty or repeated name.
    """
    served: dict[str, str] = {}
    for given in models_given:
        alias, equals, target = given.partition("=")
        target = target if equals else alias
        if not alias or not target:
            raise InvalidInput(f"--model {given!r}: give a model, or a name for it: NAME=MODEL")
        if Path(target).expanduser().is_dir():
            target = str(Path(target).expanduser().resolve())
            alias = alias if equals else target
        if alias in served:
            raise InvalidInput(f"--model {alias!r} is given twice")
        served[alias] = target
    return served
