"""Environments by name.

    @tinsmith.envs.register("guess")
    class Guess(tinsmith.envs.Env): ...

`make("guess")` finds, in this order: names registered in this process; bundled ones; entry points
of the group `tinsmith.envs`; a library's, behind its prefix (`gymnasium:<id>`,
`pettingzoo:<module>`, `reasoning_gym:<dataset>`, `textarena:<id>`, `verifiers:<taskset>`);
`package.module:Class`.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from functools import partial
from importlib.metadata import entry_points
from typing import Any, TypeVar, overload

from ..primitives.errors import InvalidInput, NotFound
from .core import Env
from .multi_agent import MultiAgentEnv

EnvFactory = Callable[..., Env | MultiAgentEnv]
F = TypeVar("F", bound=EnvFactory)

ENTRY_POINT_GROUP = "tinsmith.envs"
BUNDLED = {"calculator": ".calculator:Calculator", "python": ".python_math:PythonMath"}
ADAPTERS = {
    "gymnasium": ".gymnasium_adapter:find_gymnasium",
    "pettingzoo": ".pettingzoo_adapter:find_pettingzoo",
    "reasoning_gym": ".reasoning_gym_adapter:find_reasoning_gym",
    "textarena": ".textarena_adapter:find_textarena",
    "verifiers": ".verifiers_adapter:find_verifiers",
}
"""Prefix of a library's environments -> what finds one by the rest of its name."""

_registered: dict[str, EnvFactory] = {}
_pickled: dict[str, bytes] = {}


@overload
def register(name: str, factory: F) -> F: ...
@overload
def register(name: str) -> Callable[[F], F]: ...
def register(name: str, factory: Any = None) -> Any:
    """Make `factory` (a class, or a function returning an environment) known as `name`.

    Also a decorator: `@register("name")`. Environment workers of this driver know the name too:
    the factory travels with the episode. Registering a name again replaces it.

    Raises:
        InvalidInput: an empty name or one with a colon, or something not callable.
    """
    if factory is None:
        return partial(register, name)
    if not isinstance(name, str) or not name or ":" in name:
        raise InvalidInput(f"an environment's name must be a str without colon, got {name!r}")
    if not callable(factory):
        raise InvalidInput(f"environment {name!r}: {factory!r} is neither a class nor a function")
    _registered[name] = factory
    _pickled.pop(name, None)
    return factory


def names() -> list[str]:
    """Every name that `make` knows, sorted."""
    points = (point.name for point in entry_points(group=ENTRY_POINT_GROUP))
    return sorted({*_registered, *BUNDLED, *points})


def find(name: str) -> EnvFactory:
    """The factory behind a name.

    Raises:
        NotFound: no such environment.
    """
    if name in _registered:
        return _registered[name]
    if name in BUNDLED:
        module, attribute = BUNDLED[name].split(":")
        return getattr(importlib.import_module(module, __package__), attribute)
    prefix, colon, rest = name.partition(":")
    if colon and prefix in ADAPTERS:
        module, attribute = ADAPTERS[prefix].split(":")
        return getattr(importlib.import_module(module, __package__), attribute)(rest)
    for point in entry_points(group=ENTRY_POINT_GROUP, name=name):
        return point.load()
    if ":" in name:
        return _imported(name)
    raise NotFound(
        f"no environment {name!r}; known are {', '.join(names())}. Register one with "
        "tinsmith.envs.register(name, factory), or give 'package.module:Class'"
    )


def _imported(path: str) -> EnvFactory:
    module_name, _, attribute = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # A module missing inside the environment's own module is that module's failure.
        if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
            raise NotFound(f"environment {path!r}: there is no module {error.name!r}") from None
        raise
    factory: Any = module
    for part in attribute.split("."):
        factory = getattr(factory, part, None)
    if not callable(factory):
        raise NotFound(f"environment {path!r}: module {module_name!r} has no {attribute!r}")
    return factory


def make(name: str, **kwargs: Any) -> Env | MultiAgentEnv:
    """A new environment, in this process.

    Raises:
        NotFound: no such environment.
        InvalidInput: it does not take these arguments.
    """
    return construct(name, find(name), kwargs)


def construct(name: str, factory: EnvFactory, kwargs: dict[str, Any]) -> Env | MultiAgentEnv:
    """Call the factory, refusing arguments that its signature does not have."""
    try:
        inspect.signature(factory).bind(**kwargs)
    except TypeError as error:
        raise InvalidInput(
            f"environment {name!r} cannot be made with {kwargs!r}: {error}; "
            f"its arguments are {inspect.signature(factory)}"
        ) from None
    except ValueError:
        pass  # a builtin without a signature: let the call itself tell
    return factory(**kwargs)


def pickled_factory(name: str) -> bytes | None:
    """The factory registered in this process under `name`, pickled by value where it must be
    (classes of `__main__` and of notebooks), else None.

    Raises:
        InvalidInput: the factory holds something that cannot be sent to another process.
    """
    if name not in _registered:
        return None
    if name not in _pickled:
        import cloudpickle

        try:
            _pickled[name] = cloudpickle.dumps(_registered[name])
        except Exception as error:
            raise InvalidInput(
                f"environment {name!r} cannot be sent to its workers: {error}; keep locks, "
                "connections and files out of its class, and open them in reset"
            ) from error
    return _pickled[name]
