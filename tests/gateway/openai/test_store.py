"""Trajectories take bounded memory, and what was forgotten is said to be."""

from __future__ import annotations

import pytest

import tinsmith
from tests.envs.scripted import sequence
from tests.tiny import tiny_tokenizer
from tinsmith.envs import ChatRenderer
from tinsmith.gateway.openai import TrajectoryStore

TOKENIZER = tiny_tokenizer()
RENDERER = ChatRenderer(TOKENIZER)


def add(store: TrajectoryStore, owner: str, name: str, text: str = "12") -> None:
    recording = store.open(owner, name)
    prompt = recording.chat_prompt(RENDERER, "m", [{"role": "user", "content": text}])
    answer = {"role": "assistant", "content": text}
    recording.add(TOKENIZER, prompt, sequence(TOKENIZER, text), answer)
    store.settle(owner, name, recording)


def test_the_least_recently_used_of_an_owner_are_forgotten():
    store = TrajectoryStore(owner_tokens=1000)
    for name in "abc":
        add(store, "alice", name)
    add(store, "bob", "a")
    store.get("alice", "a")
    add(store, "alice", "d", "x" * 300)
    assert "b" not in store.of("alice")
    assert list(store.of("alice"))[-2:] == ["a", "d"]
    assert list(store.of("bob")) == ["a"]
    for call in (store.get, store.open):
        with pytest.raises(tinsmith.NotFound, match="'b' was forgotten to make room"):
            call("alice", "b")
    store.delete("alice", "b")
    with pytest.raises(tinsmith.NotFound, match="no trajectory 'b'"):
        store.get("alice", "b")


def test_all_owners_together_have_a_bound():
    store = TrajectoryStore(owner_tokens=10_000, total_tokens=1000)
    for index in range(20):
        add(store, f"owner {index}", "t")
    kept = [index for index in range(20) if store.of(f"owner {index}")]
    assert kept == list(range(20))[-len(kept) :]
    assert 1 < len(kept) < 10


def test_a_trajectory_larger_than_the_bound_is_forgotten_itself():
    store = TrajectoryStore(owner_tokens=500)
    add(store, "alice", "big", "x" * 1000)
    with pytest.raises(tinsmith.NotFound, match="forgotten"):
        store.get("alice", "big")


def test_what_is_deleted_while_it_is_answered_stays_deleted():
    store = TrajectoryStore()
    recording = store.open("alice", "t")
    store.delete("alice", "t")
    store.settle("alice", "t", recording)
    assert store.of("alice") == {}


@pytest.mark.parametrize("name", ["", "a b", "ä", "x" * 201, "a\n"])
def test_an_id_is_plain(name):
    with pytest.raises(tinsmith.InvalidInput, match="a trajectory id is"):
        TrajectoryStore().open("alice", name)
