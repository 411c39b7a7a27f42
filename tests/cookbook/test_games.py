"""Recipes with other players: scripted ones, other models, the policy itself."""

from __future__ import annotations

import pytest

from tests.cookbook.kitchen import SAME

SMALL = ("batch_size=2", "group_size=2", "eval_every=0", "max_steps=2")
GAMES = {
    "guess_number": SMALL,
    # Another model answers: `Qwen/Qwen3.5-9B`, which only its builder could change.
    "twenty_questions": SMALL,
}


@pytest.mark.parametrize("game", GAMES)
def test_a_game_of_many_turns(kitchen, tmp_path, game):
    log = kitchen.train(
        f"recipes.multiplayer_rl.{game}.train", tmp_path / "log", *GAMES[game], steps=2
    )
    assert min(log.column("env/all/turns_per_episode")) >= 10
    assert max(map(abs, log.column("optim/kl_sample_train_v1"))) < SAME


def test_text_arena_plays_itself_and_is_tested_against_its_base(kitchen, tmp_path):
    log = kitchen.train(
        "recipes.multiplayer_rl.text_arena.train",
        tmp_path / "log",
        # The recipe stops at a bracket only, so that a model this random may end its turn twice
        # before; its own renderer takes that for a sampler's fault.
        "renderer_name=role_colon",
        "batch_size=4",
        "num_train_datapoints=8",
        "num_test_datapoints=2",
        "eval_every=1",
        "max_steps=2",
        steps=2,
    )
    assert max(map(abs, log.column("optim/kl_sample_train_v1"))) < SAME
    assert max(log.column("grad_norm")) > 0
    assert any(name.startswith("test/") for row in log.metrics for name in row)
