"""A server that dies is started again, until that is no use."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

import tinsmith
from tests.cli.servers import dies_always, dies_twice, drains, refuses
from tinsmith.cli import supervise as supervising
from tinsmith.cli.supervise import supervise


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(supervising, "LONGEST_PAUSE_S", 0.01)


def test_one_that_dies_is_started_again_until_it_ends_by_itself(tmp_path):
    said: list[str] = []
    assert supervise(dies_twice, (tmp_path,), said.append) == 0
    assert len(list(tmp_path.iterdir())) == 3
    assert "died (signal 9): starting it again" in said[0]
    assert "died (exit status 2)" in said[1]


def test_one_that_always_dies_is_given_up(tmp_path):
    with pytest.raises(tinsmith.Unavailable, match=r"5 times in a row .*exit status 7"):
        supervise(dies_always, (tmp_path,), print)
    assert len(list(tmp_path.iterdir())) == supervising.GIVE_UP


def test_what_it_refuses_at_first_is_final(tmp_path, capfd):
    assert supervise(refuses, (tmp_path,), print) == supervising.REFUSED
    assert len(list(tmp_path.iterdir())) == 1
    assert "tinsmith: the port is no port" in capfd.readouterr().err


def test_a_signal_goes_on_to_it_and_ends_both(tmp_path):
    def stop() -> None:
        while not (tmp_path / "0").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    assert supervise(drains, (tmp_path,), print) == 0
    assert (tmp_path / "drained").exists()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
