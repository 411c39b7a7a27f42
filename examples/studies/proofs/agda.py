"""Agda as the judge of proofs: real `agda --safe` processes that stay and check one after another."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import tinsmith

PRELUDE = Path(__file__).with_name("Prelude.agda")
LONGEST = 400
SECONDS = 20.0


@dataclass(frozen=True)
class Verdict:
    """`message` is Agda's, shortened to what concerns the proof; empty for a proof that holds."""

    holds: bool
    message: str = ""


class Agda:
    """A pool of Agda processes; an async context manager.

    Every proof is checked as a module of its own under `--safe`, which refuses postulates, holes
    and functions that may not end; what Agda leaves open (`_`, `?`) counts as no proof.

    Raises:
        NotFound: there is no `agda` on this machine.
    """

    def __init__(self, processes: int = 2) -> None:
        beside_python = Path(sys.executable).with_name("agda")
        found = str(beside_python) if beside_python.exists() else shutil.which("agda")
        if found is None:
            raise tinsmith.NotFound('there is no agda: pip install "tinsmith[studies]"')
        self.command = found
        self.processes = processes
        self.known: dict[tuple[str, str], asyncio.Future[Verdict]] = {}

    async def __aenter__(self) -> Agda:
        self.folder = tempfile.TemporaryDirectory(prefix="agda-")
        shutil.copy(PRELUDE, self.folder.name)
        self.idle: asyncio.Queue[_Process] = asyncio.Queue()
        self.all = [
            _Process(self.command, Path(self.folder.name), number)
            for number in range(self.processes)
        ]
        await self.all[0].check("P -> P", "\\ a -> a")  # compiles the prelude, once
        for process in self.all:
            self.idle.put_nowait(process)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await asyncio.gather(*(process.stop() for process in self.all))
        self.folder.cleanup()

    async def check(self, statement: str, proof: str) -> Verdict:
        """Whether `proof` proves `statement` (atoms are single capitals)."""
        refused = _refused(proof)
        if refused:
            return Verdict(False, refused)
        key = (statement, proof)
        if key not in self.known:
            self.known[key] = asyncio.ensure_future(self._check(statement, proof))
        return await self.known[key]

    async def _check(self, statement: str, proof: str) -> Verdict:
        process = await self.idle.get()
        try:
            return await process.check(statement, proof)
        finally:
            self.idle.put_nowait(process)


def _refused(proof: str) -> str:
    if not proof.strip():
        return "The proof is empty"
    if len(proof) > LONGEST or len(proof.splitlines()) != 1:
        return f"A proof is one line of at most {LONGEST} characters"
    if not proof.isascii() or "{" in proof or "--" in proof:
        return "A proof is a plain term"
    return ""


class _Process:
    """One `agda --interaction-json`, started when needed and again after it hung or died."""

    def __init__(self, command: str, folder: Path, number: int) -> None:
        self.command = command
        self.folder = folder
        self.module = f"Proof{number}"
        self.process: asyncio.subprocess.Process | None = None

    async def check(self, statement: str, proof: str) -> Verdict:
        atoms = " ".join(dict.fromkeys(re.findall(r"\b[A-Z]\b", statement)))
        file = self.folder / f"{self.module}.agda"
        file.write_text(
            f"{{-# OPTIONS --safe #-}}\nmodule {self.module} where\nopen import Prelude\n"
            f"theorem : {{{atoms} : Set}} -> {statement}\ntheorem =\n  {proof}\n"
        )
        try:
            async with asyncio.timeout(SECONDS):
                return _verdict(await self._load(file), file)
        except TimeoutError:
            await self.stop()
            return Verdict(False, f"Agda was not done within {SECONDS:g} s")
        except EOFError:
            await self.stop()
            return Verdict(False, "Agda gave up on this term")

    async def _load(self, file: Path) -> list[dict[str, Any]]:
        """What Agda says of a file, up to its answer to a second question."""
        if self.process is None:
            self.process = await asyncio.create_subprocess_exec(
                self.command,
                "--interaction-json",
                cwd=self.folder,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                limit=1 << 24,
            )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        name = json.dumps(str(file))
        commands = (f"Cmd_load {name} []", "Cmd_show_version")
        for command in commands:
            self.process.stdin.write(f"IOTCM {name} None Direct ({command})\n".encode())
        infos = []
        while True:
            line = await self.process.stdout.readline()
            if not line:
                raise EOFError
            with contextlib.suppress(json.JSONDecodeError):
                said = json.loads(line.removeprefix(b"JSON> "))
                if said.get("kind") == "DisplayInfo":
                    if said["info"]["kind"] == "Version":
                        return infos
                    infos.append(said["info"])

    async def stop(self) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
            await self.process.wait()
            self.process = None


def _verdict(infos: list[dict[str, Any]], file: Path) -> Verdict:
    errors = [info["error"]["message"] for info in infos if info["kind"] == "Error"]
    goals = [info for info in infos if info["kind"] == "AllGoalsWarnings"]
    errors += [error["message"] for info in goals for error in info["errors"]]
    if errors:
        return Verdict(False, _shortened(errors[0], file))
    if not goals or any(goals[-1][left] for left in ("visibleGoals", "invisibleGoals", "warnings")):
        return Verdict(False, "The proof leaves something open")
    return Verdict(True)


def _shortened(message: str, file: Path) -> str:
    lines = []
    for line in message.replace("→", "->").splitlines():
        line = line.replace(str(file), "").strip()
        line = re.sub(r"^:?\d+,\d+(-\d+)?(,\d+)?:?\s*", "", line)
        line = re.sub(r"\s+at :\d+,\d+(-\d+)?", "", line)
        if line:
            lines.append(line)
    return " ".join(lines)[:160]
