"""API keys: a file of owners and the hashes of their keys.

    {"keys": [{"owner": "alice", "sha256": "9f86d0…", "created": 1760000000}]}

A key is `tml-` and 256 random bits, so that its plain SHA-256 tells nothing about it and needs no
salt. An owner has one key, and perhaps a `"quota"`. The file is replaced in one move, and read again
when it has changed.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import msgspec
from filelock import FileLock

from ..primitives.errors import InvalidInput, NotFound, Unavailable
from .quotas import Quota

PREFIX = "tml-"
_UNLIMITED = Quota()


class KeyEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One owner's key, as the file holds it. `created` is in Unix seconds."""

    owner: str
    sha256: str
    created: int
    quota: Quota = _UNLIMITED


class _Content(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    keys: list[KeyEntry]


class _Read(NamedTuple):
    stamp: tuple[int, int, int] | None
    entries: Sequence[KeyEntry]


class KeyFile:
    """The keys of `path`. A file that does not exist holds none."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._read: _Read | None = None

    def owner(self, key: str) -> str | None:
        """Whose key this is; None if nobody's.

        Raises:
            Unavailable: the file cannot be read; `list()` says why.
        """
        digest, found = _digest(key), None
        # All of them, always: how long it takes must not tell where a key stands.
        for entry in self._served():
            if hmac.compare_digest(entry.sha256, digest):
                found = entry.owner
        return found

    def quota(self, owner: str) -> Quota:
        """What the owner may use; an owner without a key is let finish what is under way.

        Raises:
            Unavailable: the file cannot be read; `list()` says why.
        """
        return next((e.quota for e in self._served() if e.owner == owner), _UNLIMITED)

    def _served(self) -> Sequence[KeyEntry]:
        try:
            return self._entries()
        except InvalidInput as error:
            raise Unavailable(
                "the service's key file is damaged; its operator must repair it"
            ) from error

    def list(self) -> list[KeyEntry]:
        """
        Raises:
            InvalidInput: the file holds something else than keys.
        """
        return [*self._entries()]

    def add(self, owner: str, quota: Quota = _UNLIMITED) -> str:
        """Make a key for `owner`. It is not kept: this is the only time that it is seen.

        Raises:
            InvalidInput: the owner has a key, or no usable name.
        """
        if not owner or not owner.isprintable() or owner != owner.strip():
            raise InvalidInput(f"an owner needs a printable name, got {owner!r}")
        key = PREFIX + secrets.token_urlsafe(32)
        with self._locked():
            entries = self.list()
            if any(entry.owner == owner for entry in entries):
                raise InvalidInput(f"{owner!r} has a key in {self.path}; remove it first")
            self._write([*entries, KeyEntry(owner, _digest(key), int(time.time()), quota)])
        return key

    def limit(self, owner: str, quota: Quota) -> None:
        """Give `owner` another quota.

        Raises:
            NotFound: the owner has no key.
        """
        with self._locked():
            entries = {entry.owner: entry for entry in self.list()}
            if owner not in entries:
                raise NotFound(f"{owner!r} has no key in {self.path}")
            entries[owner] = msgspec.structs.replace(entries[owner], quota=quota)
            self._write([*entries.values()])

    def remove(self, owner: str) -> None:
        """
        Raises:
            NotFound: the owner has no key.
        """
        with self._locked():
            entries = self.list()
            kept = [entry for entry in entries if entry.owner != owner]
            if len(kept) == len(entries):
                raise NotFound(f"{owner!r} has no key in {self.path}")
            self._write(kept)

    def _locked(self) -> FileLock:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(f"{self.path}.lock", mode=0o600)

    def _entries(self) -> Sequence[KeyEntry]:
        stamp = self._stamp()
        if self._read is None or self._read.stamp != stamp:
            # The stamp is older than the content or as old: a change in between is seen next time.
            self._read = _Read(stamp, [] if stamp is None else self._load())
        return self._read.entries

    def _stamp(self) -> tuple[int, int, int] | None:
        try:
            stat = self.path.stat()
        except FileNotFoundError:
            return None
        return stat.st_mtime_ns, stat.st_size, stat.st_ino

    def _load(self) -> Sequence[KeyEntry]:
        try:
            return msgspec.json.decode(self.path.read_bytes(), type=_Content).keys
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise InvalidInput(
                f"{self.path} is not a key file ({error}); repair it, or move it away and make "
                "new keys with `tinsmith keys add`"
            ) from error
        except OSError as error:
            raise InvalidInput(f"cannot read the key file {self.path}: {error}") from error

    def _write(self, entries: Sequence[KeyEntry]) -> None:
        content = msgspec.json.format(msgspec.json.encode(_Content([*entries])))
        # mkstemp's files are the owner's alone (0600), from the first byte on.
        descriptor, name = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")
        try:
            with open(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, self.path)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(name)
            raise


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
