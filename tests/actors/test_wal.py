"""The log: what was on disk comes back, in order; a torn tail is cut; other damage is refused."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tinsmith
from tests.actors.script import run_script
from tinsmith.actors import wal
from tinsmith.actors.wal import Log, SyncThread


@pytest.fixture(scope="module")
def thread():
    thread = SyncThread()
    yield thread
    thread.close()


@contextlib.contextmanager
def opened(folder: Path, thread: SyncThread, **options):
    log = Log(folder, thread, **options)
    try:
        yield log
    finally:
        log.close()


def payloads(log: Log) -> list[bytes]:
    return [bytes(payload) for _, payload in log.records()]


def segments(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.wal"))


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in segments(folder))


def cut_files(folder: Path, total: int) -> None:
    """As after a crash that left `total` bytes."""
    for file in segments(folder):
        begin = int(file.stem[:20])
        if begin >= total and begin:
            file.unlink()
        else:
            os.truncate(file, min(file.stat().st_size, total - begin))


@given(
    st.lists(st.tuples(st.lists(st.binary(max_size=40), max_size=8), st.floats(0, 1)), max_size=5)
)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_after_any_crash_what_was_synced_is_there_and_nothing_else_but_a_whole_prefix(
    thread, tmp_path_factory, lives
):
    folder, wanted = tmp_path_factory.mktemp("log"), []
    for appended, survives in lives:
        with opened(folder, thread, segment_bytes=100) as log:
            assert payloads(log) == wanted
            half = len(appended) // 2
            for payload in appended[:half]:
                log.append(payload)
            log.synced().result()
            synced = log.end
            for payload in appended[half:]:
                log.append(payload)
            end = log.end
            written = wanted + appended
        cut_files(folder, int(synced + survives * (end - synced)))
        with opened(folder, thread, segment_bytes=100) as log:
            back = payloads(log)
        assert len(back) >= len(wanted) + half
        assert back == written[: len(back)]
        wanted = back


def test_records_come_back_with_their_positions_and_old_segments_are_trimmed(thread, tmp_path):
    with opened(tmp_path, thread, segment_bytes=200) as log:
        positions = [log.append(bytes([i]) * 50) for i in range(20)]
        assert [position for position, _ in log.records()] == positions
        assert len(segments(tmp_path)) == 7
        log.trim(positions[10])
        assert log.start == positions[9]  # its segment begins there
    with opened(tmp_path, thread) as log:
        assert [position for position, _ in log.records()] == positions[9:]
        log.trim(log.end)
        assert log.append(b"more") == positions[-1] + (positions[1] - positions[0])


def test_a_torn_tail_is_cut_with_a_warning(thread, tmp_path, caplog):
    with opened(tmp_path, thread) as log:
        log.append(b"whole")
        log.append(b"torn" * 10)
    (file,) = segments(tmp_path)
    os.truncate(file, file.stat().st_size - 1)
    with caplog.at_level(logging.WARNING), opened(tmp_path, thread) as log:
        assert payloads(log) == [b"whole"]
        log.append(b"next")
    assert f"{file}: cut to 25 bytes" in caplog.text
    with opened(tmp_path, thread) as log:
        assert payloads(log) == [b"whole", b"next"]


def test_damage_before_what_was_synced_is_refused_with_its_place(thread, tmp_path):
    with opened(tmp_path, thread, segment_bytes=100) as log:
        for i in range(9):
            log.append(b"%d" % i * 30)
            log.synced().result()
    first, second, *_ = segments(tmp_path)
    data = bytearray(second.read_bytes())
    data[60] ^= 1
    second.write_bytes(data)
    for _ in range(2):  # it was left as it is
        with pytest.raises(tinsmith.CorruptLog, match=rf"{second} at byte 50 is damaged"):
            Log(tmp_path, thread)
    second.unlink()
    with pytest.raises(tinsmith.CorruptLog, match=rf"{first} at byte 100 is damaged"):
        Log(tmp_path, thread)


def test_of_what_was_never_synced_a_later_part_may_survive_an_earlier_one(thread, tmp_path):
    with opened(tmp_path, thread) as log:
        log.append(b"synced")
        log.synced().result()
        torn = log.append(b"torn" * 10)
        log.append(b"whole")
    (file,) = segments(tmp_path)
    data = bytearray(file.read_bytes())
    data[torn + 30] ^= 1
    file.write_bytes(data)
    with opened(tmp_path, thread) as log:
        assert payloads(log) == [b"synced"]


def test_ten_thousand_damaged_logs_give_typed_errors_or_a_clean_cut(thread, tmp_path, monkeypatch):
    rng, whole = np.random.default_rng(0), []
    with opened(tmp_path / "good", thread, segment_bytes=300) as log:
        for i in range(12):
            whole.append(bytes(rng.integers(0, 256, int(rng.integers(0, 80)), np.uint8)))
            log.append(whole[-1])
            if i % 3 == 0:
                log.synced().result()
    good = {file.name: file.read_bytes() for file in (tmp_path / "good").iterdir()}
    folder, refused = tmp_path / "bad", 0
    folder.mkdir()
    monkeypatch.setattr(os, "fsync", lambda _: None)  # this is about what is read
    logging.disable(logging.WARNING)
    for _ in range(10_000):
        for file in folder.iterdir():
            file.unlink()
        files = {name: bytearray(data) for name, data in good.items()}
        for _ in range(int(rng.integers(1, 4))):
            name = str(rng.choice(list(files)))
            data, what = files[name], rng.integers(0, 5)
            at = int(rng.integers(0, len(data) + 1))
            if what == 0 and at < len(data):
                data[at] ^= int(rng.integers(1, 256))
            elif what == 1:
                del data[at:]
            elif what == 2:
                data[at:at] = rng.bytes(int(rng.integers(1, 30)))
            elif what == 3:
                data += bytes(int(rng.integers(1, 100)))
            elif len(files) > 1:
                del files[name]
        for name, data in files.items():
            (folder / name).write_bytes(data)
        try:
            log = Log(folder, thread)
        except tinsmith.CorruptLog:
            refused += 1
            continue
        back = payloads(log)
        begin = next(i for i in range(13) if whole[i : i + len(back)] == back)
        assert begin == 0 or log.start > 0
        log.close()
    logging.disable(logging.NOTSET)
    assert 1000 < refused < 9900


def test_records_have_a_largest_size(thread, tmp_path, monkeypatch):
    monkeypatch.setattr(wal, "MAX_RECORD_BYTES", 100)
    with opened(tmp_path, thread) as log:
        log.append(b"x" * 100)
        with pytest.raises(tinsmith.InvalidInput, match="holds up to 100"):
            log.append(b"x" * 101)
        assert payloads(log) == [b"x" * 100]


def test_a_full_disk_refuses_and_the_log_goes_on_when_there_is_room(thread, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("no small disk can be mounted here; the next test limits a file's size")
    try:
        (disk / "ballast").write_bytes(bytes(40_000))
        with opened(disk / "log", thread, segment_bytes=1 << 20) as log:
            log.append(b"before")
            for _ in range(2):
                with pytest.raises(tinsmith.StorageFailure, match="No space left"):
                    log.append(b"x" * 30_000)
            assert size(disk / "log") == log.end
            (disk / "ballast").unlink()
            log.append(b"y" * 30_000)
            log.synced().result()
        with opened(disk / "log", thread) as log:
            assert payloads(log) == [b"before", b"y" * 30_000]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


LIMITED = """
import resource, sys
from pathlib import Path
import tinsmith
from tinsmith.actors.wal import Log, SyncThread

log = Log(Path(sys.argv[1]), SyncThread())
log.append(b"before")
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
for _ in range(2):
    try:
        log.append(b"x" * 5000)
    except tinsmith.StorageFailure as error:
        assert "File too large" in str(error)
    else:
        raise AssertionError
    assert Path(sys.argv[1], "0" * 20 + "-0000000001.wal").stat().st_size == log.end
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
log.append(b"after")
log.close()
log = Log(Path(sys.argv[1]), SyncThread())
assert [bytes(p) for _, p in log.records()] == [b"before", b"after"]
"""


def test_a_write_that_breaks_off_half_way_leaves_nothing(tmp_path):
    run_script(LIMITED, tmp_path)


def test_a_folder_that_cannot_be_made_is_refused(thread, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(tinsmith.StorageFailure, match="cannot be opened"):
        Log(tmp_path / "file" / "log", thread)


def test_a_log_is_open_once(thread, tmp_path):
    with (
        opened(tmp_path, thread),
        pytest.raises(tinsmith.Unavailable, match="open in another process"),
    ):
        Log(tmp_path, thread, lock_seconds=0.1)
    with opened(tmp_path, thread):
        pass


def test_when_the_disk_fails_nothing_more_is_acknowledged(thread, tmp_path, monkeypatch):
    with opened(tmp_path, thread) as log:
        log.append(b"kept")
        log.synced().result()

        def fail(_: int) -> None:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(os, "fsync", fail)
        log.append(b"lost")
        with pytest.raises(tinsmith.StorageFailure, match="Input/output error"):
            log.synced().result()
        monkeypatch.undo()
        with pytest.raises(tinsmith.StorageFailure):
            log.append(b"more")
        with pytest.raises(tinsmith.StorageFailure):
            log.synced().result()


def test_who_waits_while_it_is_closed_is_told_that_all_is_on_disk(thread, tmp_path, monkeypatch):
    log = Log(tmp_path, thread)
    real, begun, go = os.fsync, threading.Semaphore(0), threading.Semaphore(0)

    def fsync(file: int) -> None:
        begun.release()
        go.acquire()
        real(file)

    monkeypatch.setattr(os, "fsync", fsync)
    log.append(b"one")
    first = log.synced()
    begun.acquire()
    second = log.synced()  # waits for the next fsync, though this one is enough
    go.release()
    first.result(30)
    closing = threading.Thread(target=log.close)
    closing.start()  # finds all on disk, while the next fsync may be under way
    closing.join(1)
    go.release()
    closing.join(30)
    assert not closing.is_alive()
    assert second.result(30) is None


def test_importing_the_log_imports_neither_torch_nor_ray():
    code = "import sys, tinsmith.actors.wal; print({'torch', 'ray'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"
