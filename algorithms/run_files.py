"""Files that a loop writes as it goes: whole or not at all, and cut back to where it goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def checkpoint_name(step: int) -> str:
    """`step-000040`: sorts as steps do."""
    return f"step-{step:06d}"


def write_file(path: Path, data: bytes) -> None:
    """Write a file, and its folder, so that a kill leaves the old or the new one."""
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    write_file(path, json.dumps(value, indent=1).encode())


def forget_after(path: Path, step: int) -> None:
    """Drop the rows of steps after a checkpoint: they will be taken again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # cut short by a kill
            break
        if row["step"] <= step:
            kept.append(line + "\n")
    write_file(path, "".join(kept).encode())


@contextmanager
def appending(path: Path) -> Iterator[Any]:
    with path.open("a") as file:
        yield file
