"""Values and bytes that nobody should send, and files that nobody should find."""

from __future__ import annotations

import copy
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

Rng = np.random.Generator

NUMBERS: list[Any] = [
    0, -1, 1, 2**31, 2**62, 2**63 - 1, 2**63, 2**64, -(2**63), 10**400, -(10**400), 0.0, -0.0, 0.5, 1e-320,
    1e308, -1e308, float("nan"), float("inf"), -float("inf"), True, False,
]  # fmt: skip
TEXTS: list[str] = [
    "", " ", "\0", "a\0b", "\ud800", "\udfff\ud800", "\u202eabc", "é" * 300, "🦊", "a" * 10_000, "../../etc/passwd",
    "/etc/passwd", "tinker://", "tinker://../weights/x", "tinker://a/weights/../../x", "tinker://a/nothing/b",
    "%2e%2e%2f", "%00", "'; DROP TABLE runs; --", "{{7*7}}", "nan", "1e999", "-1", "ℵ", "a\nb", "\r\nX: y",
]  # fmt: skip
OTHERS: list[Any] = [None, [], {}, [None], {"": None}, {"a": {"a": {}}}, [[[]]]]
OBJECTS: list[Any] = [
    b"bytes", object(), 1j, np.float32("nan"), np.int64(-1), np.array([]), np.zeros((2, 2, 2)),
    np.array(["a"]), np.array([None]), np.array(2.5), np.uint64(2**64 - 1), np.arange(3) * 1.5, {1, 2}, (), range(3),
    Path("/nowhere"), int, len,
]  # fmt: skip


def json_value(rng: Rng) -> Any:
    """One that JSON carries, as Python's `json` writes it."""
    kind = rng.integers(0, 10)
    if kind < 4:
        return pick(rng, NUMBERS)
    if kind < 7:
        return pick(rng, TEXTS)
    if kind < 9:
        return copy.deepcopy(pick(rng, OTHERS))
    return [pick(rng, NUMBERS) for _ in range(int(rng.integers(0, 5)))]


def value(rng: Rng) -> Any:
    """One that Python carries."""
    return pick(rng, OBJECTS) if rng.random() < 0.4 else json_value(rng)


def pick(rng: Rng, choices: Any) -> Any:
    return choices[int(rng.integers(len(choices)))]


def changed(rng: Rng, body: Any) -> Any:
    """A JSON value with something in it replaced, added or taken out."""
    body = copy.deepcopy(body)
    places = list(_places(body))
    for _ in range(int(rng.integers(1, 4))):
        if not places:
            return json_value(rng)
        holder, key = pick(rng, places)
        what = rng.integers(0, 8)
        if what < 5:
            holder[key] = json_value(rng)
        elif what == 5 and isinstance(holder, dict):
            holder.pop(key, None)
        elif what == 6 and isinstance(holder, dict):
            holder[pick(rng, TEXTS)] = json_value(rng)
        elif isinstance(holder, list) and key < len(holder):
            holder[key] = [holder[key]]
    return body


def _places(value: Any) -> Any:
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if type(value) is list
        else ()
    )
    for key, inner in list(items):
        yield value, key
        yield from _places(inner)


def damaged(rng: Rng, data: bytes) -> bytes:
    """Bytes with some flipped, cut, moved, doubled, or made a giant length."""
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        at, what = int(rng.integers(0, len(out) + 1)), rng.integers(0, 8)
        length = int(rng.integers(1, 40))
        if what == 0 and at < len(out):
            out[at] ^= int(rng.integers(1, 256))
        elif what == 1:
            del out[at:]
        elif what == 2:
            out[at:at] = rng.bytes(length)
        elif what == 3:
            del out[at : at + length]
        elif what == 4:
            out[at:at] = out[at : at + 8 * length]
        elif what == 5:
            giant = pick(
                rng, [b"\xff" * 8, b"\xff" * 7 + b"\x7f", b"\0\0\0\x80", b"\xdf\xff\xff\xff\xff"]
            )
            out[at : at + len(giant)] = giant
        elif what == 6:
            half = len(out) // 2
            out = out[half:] + out[:half]
        else:
            out += bytes(length)
    return bytes(out)


def damage_folder(rng: Rng, folder: Path, links: bool = True) -> str:
    """Damage files in a folder; returns what was done. `links`: also put links in their place."""
    done = []
    for _ in range(int(rng.integers(1, 3))):
        files = sorted(
            path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()
        )
        if not files:
            break
        path, what = pick(rng, files), rng.integers(0, 12)
        name = path.relative_to(folder)
        if what == 0:
            path.unlink()
            done.append(f"{name} gone")
        elif what == 1:
            other = pick(rng, files)
            mine, theirs = path.read_bytes(), other.read_bytes()
            path.write_bytes(theirs)
            other.write_bytes(mine)
            done.append(f"{name} and {other.name} swapped")
        elif what == 2:
            path.write_bytes(
                pick(rng, [b"", b"null", b"[]", b"{}", b"0", b"[" * 100_000, b"\x91" * 100_000])
            )
            done.append(f"{name} of another kind")
        elif what == 3 and links:
            path.unlink()
            path.symlink_to(pick(rng, ["/etc/passwd", "/dev/zero", "/", "../../..", path.name]))
            done.append(f"{name} a link")
        elif what == 4:
            path.unlink()
            path.mkdir()
            done.append(f"{name} a folder")
        elif what == 5:
            shutil.copy(
                path,
                path.with_name(pick(rng, ["extra", "0" * 20 + "-9.wal", "snapshot-9", ".tmp-x"])),
            )
            done.append(f"{name} doubled")
        else:
            path.write_bytes(damaged(rng, path.read_bytes()))
            done.append(f"{name} damaged")
    return ", ".join(done)


def copy_folder(source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    os.makedirs(target.parent, exist_ok=True)
    shutil.copytree(source, target)
