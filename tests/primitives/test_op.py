"""An operation is submitted once, and awaited as often and wherever one likes."""

from __future__ import annotations

import asyncio
import gc
import threading
from concurrent.futures import Future

import pytest

import tinsmith
from tinsmith.primitives.op import Op, chain, completed, failed


def soon(future: Future, value) -> None:
    """Complete from another thread, as an actor's answer does."""
    threading.Timer(0.05, future.set_result, [value]).start()


async def test_an_op_may_be_awaited_again_and_by_many_at_once():
    future: Future = Future()
    op = Op(future)
    soon(future, 3)
    assert await asyncio.gather(op, op, op) == [3, 3, 3]
    assert await op == 3
    assert op.done()


def test_an_op_may_be_awaited_from_different_event_loops():
    future: Future = Future()
    op = Op(future)
    soon(future, 3)

    async def wait():
        return await op

    assert asyncio.run(wait()) == 3
    assert asyncio.run(wait()) == 3
    assert op.result() == 3


async def test_an_error_is_raised_wherever_the_op_is_awaited():
    op = Op(failed(tinsmith.NotFound("no such run")))
    for _ in range(2):
        with pytest.raises(tinsmith.NotFound, match="no such run"):
            await op
    with pytest.raises(tinsmith.NotFound):
        op.result()


async def test_a_cancelled_await_leaves_the_operation_alone():
    future: Future = Future()
    op = Op(future)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(op, 0.01)
    assert not future.cancelled()
    future.set_result(3)
    assert await op == 3


async def test_an_error_that_a_cancelled_await_did_not_stay_for_is_not_logged(caplog):
    future: Future = Future()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(Op(future), 0.01)
    future.set_exception(tinsmith.NotFound("gone"))
    await asyncio.sleep(0.01)
    gc.collect()
    assert not caplog.records


def test_result_waits_no_longer_than_its_timeout():
    with pytest.raises(TimeoutError):
        Op(Future()).result(timeout=0.01)


async def test_then_converts_the_result_once_it_is_there():
    calls = []
    future: Future = Future()
    op = Op(future).then(lambda value: calls.append(value) or value + 1)
    assert not op.done()
    future.set_result(3)
    assert await op == await op == 4
    assert calls == [3]


async def test_then_passes_errors_on_and_raises_its_own():
    with pytest.raises(tinsmith.NotFound):
        await Op(failed(tinsmith.NotFound("gone"))).then(lambda value: value)
    with pytest.raises(ZeroDivisionError):
        await Op(completed(1)).then(lambda value: value / 0)


async def test_cancel_tells_whether_the_operation_was_withdrawn_in_time():
    assert await Op(completed(3)).cancel() is False
    withdrawn: list[str] = []

    def withdraw() -> Future[bool]:
        withdrawn.append("asked")
        return completed(True)

    op = Op(Future(), withdraw)
    assert await op.cancel() is True
    assert await op.then(str).cancel() is True
    assert withdrawn == ["asked", "asked"]


def test_a_chain_starts_its_second_call_with_the_first_ones_result():
    first: Future = Future()
    started = []

    def second(value):
        started.append(value)
        return completed(value * 2)

    target = chain(first, second)
    assert started == []
    first.set_result(4)
    assert target.result(1) == 8
    assert started == [4]
