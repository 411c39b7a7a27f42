"""Checkpoint folders through fsspec: written under a temporary name, renamed when whole."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fsspec

from ..primitives.errors import NotFound
from ..primitives.paths import CheckpointPath

MANIFEST = "manifest.json"


class Storage:
    """Immutable folders of files below a root, which may be a local folder or a bucket's URL."""

    def __init__(self, root: str | Path) -> None:
        self.root = str(root)
        self.fs, self.base = fsspec.core.url_to_fs(self.root)

    def _path(self, folder: str) -> str:
        return f"{self.base.rstrip('/')}/{folder}"

    def exists(self, folder: str) -> bool:
        return self.fs.exists(self._path(folder))

    def write(self, folder: str, files: Mapping[str, bytes]) -> int:
        """Write a whole folder, replacing one of that name; returns its size in bytes.

        A reader sees either all files or none; a write cut short leaves only a `.tmp-` folder.
        """
        parent, _, name = folder.rpartition("/")
        temporary = self._path(f"{parent}/.tmp-{name}-{uuid.uuid4().hex[:8]}")
        self.fs.makedirs(temporary, exist_ok=True)
        for file, data in files.items():
            self.fs.pipe_file(f"{temporary}/{file}", data)
        replaced = f"{temporary}-replaced"
        if self.exists(folder):
            self.fs.mv(self._path(folder), replaced, recursive=True)
        self.fs.mv(temporary, self._path(folder), recursive=True)
        if self.fs.exists(replaced):
            self.fs.rm(replaced, recursive=True)
        return sum(len(data) for data in files.values())

    def read_checkpoint(self, path: str) -> tuple[dict[str, bytes], dict[str, Any]]:
        """All files of the checkpoint `tinker://…` by name, and its manifest.

        Raises:
            InvalidInput: that is no checkpoint path.
            NotFound: there is no such checkpoint.
        """
        folder = CheckpointPath.parse(path).folder
        if not self.exists(f"{folder}/{MANIFEST}"):
            raise NotFound(f"no checkpoint {path!r}; list_checkpoints() shows those there are")
        files = self.read(folder)
        return files, json.loads(files[MANIFEST])

    def read(self, folder: str) -> dict[str, bytes]:
        """All files of a folder, by name.

        Raises:
            NotFound: there is no such folder.
        """
        if not self.exists(folder):
            raise NotFound(f"there is no {folder} in {self.root}")
        return {
            file.rpartition("/")[2]: self.fs.cat_file(file)
            for file in self.fs.ls(self._path(folder), detail=False)
        }

    def copy(self, folder: str, target: str) -> None:
        """Copy a whole folder; a reader sees either all of it or nothing."""
        self.write(target, self.read(folder))

    def delete(self, folder: str) -> None:
        if self.exists(folder):
            self.fs.rm(self._path(folder), recursive=True)
