"""Checkpoint folders through fsspec: staged under a temporary name, renamed when whole."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import fsspec
import msgspec
from fsspec.implementations.local import LocalFileSystem

from ..primitives.errors import InvalidInput, NotFound, StorageFailure
from ..primitives.paths import CheckpointPath
from . import durable

MANIFEST = "manifest.json"


class Storage:
    """Immutable folders of files below a root, which may be a local folder or a bucket's URL.

    Symbolic links are no files: what a folder holds is what was written there.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = str(root)
        self.fs, self.base = fsspec.core.url_to_fs(self.root)
        self._local = isinstance(self.fs, LocalFileSystem)

    def _path(self, folder: str) -> str:
        return f"{self.base.rstrip('/')}/{folder}"

    def exists(self, folder: str) -> bool:
        return self.fs.exists(self._path(folder))

    # ---- writing ----

    def stage(self, folder: str, files: Mapping[str, bytes]) -> str:
        """Write files that will be `folder` once `commit` is called; returns their name until
        then. What is never committed is only a `.tmp-` folder.

        Raises:
            StorageFailure: the disk is full, read-only or broken.
        """
        staged = _temporary(folder)
        with self._writing(folder, staged):
            for file, data in files.items():
                self.fs.pipe_file(self._path(f"{staged}/{file}"), data)
        return staged

    @contextlib.contextmanager
    def _writing(self, folder: str, staged: str) -> Iterator[None]:
        """Into the new folder `staged`, which is on disk afterwards, or not there."""
        path = self._path(staged)
        try:
            if self._local:
                durable.make_folder(Path(path))
            else:
                self.fs.makedirs(path, exist_ok=True)
            yield
            if self._local:
                for each in (*Path(path).iterdir(), Path(path)):
                    durable.sync(each)
        except OSError as error:
            with contextlib.suppress(OSError):
                self.delete(staged)
            if isinstance(error, FileNotFoundError):
                raise
            raise StorageFailure(
                f"{folder} cannot be written to {self.root}: {error}. Nothing was saved; try again "
                "when there is room"
            ) from error

    def stage_copy(self, path: str, folder: str) -> tuple[str, int]:
        """`stage` with the files of the checkpoint `path`; also returns their size in bytes."""
        source, files = CheckpointPath.parse(path).folder, self.files(path)
        staged = _temporary(folder)
        try:
            with self._writing(folder, staged):
                for file in files:
                    self.fs.cp_file(self._path(f"{source}/{file}"), self._path(f"{staged}/{file}"))
        except FileNotFoundError:
            raise _no_checkpoint(path) from None
        return staged, sum(files.values())

    def commit(self, staged: str, folder: str) -> None:
        """Put what was staged in place, instead of what has that name. A reader sees either all
        files or none. One caller at a time for one folder.

        Raises:
            StorageFailure: that could not be had on disk; what has that name is as it was.
        """
        replaced = f"{staged}-replaced"
        if self.exists(folder):
            self._move(folder, replaced)
        self._move(staged, folder)
        if self._local:
            try:
                durable.sync(Path(self._path(folder)).parent)
            except OSError as error:
                self._move(folder, staged)
                if self.exists(replaced):
                    self._move(replaced, folder)
                raise StorageFailure(f"{folder} could not be kept: {error}") from error
        self.delete(replaced)

    def _move(self, folder: str, to: str) -> None:
        self.fs.mv(self._path(folder), self._path(to), recursive=True)

    def delete(self, folder: str) -> None:
        if self.exists(folder):
            self.fs.rm(self._path(folder), recursive=True)

    # ---- reading ----

    def read(self, folder: str) -> dict[str, bytes]:
        """All files of a folder that was committed, by name.

        Raises:
            NotFound: there is no such folder.
        """
        if not self.exists(folder):
            raise NotFound(f"there is no {folder} in {self.root}")
        names = [file.rpartition("/")[2] for file in self.fs.ls(self._path(folder), detail=False)]
        return {name: self.fs.cat_file(self._path(f"{folder}/{name}")) for name in names}

    def files(self, path: str) -> dict[str, int]:
        """The sizes of the files of the checkpoint `tinker://…`, by name.

        Raises:
            InvalidInput: that is no checkpoint path.
            NotFound: there is no such checkpoint.
        """
        folder = self._path(CheckpointPath.parse(path).folder)
        try:
            entries = [] if self.fs.info(folder).get("islink") else self.fs.ls(folder, detail=True)
        except FileNotFoundError:
            entries = []
        sizes = {e["name"].rpartition("/")[2]: e["size"] for e in entries if e["type"] == "file"}
        if MANIFEST not in sizes:
            raise _no_checkpoint(path)
        return sizes

    def open(self, path: str, file: str) -> IO[bytes]:
        """Open one of the checkpoint's `files` for reading."""
        try:
            return self.fs.open(self._path(f"{CheckpointPath.parse(path).folder}/{file}"), "rb")
        except FileNotFoundError:
            raise _no_checkpoint(path) from None

    def read_checkpoint(self, path: str) -> tuple[dict[str, bytes], dict[str, Any]]:
        """All files of the checkpoint `tinker://…` by name, and its manifest. Errors as
        `read_manifest`."""
        files = {}
        for file in self.files(path):
            with self.open(path, file) as stream:
                files[file] = stream.read()
        return files, _manifest(path, files[MANIFEST])

    def read_manifest(self, path: str) -> dict[str, Any]:
        """What the checkpoint's manifest says. Errors as `files`; `InvalidInput` if it is damaged."""
        self.files(path)
        with self.open(path, MANIFEST) as stream:
            return _manifest(path, stream.read())


def _manifest(path: str, data: bytes) -> dict[str, Any]:
    try:
        return msgspec.json.decode(data, type=dict[str, Any])
    except (msgspec.MsgspecError, RecursionError, ValueError) as error:
        raise InvalidInput(f"checkpoint {path} is damaged: its {MANIFEST}: {error}") from error


def _temporary(folder: str) -> str:
    parent, _, name = folder.rpartition("/")
    return f"{parent}/.tmp-{name}-{uuid.uuid4().hex[:8]}"


def _no_checkpoint(path: str) -> NotFound:
    return NotFound(f"no checkpoint {path!r}; list_checkpoints() shows those there are")
