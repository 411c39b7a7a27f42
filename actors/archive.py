"""A checkpoint's adapter as others take it: PEFT's two files, or a `.tar.gz` of them."""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Iterator
from typing import IO

from ..engines.adapter_files import CONFIG, WEIGHTS
from ..primitives.errors import NotFound, Unavailable
from .storage import Storage

FILES = (CONFIG, WEIGHTS)
GZIP = 31  # zlib's `wbits` for a gzip stream; it writes no time and no name into the header
CHUNK = 1 << 20


def adapter_sizes(storage: Storage, path: str) -> dict[str, int]:
    """Bytes of each file that PEFT loads.

    Raises:
        InvalidInput: that is no checkpoint path.
        NotFound: there is no such checkpoint.
    """
    sizes = storage.files(path)
    if missing := [file for file in FILES if file not in sizes]:
        raise NotFound(f"checkpoint {path} has lost its {missing[0]}")
    return {file: sizes[file] for file in FILES}


def adapter_file(storage: Storage, path: str, file: str) -> bytes:
    """One of these files. Errors as `adapter_sizes`."""
    with storage.open(path, file) as stream:
        return stream.read()


def adapter_files(storage: Storage, path: str) -> dict[str, bytes]:
    """The files that PEFT loads, by name. Errors as `adapter_sizes`."""
    return {file: adapter_file(storage, path, file) for file in adapter_sizes(storage, path)}


def adapter_archive(storage: Storage, path: str) -> Iterator[bytes]:
    """A `.tar.gz` of the files that PEFT loads, piece by piece; the same bytes every time.

    Raises, before the first piece, as `adapter_sizes`.
    """
    # Opened before the first byte goes out: a checkpoint deleted meanwhile still arrives whole.
    opened = [
        (file, size, storage.open(path, file))
        for file, size in adapter_sizes(storage, path).items()
    ]
    return _compressed(_tar(opened))


def _tar(opened: list[tuple[str, int, IO[bytes]]]) -> Iterator[bytes]:
    for name, size, stream in opened:
        member = tarfile.TarInfo(name)  # with time, owner and group zero
        member.size = size
        yield member.tobuf()
        with stream:
            for chunk in iter(lambda: stream.read(CHUNK), b""):  # noqa: B023 (used up right here)
                size -= len(chunk)
                yield chunk
        if size:
            raise Unavailable(f"{name} changed while it was read; try again")
        yield bytes(-member.size % tarfile.BLOCKSIZE)
    yield bytes(2 * tarfile.BLOCKSIZE)


def _compressed(pieces: Iterator[bytes]) -> Iterator[bytes]:
    # Trained floats hardly compress: more effort would only cost time.
    gzip = zlib.compressobj(level=1, wbits=GZIP)
    for piece in pieces:
        if data := gzip.compress(piece):
            yield data
    yield gzip.flush()
