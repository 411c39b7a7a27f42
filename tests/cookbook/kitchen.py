"""Running a recipe as a user would, and reading what it wrote."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tinker
from tinker import types

KEY = "tml-of-the-cookbook"
BASE = "Qwen/Qwen3.5-9B-Base"
SCRIPTS = Path(__file__).parent / "scripts"
# On the weights that sampled, in float32: DESIGN.md, contract 6, for a mean over tokens.
SAME = 1e-5


@dataclass(frozen=True)
class Log:
    """A recipe's `log_path`."""

    folder: Path

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return read_jsonl(self.folder / "metrics.jsonl")

    @property
    def checkpoints(self) -> list[dict[str, Any]]:
        return read_jsonl(self.folder / "checkpoints.jsonl")

    def column(self, name: str) -> list[float]:
        """The values of a metric, from the rows that have it."""
        return [row[name] for row in self.metrics if name in row]


@dataclass(frozen=True)
class Kitchen:
    """
    Attributes:
        workspace: the folder that recipes run in.
        url: of the gateway.
    """

    workspace: Path
    url: str

    def python(self, *arguments: str | Path, stdin: str = "") -> str:
        """What a program of its own printed."""
        environment = {
            **os.environ,
            "TINKER_BASE_URL": self.url,
            "TINKER_API_KEY": KEY,
            "TINKER_TELEMETRY": "0",
            "TINKER_COOKBOOK_RUNS_DIR": str(self.workspace / "runs"),
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(self.workspace / "hub"),
        }
        done = subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=self.workspace,
            env=environment,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=240,
        )
        # The SDK, now and then, aborts as its process ends. What a recipe did is looked at anyway.
        assert done.returncode in (0, -signal.SIGABRT), (
            f"{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
        )
        return done.stdout

    def chat_sl(self, log: Path, *options: str) -> None:
        """The recipe for supervised training on a file of conversations."""
        self.python(
            "-m",
            "tinker_cookbook.recipes.chat_sl.train",
            f"log_path={log}",
            f"model_name={BASE}",
            "dataset=chats.jsonl",
            "train_on_what=last_assistant_message",
            "batch_size=16",
            "num_epochs=4",
            "learning_rate=1e-2",
            "save_every=8",
            *options,
        )

    def train(self, recipe: str, log: Path, *options: str, steps: int) -> Log:
        """Run a recipe, or a script in `scripts`, and check what any of them should leave behind."""
        program = (
            [SCRIPTS / recipe] if recipe.endswith(".py") else ["-m", f"tinker_cookbook.{recipe}"]
        )
        self.python(*program, f"log_path={log}", *options)
        self.check(Log(log), steps)
        return Log(log)

    def check(self, log: Log, steps: int) -> None:
        """It took its steps, all numbers are finite, and its last checkpoint can be used."""
        trained = [r for r in log.metrics if "optim/lr" in r or "learning_rate" in r]
        assert [row["step"] for row in trained] == list(range(steps))
        for row in log.metrics:
            numbers = [v for v in row.values() if isinstance(v, float)]
            assert all(map(math.isfinite, numbers)), row
        last = log.checkpoints[-1]
        assert last["name"] == "final"
        rest = tinker.RestClient(base_url=self.url, api_key=KEY)
        with tinker.ServiceClient(base_url=self.url, api_key=KEY) as service:
            described = rest.get_weights_info_by_tinker_path(last["state_path"]).result()
            sampler = service.create_sampling_client(model_path=last["sampler_path"]).result()
            assert sampler.get_base_model() == described.base_model
            prompt = types.ModelInput.from_ints([3, 4, 5])
            sampler.sample(prompt, 1, types.SamplingParams(max_tokens=1)).result()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
