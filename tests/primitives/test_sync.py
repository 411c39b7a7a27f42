"""`.sync` blocks, in plain scripts and inside a running event loop."""

from __future__ import annotations

import asyncio
import copy
import pickle
from concurrent.futures import Future

import pytest

import tinsmith
from tinsmith.primitives.op import Op, completed, failed
from tinsmith.primitives.sync import HasSync, SyncClient


class Client(HasSync):
    """All the kinds of members that the real clients have."""

    name = "client"

    def __init__(self) -> None:
        self.streams_closed = 0

    def op(self, value):
        return Op(completed(value))

    def fails(self):
        return Op(failed(tinsmith.NotFound("gone")))

    def child(self):
        return Op(completed(Client()))

    async def coroutine(self, value):
        await asyncio.sleep(0)
        return value

    async def stream(self, count):
        try:
            for i in range(count):
                await asyncio.sleep(0)
                yield i
        finally:
            self.streams_closed += 1

    def plain(self, other=None):
        return other


def check_everything(client: Client) -> None:
    sync = client.sync
    assert sync.name == "client"
    assert sync.op(3) == 3
    assert sync.coroutine(4) == 4
    assert list(sync.stream(3)) == [0, 1, 2]
    assert isinstance(sync.child(), SyncClient)
    assert sync.child().op(5) == 5
    assert sync.plain(sync) is not None
    with pytest.raises(tinsmith.NotFound, match="gone"):
        sync.fails()


def test_it_works_in_a_plain_script():
    check_everything(Client())


async def test_it_works_inside_a_running_event_loop_as_in_a_notebook():
    check_everything(Client())
    assert asyncio.get_running_loop().is_running()


def test_leaving_a_stream_early_closes_it_at_once():
    client = Client()
    for i in client.sync.stream(10):
        if i == 2:
            break
    assert client.streams_closed == 1


def test_a_clients_blocking_view_passes_the_client_itself_on():
    client, other = Client(), Client()
    seen = []
    client.plain = lambda *args, **kwargs: seen.extend([*args, *kwargs.values()])
    client.sync.plain(other.sync, keyword=other.sync)
    assert seen == [other, other]


def test_the_view_is_used_as_a_context_manager_and_closes_its_client():
    client = Client()
    closed = []
    client.close = lambda: closed.append(True)
    with client.sync as sync:
        assert sync.op(1) == 1
    assert closed == [True]


def test_the_view_can_be_copied_and_pickled():
    for view in (copy.copy(Client().sync), pickle.loads(pickle.dumps(Client().sync))):
        assert view.op(1) == 1


def test_a_blocking_call_that_never_ends_can_be_given_a_time():
    with pytest.raises(TimeoutError):
        Op(Future()).result(0.01)
