"""Checkpoint folders through fsspec: written under a temporary name, renamed when whole."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path

import fsspec

from ..primitives.errors import NotFound


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
        if self.exists(folder):
            self.fs.rm(self._path(folder), recursive=True)
        self.fs.mv(temporary, self._path(folder), recursive=True)
        return sum(len(data) for data in files.values())

    def read(self, folder: str) -> dict[str, bytes]:
        """All files of a folder by name.

        Raises:
            NotFound: there is no such folder.
        """
        path = self._path(folder)
        if not self.fs.exists(path):
            raise NotFound(f"{self.root}/{folder} does not exist")
        return {
            file.rpartition("/")[2]: self.fs.cat_file(file)
            for file in self.fs.ls(path, detail=False)
        }

    def delete(self, folder: str) -> None:
        if self.exists(folder):
            self.fs.rm(self._path(folder), recursive=True)
