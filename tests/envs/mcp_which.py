from __future__ import annotations

import sys
from pathlib import Path

from tinsmith.envs import ToolEnv
from tinsmith.envs.mcp_tools import MCPTools

SERVER = str(Path(__file__).parent / "mcp_server.py")
LOCAL = {"command": sys.executable, "args": [SERVER], "start_seconds": 60}


def twice(text: str) -> str:
    """Say it twice."""
    return text + text


class Which(ToolEnv):
    """Asks for the process of its server."""

    def __init__(self) -> None:
        super().__init__([twice, MCPTools(**LOCAL)], syntax="plain")

    def begin(self, seed, options):
        return "Which process?"

    def score(self, answer):
        return 1.0
