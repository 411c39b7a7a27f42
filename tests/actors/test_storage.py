"""Checkpoint folders on disk and in a bucket, and the archive of one."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import resource
import tarfile
from pathlib import Path

import pytest

import tinsmith
from tinsmith.actors.archive import adapter_archive, adapter_files, adapter_sizes
from tinsmith.actors.storage import Storage
from tinsmith.primitives.errors import StorageFailure
from tinsmith.primitives.paths import CheckpointPath

PATH = "tinker://0f8e:train:0/weights/step-1"
FILES = {
    "adapter_model.safetensors": bytes(range(256)) * 9000,  # more than two chunks
    "adapter_config.json": b"{}",
    "optimizer.safetensors": b"secret",
    "manifest.json": json.dumps({"version": 3}).encode(),
}


@pytest.fixture(params=["file", "memory"])
def storage(request, tmp_path) -> Storage:
    root = str(tmp_path) if request.param == "file" else f"memory://{tmp_path.name}"
    return Storage(root)


def save(storage: Storage, files=FILES, path: str = PATH) -> None:
    folder = CheckpointPath.parse(path).folder
    storage.commit(storage.stage(folder, files), folder)


def test_what_is_committed_is_read_back_and_what_is_only_staged_is_not_there(storage):
    folder = CheckpointPath.parse(PATH).folder
    staged = storage.stage(folder, FILES)
    with pytest.raises(tinsmith.NotFound, match="no checkpoint"):
        storage.read_checkpoint(PATH)
    storage.commit(staged, folder)
    assert storage.read_checkpoint(PATH) == (FILES, {"version": 3})
    assert storage.read_manifest(PATH) == {"version": 3}
    assert storage.files(PATH) == {name: len(data) for name, data in FILES.items()}
    save(storage, {"manifest.json": b"{}"})
    assert storage.read_checkpoint(PATH) == ({"manifest.json": b"{}"}, {})
    storage.delete(folder)
    assert not storage.exists(folder)


def test_a_copy_has_all_files_and_their_size(storage):
    save(storage)
    other = CheckpointPath("other", "weights", "step-1")
    staged, size = storage.stage_copy(PATH, other.folder)
    storage.commit(staged, other.folder)
    assert storage.read_checkpoint(str(other)) == (FILES, {"version": 3})
    assert size == sum(map(len, FILES.values()))
    with pytest.raises(tinsmith.NotFound, match="no checkpoint"):
        storage.stage_copy("tinker://none/weights/none", other.folder)


def test_symbolic_links_are_not_followed(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "manifest.json").write_text("{}")
    (tmp_path / "outside" / "secret").write_text("secret")
    storage = Storage(tmp_path / "home")
    save(storage)
    folder = tmp_path / "home" / CheckpointPath.parse(PATH).folder
    (folder / "linked").symlink_to(tmp_path / "outside" / "secret")
    assert storage.files(PATH).keys() == FILES.keys()
    assert storage.read_checkpoint(PATH)[0].keys() == FILES.keys()
    staged, _ = storage.stage_copy(PATH, "runs/other/weights/a")
    assert {p.name for p in (tmp_path / "home" / staged).iterdir()} == FILES.keys()

    link = folder.with_name("link")
    link.symlink_to(tmp_path / "outside")
    with pytest.raises(tinsmith.NotFound, match="no checkpoint"):
        storage.read_checkpoint(PATH.replace("step-1", "link"))
    storage.delete(CheckpointPath.parse(PATH.replace("step-1", "link")).folder)
    storage.delete(CheckpointPath.parse(PATH).folder)
    assert not link.is_symlink()
    assert not folder.exists()
    assert (tmp_path / "outside" / "secret").read_text() == "secret"


def test_an_archive_holds_the_adapter_alone_and_is_the_same_every_time(storage):
    save(storage)
    pieces = list(adapter_archive(storage, PATH))
    assert len(pieces) > 1
    first = b"".join(pieces)
    with tarfile.open(fileobj=io.BytesIO(gzip.decompress(first))) as tar:
        unpacked = {m.name: tar.extractfile(m).read() for m in tar.getmembers()}
        assert {(m.mtime, m.uid, m.mode) for m in tar.getmembers()} == {(0, 0, 0o644)}
    adapter = ("adapter_model.safetensors", "adapter_config.json")
    assert unpacked == {name: FILES[name] for name in adapter} == adapter_files(storage, PATH)
    assert adapter_sizes(storage, PATH) == {name: len(FILES[name]) for name in adapter}

    copy = CheckpointPath("other", "weights", "b")
    staged, _ = storage.stage_copy(PATH, copy.folder)
    storage.commit(staged, copy.folder)
    for path in (PATH, str(copy)):
        again = b"".join(adapter_archive(storage, path))
        assert hashlib.sha256(again).digest() == hashlib.sha256(first).digest()


def test_an_archive_begun_is_finished_though_its_checkpoint_is_deleted(tmp_path):
    storage = Storage(tmp_path)
    save(storage)
    expected = b"".join(adapter_archive(storage, PATH))
    pieces = adapter_archive(storage, PATH)
    storage.delete(CheckpointPath.parse(PATH).folder)
    assert b"".join(pieces) == expected


def test_a_missing_checkpoint_is_told_before_the_first_piece(storage):
    with pytest.raises(tinsmith.NotFound, match="no checkpoint"):
        adapter_archive(storage, PATH)
    with pytest.raises(tinsmith.InvalidInput, match="is not a checkpoint path"):
        adapter_archive(storage, "step-1")
    save(storage, {"manifest.json": b"{}"})
    with pytest.raises(tinsmith.NotFound, match=r"has lost its adapter_config\.json"):
        adapter_archive(storage, PATH)


def test_a_home_may_be_given_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(Storage(Path("home")))
    assert Storage(tmp_path / "home").read_manifest(PATH) == {"version": 3}


def test_a_disk_that_takes_nothing_is_told_as_such_and_leaves_nothing_behind(tmp_path):
    storage = Storage(tmp_path)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, limit[1]))
    try:
        with pytest.raises(StorageFailure, match=r"runs/r/weights/a cannot be written.*too large"):
            storage.stage("runs/r/weights/a", {"adapter": bytes(100)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert list((tmp_path / "runs/r/weights").iterdir()) == []
