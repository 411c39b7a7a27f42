"""A checkpoint's adapter to take elsewhere: PEFT's two files, alone or as a tar.gz."""

from __future__ import annotations

import gzip
import io
import tarfile
import tempfile
from collections.abc import Iterator

from ..engines.adapter_files import CONFIG, WEIGHTS
from .storage import Storage

PART_BYTES = 1 << 20
IN_MEMORY_BYTES = 64 << 20


def adapter_files(storage: Storage, path: str) -> dict[str, bytes]:
    """PEFT's files of the checkpoint `tinker://…`, by name.

    Raises:
        InvalidInput: that is no checkpoint path.
        NotFound: there is no such checkpoint.
    """
    files, _ = storage.read_checkpoint(path)
    return {name: files[name] for name in (CONFIG, WEIGHTS)}


def adapter_archive(storage: Storage, path: str) -> Iterator[bytes]:
    """The same files as a tar.gz, in parts; the same bytes every time. Errors as `adapter_files`."""
    archive = tempfile.SpooledTemporaryFile(max_size=IN_MEMORY_BYTES)  # noqa: SIM115 - streamed later
    # Weights are noise to a compressor: the quickest level loses nothing.
    with (
        gzip.GzipFile(fileobj=archive, mode="wb", compresslevel=1, filename="", mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w") as tar,
    ):
        for name, data in adapter_files(storage, path).items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(data), 0o644
            tar.addfile(member, io.BytesIO(data))
    archive.seek(0)
    return _parts(archive)


def _parts(archive: tempfile.SpooledTemporaryFile[bytes]) -> Iterator[bytes]:
    with archive:
        while part := archive.read(PART_BYTES):
            yield part
