"""Which versions a sampler holds, and which it would be given again."""

from __future__ import annotations

from dataclasses import dataclass

from tinsmith.engines.adapter_store import AdapterStore


@dataclass(frozen=True)
class Weights:
    value: int

    def same_as(self, other: Weights) -> bool:
        return self == other


def add(store, run_id, version, value, keep=False):
    key = store.key_for(run_id, version, Weights(value))
    store.add(key, Weights(value), keep)
    return key


def test_adding_what_is_held_anew_gives_the_same_store():
    store = AdapterStore(max_kept=3)
    add(store, "a", 1, 1, keep=True)
    add(store, "b", 1, 2, keep=True)
    used = add(store, "a", 2, 3)
    add(store, "a", 3, 4)
    add(store, "c", 1, 5, keep=True)
    add(store, "gone", 1, 6)
    store.drop_run("gone")
    store.sweep([used])
    again = AdapterStore(max_kept=3)
    for key, weights, keep in store.held():
        add(again, key.run_id, key.version, weights.value, keep)
    assert {run: again.newest(run) for run in "abc"} == {"a": 3, "b": 1, "c": 1}
    assert again.newest("gone") is None
    assert {(k.run_id, k.version, w.value) for k, w, _ in again.held()} == {
        ("a", 1, 1),
        ("a", 2, 3),
        ("a", 3, 4),
        ("b", 1, 2),
        ("c", 1, 5),
    }
    assert [k.version for k, _, _ in again.held() if k.run_id == "a"][-1] == 3


def test_a_version_that_is_taken_back_leaves_the_one_before():
    store = AdapterStore()
    add(store, "a", 1, 1)
    store.remove(add(store, "a", 2, 2, keep=True))
    assert store.newest("a") == 1
    # Other weights under the same version: the ones before are what it means again.
    before = add(store, "a", 1, 1)
    store.remove(add(store, "a", 1, 7))
    assert store.key_for("a", 1, Weights(1)) == before
    store.remove(add(store, "b", 1, 1))
    assert store.newest("b") is None
