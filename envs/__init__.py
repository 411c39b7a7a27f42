"""Floor 2: environments, and what plays the model's turns into them.

Names are loaded when first used: environment processes import this room by the dozen.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .check import check_env
    from .core import Env
    from .episode import EpisodeLimits, EpisodeSpec, play_episode
    from .isolation import EnvPool
    from .match import MatchSpec, play_match
    from .multi_agent import MultiAgentEnv
    from .registry import make, names, register
    from .renderer import ChatRenderer, Conversation
    from .retrieval import Corpus
    from .retrieval_qa import RetrievalQA, load_questions
    from .sandbox import PythonSandbox, SandboxLimits
    from .scripted import Scripted
    from .text_stream import TextStream
    from .tools import ToolEnv, ToolSet

_HOME_OF = {
    "ChatRenderer": "renderer",
    "Conversation": "renderer",
    "Corpus": "retrieval",
    "Env": "core",
    "EnvPool": "isolation",
    "EpisodeLimits": "episode",
    "EpisodeSpec": "episode",
    "PythonSandbox": "sandbox",
    "RetrievalQA": "retrieval_qa",
    "SandboxLimits": "sandbox",
    "MatchSpec": "match",
    "MultiAgentEnv": "multi_agent",
    "Scripted": "scripted",
    "TextStream": "text_stream",
    "ToolEnv": "tools",
    "ToolSet": "tools",
    "check_env": "check",
    "load_questions": "retrieval_qa",
    "make": "registry",
    "names": "registry",
    "play_episode": "episode",
    "play_match": "match",
    "register": "registry",
}

__all__ = list(_HOME_OF)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
