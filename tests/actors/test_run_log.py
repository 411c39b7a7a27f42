from __future__ import annotations

import pytest

from tinsmith.actors.journal import Journal
from tinsmith.actors.run_log import RunLog
from tinsmith.actors.wal import SyncThread
from tinsmith.primitives.errors import NotFound, StorageFailure


@pytest.mark.parametrize("closed", [False, True])
async def test_what_waits_for_a_log_that_was_closed_meanwhile_is_told_why(tmp_path, closed):
    thread = SyncThread()
    journal = Journal(tmp_path / "log", thread, replay_seconds=1.0, service=None)
    log = RunLog("r", journal, "key", wake=lambda: None, on_failure=lambda log: None)
    await log.on_disk()
    log.closed = closed
    journal.close()
    with pytest.raises(NotFound if closed else StorageFailure, match="closed"):
        await log.on_disk()
    thread.close()
