"""Checkpoints expire, are shared, copied and deleted, whatever else is done to their names."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from pathlib import Path

import pytest

import tinsmith
from tests.actors.test_checkpoints import assert_same_weights, trained_run
from tests.actors.test_training import new_run
from tinsmith.actors.registry import Registry
from tinsmith.primitives.op import Op
from tinsmith.primitives.paths import CheckpointPath
from tinsmith.primitives.types import Checkpoint, LoraConfig, SaveResponse, TrainingRun


def call(service, method: str, *args):
    return Op(service.controller.call(method, *args))


def folder(service, path: str) -> Path:
    return Path(service.home) / CheckpointPath.parse(path).folder


async def test_a_checkpoint_with_a_lifetime_is_deleted_at_its_end(service):
    training = await trained_run(service)
    short = [
        (await training.save_state("short", ttl_seconds=3600)).path,
        (await training.save_weights_for_sampler("short", ttl_seconds=3600)).path,
    ]
    kept = (await training.save_state("kept", ttl_seconds=3600)).path
    listed = await service.list_checkpoints(training.run_id)
    assert {c.path for c in listed} == {*short, kept}
    assert all(3000 < c.expires - time.time() <= 3600 for c in listed)
    policy = await service.create_sampling_client(short[1])
    await policy.sample([1, 2], 1, tinsmith.SamplingParams(max_tokens=1))

    for path in short:
        await service.set_checkpoint_ttl(path, 1)
    await asyncio.sleep(1.1)
    assert [c.path for c in await service.list_checkpoints(training.run_id)] == [kept]
    for path in short:
        with pytest.raises(tinsmith.NotFound, match="no checkpoint"):
            await call(service, "get_checkpoint", path)
        with pytest.raises(tinsmith.NotFound, match="no checkpoint"):
            await service.set_checkpoint_ttl(path, 60)
    again = (await training.save_state("short")).path  # its name is free, deleted or not
    await call(service, "delete_expired")
    assert [folder(service, path).exists() for path in short] == [True, False]
    assert (await call(service, "get_checkpoint", again)).expires is None
    with pytest.raises(tinsmith.NotFound, match="holds no weights"):
        await policy.sample([1, 2], 1, tinsmith.SamplingParams(max_tokens=1))

    await service.set_checkpoint_ttl(kept, None)
    await service.set_checkpoint_ttl(again, 600)
    by_path = {c.path: c.expires for c in await service.list_checkpoints(training.run_id)}
    assert by_path[kept] is None
    assert 0 < by_path[again] - time.time() <= 600


@pytest.mark.parametrize("ttl", [0, -1, 1.5, True, "60"])
async def test_a_lifetime_is_a_positive_number_of_seconds(service, ttl):
    training = await new_run(service)
    path = (await training.save_state("a")).path
    for submit in (
        lambda: training.save_state("b", ttl_seconds=ttl),
        lambda: training.save_weights_for_sampler("b", ttl_seconds=ttl),
        lambda: service.set_checkpoint_ttl(path, ttl),
        lambda: call(service, "set_checkpoint_ttl", path, ttl),
        lambda: training._submit(
            "save_weights_for_sampler", name="b", overwrite=False, ttl_seconds=ttl
        ),
    ):
        with pytest.raises(tinsmith.InvalidInput, match="ttl_seconds must be a positive integer"):
            await submit()
    await training.save_state("b")


async def test_a_checkpoint_is_public_until_it_is_not_or_is_another(service):
    training = await new_run(service)
    path = (await training.save_state("shared")).path
    for public in (True, False, True):
        await service.publish_checkpoint(path, public)
        assert (await call(service, "get_checkpoint", path)).public is public
    await training.save_state("shared", overwrite=True)
    (checkpoint,) = await service.list_checkpoints(training.run_id)
    assert checkpoint.public is False
    with pytest.raises(tinsmith.NotFound, match="no checkpoint"):
        await service.publish_checkpoint(f"tinker://{training.run_id}/weights/none")


@pytest.mark.parametrize("kind", ["save_state", "save_weights_for_sampler"])
async def test_a_copy_stands_on_its_own(service, kind):
    source, target = await trained_run(service), await new_run(service)
    path = (await getattr(source, kind)("mid", ttl_seconds=3600)).path
    await service.publish_checkpoint(path)
    copy = await service.copy_checkpoint(path, target.run_id)
    assert copy == path.replace(source.run_id, target.run_id)
    (old,) = await service.list_checkpoints(source.run_id)
    (new,) = await service.list_checkpoints(target.run_id)
    assert (new.path, new.run_id, new.expires, new.public) == (copy, target.run_id, None, False)
    assert (new.version, new.size_bytes) == (2, old.size_bytes)
    files = [p.read_bytes() for p in sorted(folder(service, path).iterdir())]
    assert [p.read_bytes() for p in sorted(folder(service, copy).iterdir())] == files
    assert sum(map(len, files)) == new.size_bytes
    await service.delete_checkpoint(path)
    await assert_same_weights(source, await service.create_training_client_from_state(copy))


async def test_a_copy_takes_no_name_and_no_run_that_it_does_not_fit(service):
    source, target = await trained_run(service), await new_run(service)
    path = (await source.save_state("a")).path
    await target.save_state("a")
    for run_id in (source.run_id, target.run_id):
        with pytest.raises(tinsmith.InvalidInput, match="exists already"):
            await service.copy_checkpoint(path, run_id)
    narrow = await service.create_lora_training_client("tiny-llama", rank=2)
    with pytest.raises(tinsmith.InvalidInput, match=r"rank=4.*rank=2"):
        await service.copy_checkpoint(path, narrow.run_id)
    with pytest.raises(tinsmith.NotFound, match="no run 'none'"):
        await service.copy_checkpoint(path, "none")
    with pytest.raises(tinsmith.NotFound, match="no checkpoint"):
        await service.copy_checkpoint(f"{path}-none", target.run_id)
    leftovers = list((Path(service.home) / "runs" / target.run_id).rglob(".tmp-*"))
    assert leftovers == []


async def test_saving_copying_and_deleting_one_name_at_once_leaves_all_or_nothing_of_it(service):
    source, target = await trained_run(service), await new_run(service)
    path = (await source.save_state("contested")).path
    mine = path.replace(source.run_id, target.run_id)
    for _ in range(8):
        results = await asyncio.gather(
            target.save_state("contested", overwrite=True),
            service.copy_checkpoint(path, target.run_id),
            service.delete_checkpoint(mine),
            target.save_state("contested"),
            service.copy_checkpoint(path, target.run_id),
            service.delete_checkpoint(mine),
            return_exceptions=True,
        )
        for result in results:
            if isinstance(result, BaseException):
                assert isinstance(result, tinsmith.InvalidInput | tinsmith.NotFound), repr(result)
        listed = {c.path for c in await service.list_checkpoints(target.run_id)}
        assert (mine in listed) == folder(service, mine).exists()
        if listed:
            await target.load_state_with_optimizer(mine)
            await service.delete_checkpoint(mine)
    names = [p.name for p in (Path(service.home) / "runs" / target.run_id / "weights").iterdir()]
    assert names == []


async def test_a_run_deleted_while_it_saves_leaves_nothing(service):
    for i in range(6):
        training = await new_run(service)
        saving = [training.save_state(f"s{i}") for i in range(4)]
        await asyncio.sleep(0.02 * i)
        await service.delete_training_run(training.run_id)
        for result in await asyncio.gather(*saving, return_exceptions=True):
            assert isinstance(result, SaveResponse | tinsmith.NotFound), repr(result)
        with pytest.raises(tinsmith.NotFound, match="no run"):
            await service.list_checkpoints(training.run_id)
        assert not (Path(service.home) / "runs" / training.run_id).exists()


def test_a_registry_of_the_first_version_opens_and_keeps_what_it_holds(tmp_path):
    file = tmp_path / "registry.sqlite"
    old = sqlite3.connect(file)
    old.executescript(
        """
        CREATE TABLE runs (
            run_id TEXT PRIMARY KEY, base_model TEXT NOT NULL, lora TEXT NOT NULL,
            user_metadata TEXT NOT NULL, created REAL NOT NULL, last_request REAL NOT NULL);
        CREATE TABLE checkpoints (
            path TEXT PRIMARY KEY, run_id TEXT NOT NULL REFERENCES runs(run_id) ON DELETE CASCADE,
            kind TEXT NOT NULL, name TEXT NOT NULL, version INTEGER NOT NULL, created REAL NOT NULL,
            size_bytes INTEGER NOT NULL, user_metadata TEXT NOT NULL);
        INSERT INTO runs VALUES ('r', 'm', '{"rank": 4}', '{}', 1.0, 1.0);
        INSERT INTO checkpoints VALUES
            ('tinker://r/weights/a', 'r', 'weights', 'a', 2, 1.0, 10, '{"x": 1}');
        """
    )
    old.close()
    registries = [Registry(file), Registry(file)]
    expected = Checkpoint("tinker://r/weights/a", "r", "weights", "a", 2, 1.0, 10, {"x": 1})
    for registry in registries:
        assert registry.checkpoints() == [expected]
        assert registry.runs() == [TrainingRun("r", "m", LoraConfig(rank=4), 1.0, 1.0)]
    registries[0].set_expires(expected.path, time.time() - 1)
    assert registries[1].checkpoints() == []
    assert [c.path for c in registries[1].expired_checkpoints()] == [expected.path]
