from __future__ import annotations

import pytest
import reasoning_gym
from reasoning_gym.factory import DATASETS

from tests.envs.scripted import Scripted
from tests.tiny import tiny_tokenizer
from tinsmith.envs import ChatRenderer, EnvPool, EpisodeSpec, check_env, make, play_episode
from tinsmith.primitives.errors import InvalidInput, NotFound

COMPOSITE = [
    {"name": "basic_arithmetic", "weight": 1, "config": {}},
    {"name": "leg_counting", "weight": 1, "config": {}},
]


@pytest.mark.parametrize("name", sorted(DATASETS))
def test_every_dataset_plays_an_episode(name):
    config = {"datasets": COMPOSITE} if name == "composite" else {}
    env = make(f"reasoning_gym:{name}", **config)
    (system, user), _ = env.reset(seed=3)
    assert "<answer>" in system["content"]
    assert user["content"] == env.entry["question"]
    expected = env.entry["answer"]
    turn = "no idea" if expected is None else f"So: <answer>{expected}</answer>"
    _, score, terminated, _, info = env.step(turn)
    assert terminated
    assert info["success"] == (score >= 1.0)
    if expected is not None:
        assert info["success"]


def test_the_score_is_the_librarys_own():
    env = make("reasoning_gym:leg_counting", split="eval", size=50)
    for seed in range(3):
        _, info = env.reset(seed=seed)
        entry = reasoning_gym.create_dataset("leg_counting", seed=0, size=50)[info["index"]]
        assert entry == env.entry
        for turn, answer in [
            (f"<answer>{entry['answer']}</answer>", entry["answer"]),
            (f"I count.\n{entry['answer']}", entry["answer"]),
            ("<answer>1</answer> <answer> 7 </answer>", "7"),
            ("", None),
        ]:
            _, score, _, _, info = env.step(turn)
            assert score == env.dataset.score_answer(answer, entry)
            assert info["answer"] == answer


def test_train_and_eval_share_no_index_and_near_seeds_no_question():
    train = make("reasoning_gym:basic_arithmetic", size=50)
    held_out = make("reasoning_gym:basic_arithmetic", size=50, split="eval")
    drawn = {train.reset(seed=seed)[1]["index"] for seed in range(40)}
    assert len(drawn) == 40
    assert {held_out.reset(seed=seed)[1]["index"] for seed in range(10)} == set(range(50)) - drawn


def test_the_same_seed_gives_the_same_episode():
    check_env("reasoning_gym:pool_matrix", actions=("3",))
    check_env("reasoning_gym:list_functions", actions=("[1, 2]",))


async def test_a_dataset_plays_in_a_process_of_its_own_with_its_config():
    tokenizer = tiny_tokenizer()
    name = "reasoning_gym:chain_sum"
    config = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1, "seed": 5}
    entry = reasoning_gym.create_dataset("chain_sum", **config)[7]
    policy = Scripted(tokenizer, [f"<answer>{entry['answer']}</answer>"])
    spec = EpisodeSpec(name, policy, seed=7, env_kwargs={**config, "system_prompt": "direct"})
    async with EnvPool() as pool:
        trajectory = await play_episode(pool, ChatRenderer(tokenizer), spec)
    assert trajectory.messages[1]["content"] == entry["question"]
    assert trajectory.info["success"]


def test_what_the_library_refuses_is_said():
    with pytest.raises(NotFound, match=r"no such dataset; it has .*chain_sum"):
        make("reasoning_gym:chain_letters")
    with pytest.raises(InvalidInput, match="colour"):
        make("reasoning_gym:chain_sum", colour="red")
    with pytest.raises(InvalidInput, match=r"min_terms"):
        make("reasoning_gym:chain_sum", min_terms=0)
    with pytest.raises(InvalidInput, match="split"):
        make("reasoning_gym:chain_sum", split="test")
