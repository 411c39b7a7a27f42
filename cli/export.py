"""`tinsmith export`: a checkpoint as others load it, a PEFT adapter or a whole model."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)

from ..actors.manifest import Manifest
from ..actors.storage import MANIFEST, Storage
from ..primitives.errors import InvalidInput
from ..primitives.paths import CheckpointPath
from .lookup import find_checkpoint
from .options import AsJson, Home, print_json

ARCHIVE = ".tar.gz"
# One of these, and weights beside it, make a folder that may have been exported and may be replaced.
EXPORTED = ("adapter_config.json", "config.json")


def export(
    home: Home,
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH",
            help="A tinker:// path, or a run's id or folder (its newest checkpoint).",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            show_default="named after run and checkpoint, here",
            help="The file (.tar.gz) or folder to write.",
        ),
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="A whole model, the adapter merged into its base.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what was exported there before.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint as a PEFT adapter, or with --merge as a whole Hugging Face model."""
    checkpoint = find_checkpoint(path, home)
    target = (out or _default_name(checkpoint, merge)).expanduser().resolve()
    archive = target.name.endswith(ARCHIVE)
    if merge and archive:
        raise InvalidInput(f"--merge writes a folder: leave the {ARCHIVE} out of {target.name}")
    _check_free(target, archive, overwrite)
    storage = Storage(home)
    base_model = Manifest.of(checkpoint, storage.read_manifest(checkpoint)).base_model
    target.parent.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    if archive:
        _write_archive(storage, checkpoint, target, console)
    elif merge:
        _write_model(storage, checkpoint, base_model, home, target, console)
    else:
        _write_adapter(storage, checkpoint, target)
    if as_json:
        print_json({"checkpoint": checkpoint, "base_model": base_model, "out": str(target)})
        return
    what = (
        f"{base_model} with {checkpoint} merged in" if merge else f"{checkpoint} for {base_model}"
    )
    typer.echo(f"wrote {what} to {target}")


def _default_name(checkpoint: str, merge: bool) -> Path:
    parsed = CheckpointPath.parse(checkpoint)
    # Without colons, before which `tar` expects the name of a host.
    name = f"{parsed.run_id}-{parsed.name}".replace(":", "-")
    return Path(name if merge else name + ARCHIVE)


def _check_free(target: Path, archive: bool, overwrite: bool) -> None:
    if not target.exists():
        return
    if not overwrite:
        raise InvalidInput(f"{target} exists already; take another name, or --overwrite")
    if archive != target.is_file():
        raise InvalidInput(f"{target} is no {'file' if archive else 'folder'}; take another name")
    if not archive and not _was_exported(target):
        raise InvalidInput(f"{target} is nothing that was exported; it is not overwritten")


def _was_exported(folder: Path) -> bool:
    described = any((folder / file).is_file() for file in EXPORTED)
    is_checkpoint = (folder / MANIFEST).exists()
    return described and any(folder.glob("*.safetensors")) and not is_checkpoint


def _write_archive(storage: Storage, checkpoint: str, target: Path, console: Console) -> None:
    from ..actors.archive import adapter_archive, adapter_sizes

    pieces = adapter_archive(storage, checkpoint)
    total = sum(adapter_sizes(storage, checkpoint).values())
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".new-") as scratch:
        whole = Path(scratch) / target.name
        with whole.open("wb") as file, _progress(console, DownloadColumn()) as progress:
            task = progress.add_task("packing", total=total)
            for piece in pieces:
                file.write(piece)
                progress.advance(task, len(piece))
            progress.update(task, total=file.tell(), completed=file.tell())
        os.replace(whole, target)


def _write_adapter(storage: Storage, checkpoint: str, target: Path) -> None:
    from ..actors.archive import adapter_files
    from ..engines.models import new_folder

    files = adapter_files(storage, checkpoint)
    with new_folder(target) as folder:
        for name, data in files.items():
            (folder / name).write_bytes(data)
        _remove(target)


def _write_model(
    storage: Storage, checkpoint: str, base_model: str, home: Path, target: Path, console: Console
) -> None:
    from ..actors.archive import adapter_files
    from ..engines.merge import merge_adapter
    from ..engines.models import new_folder, resolve_model

    base = resolve_model(base_model, home, console.print)
    if base.resolve() == target:
        raise InvalidInput(f"{target} is the base model itself; take another name")
    files = adapter_files(storage, checkpoint)
    with _progress(console, MofNCompleteColumn()) as progress:
        task = progress.add_task("merging layers", total=None)
        with new_folder(target) as folder:
            merge_adapter(
                base,
                files,
                folder,
                lambda done, total: progress.update(task, completed=done, total=total),
            )
            _remove(target)


def _remove(folder: Path) -> None:
    """Make way for the new one, which is whole by now."""
    if folder.exists():
        shutil.rmtree(folder)


def _progress(console: Console, count: ProgressColumn) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), count, TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)
