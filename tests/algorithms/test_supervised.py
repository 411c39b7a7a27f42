"""Supervised fine-tuning on real actors: it learns, says what it did, and goes on where it stopped."""

from __future__ import annotations

import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import bootstrap

import tinsmith
from tests.tiny import tiny_tokenizer
from tinsmith.algorithms.chat_data import Example, ExampleMaker, end_tokens
from tinsmith.algorithms.fit import FitWatcher, batch_indices, split
from tinsmith.algorithms.fit_config import SupervisedConfig, learning_rate_factor
from tinsmith.algorithms.supervised import (
    example_nll,
    ratio_interval,
    resume_supervised,
    train_supervised,
    weighted,
)
from tinsmith.primitives.types import ForwardBackwardOutput

ROWS = [
    {"prompt": f"What is {a} times {b}?", "completion": f"The answer is: {a * b}!"}
    for a in range(4)
    for b in range(6)
]
CONFIG = SupervisedConfig(
    model="tiny-llama",
    rank=8,
    learning_rate=1e-2,
    epochs=2,
    batch_size=5,
    validation=0.2,
    checkpoint_every=100,
)


def rows(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def adapter(home, result) -> bytes:
    folder = Path(home) / "runs" / result.run_id / "weights" / f"step-{result.steps:06d}"
    return (folder / "adapter_model.safetensors").read_bytes()


async def test_a_random_model_learns_its_rows_and_says_so(service):
    config = replace(CONFIG, epochs=12, eval_every=20)
    result = await train_supervised(service, config, ROWS)
    assert result.steps == 12 * math.ceil(19 / 5)
    assert result.after["nll"] < 2.0 < 4.0 < result.before["nll"]
    assert result.after["high"] < result.before["low"]
    assert result.before["examples"] == 5
    metrics = rows(result.run_dir)
    steps = [row for row in metrics if "eval" not in row]
    assert [row["step"] for row in steps] == [row["version"] for row in steps]
    assert [row["step"] for row in steps] == list(range(1, result.steps + 1))
    assert [row["step"] for row in metrics if "eval" in row] == [0, 20, 40, 48]
    assert steps[0]["nll"] == pytest.approx(steps[0]["loss"], rel=1e-5)
    saved = json.loads((result.run_dir / "run.json").read_text())
    assert saved["data"]["train"]["used"] == 24
    # The policy says what it learnt.
    policy = await service.create_sampling_client(result.checkpoint)
    tokenizer = policy.get_tokenizer()
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 2 times 3?"}],
        add_generation_prompt=True,
        tokenize=False,
    )
    params = tinsmith.SamplingParams(max_tokens=24, temperature=0)
    sample = await policy.sample(tokenizer.encode(prompt), sampling_params=params)
    assert tokenizer.decode(sample.sequences[0].tokens).startswith("The answer is: ")


async def test_a_stopped_run_goes_on_exactly(service, tmp_path):
    whole = await train_supervised(service, CONFIG, ROWS, run_dir=tmp_path / "whole")

    class CtrlC(FitWatcher):
        def step(self, metrics):
            if metrics["step"] == 3:
                os.kill(os.getpid(), signal.SIGINT)

    part = await train_supervised(service, CONFIG, ROWS, run_dir=tmp_path / "part", watch=CtrlC())
    assert part.stopped
    assert 3 <= part.steps < whole.steps
    assert rows(part.run_dir)[-1]["step"] == part.steps
    with pytest.raises(tinsmith.InvalidInput, match="data is not what"):
        await resume_supervised(service, part.run_dir, ROWS[1:])
    (part.run_dir / "metrics.jsonl").open("a").write('{"step": 99, "nl')  # cut short
    resumed = await resume_supervised(service, part.run_dir, ROWS)
    assert (resumed.steps, resumed.stopped, resumed.before) == (whole.steps, False, None)
    for row, expected in zip(rows(resumed.run_dir), rows(whole.run_dir), strict=True):
        for name in ("step", "nll", "grad_norm", "learning_rate", "tokens", "eval"):
            assert row.get(name) == expected.get(name)
    assert adapter(service.home, resumed) == adapter(service.home, whole)


async def test_a_run_starts_from_a_checkpoint(service):
    first = await train_supervised(service, CONFIG, ROWS)
    second = await train_supervised(service, replace(CONFIG, start=first.checkpoint), ROWS)
    assert second.before["nll"] == pytest.approx(first.after["nll"], abs=1e-6)


async def test_data_that_cannot_be_used_leaves_no_run(service):
    before = {run.run_id for run in await service.list_training_runs()}
    with pytest.raises(tinsmith.InvalidInput, match="line 25: a row must be an object"):
        await train_supervised(service, replace(CONFIG, strict=True), [*ROWS, None])
    with pytest.raises(tinsmith.NotFound, match="there is no file nonesuch"):
        await train_supervised(service, replace(CONFIG, data="nonesuch.jsonl"))
    with pytest.raises(tinsmith.InvalidInput, match="there is no data"):
        await train_supervised(service, CONFIG)
    assert {run.run_id for run in await service.list_training_runs()} == before


# ---- the pieces ----


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    tokenizer = tiny_tokenizer()
    make = ExampleMaker(tokenizer, end_tokens(tokenizer), 512)
    return [make(1, ROWS[0]), make(2, {"prompt": "Hi", "completion": "the quick brown fox" * 3})]


@pytest.mark.parametrize("weighting", ["token", "example"])
def test_weighted_sums_are_the_averages_they_claim_to_be(examples, weighting):
    rng = np.random.default_rng(0)
    datums = [datum for example in examples for datum in example.datums]
    logprobs = [-rng.exponential(size=d.model_input.length).astype(np.float32) for d in datums]
    loss = sum(
        float(-(d.loss_fn_inputs["weights"] * p).sum())
        for d, p in zip(weighted(examples, weighting), logprobs, strict=True)
    )
    trained = [-p[d.loss_fn_inputs["weights"] == 1] for d, p in zip(datums, logprobs, strict=True)]
    expected = {
        "token": np.mean(np.concatenate(trained)),
        "example": np.mean([t.mean() for t in trained]),
    }
    assert loss == pytest.approx(expected[weighting], rel=1e-5)
    output = ForwardBackwardOutput([{"logprobs": p} for p in logprobs], {})
    sums, counts = example_nll(examples, output)
    np.testing.assert_allclose(sums, [t.sum() for t in trained], rtol=1e-6)
    assert counts.tolist() == [len(t) for t in trained]


def test_the_interval_of_a_ratio_agrees_with_the_bootstrap():
    rng = np.random.default_rng(0)
    counts = rng.integers(5, 50, 200).astype(float)
    sums = counts * rng.gamma(4, 0.5, 200)
    ratio, low, high = ratio_interval(sums, counts)
    assert ratio == pytest.approx(sums.sum() / counts.sum())
    expected = bootstrap(
        (sums, counts),
        lambda s, c, axis=-1: s.sum(axis) / c.sum(axis),
        paired=True,
        vectorized=True,
        method="percentile",
        rng=rng,
    ).confidence_interval
    np.testing.assert_allclose([low, high], [expected.low, expected.high], rtol=0.02)
    assert ratio_interval(sums[:1], counts[:1])[1:] == (None, None)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", lambda x: 1.0),
        ("linear", lambda x: 1 + x * (0.1 - 1)),
        ("cosine", lambda x: 0.1 + 0.9 * np.cos(np.pi * x / 2) ** 2),
    ],
)
def test_the_learning_rate_warms_up_and_falls_as_told(schedule, expected):
    rates = [learning_rate_factor(schedule, step, 50, 10, 0.1) for step in range(50)]
    np.testing.assert_allclose(rates[:11], np.arange(1, 12) / 11)
    np.testing.assert_allclose(rates[10:], [expected(i / 40) for i in range(40)], rtol=1e-12)


def test_every_epoch_goes_through_all_examples_in_its_own_order():
    epochs = [
        np.concatenate([batch_indices(11, 4, 0, step) for step in range(3 * e, 3 * e + 3)])
        for e in range(3)
    ]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert [len(batch_indices(11, 4, 0, step)) for step in range(3)] == [4, 4, 3]


def test_a_split_keeps_every_row_once():
    train, held_out = split(range(20), 0.25, seed=3)
    assert sorted(train + held_out) == list(range(20))
    assert len(held_out) == 5
    assert split(range(20), 0.25, seed=3) == (train, held_out)
    assert split(range(20), 0.25, seed=4) != (train, held_out)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, r"SupervisedConfig\.epochs must be at least 1"),
        ({"schedule": "step"}, "schedule must be constant or linear or cosine, got 'step'"),
        ({"train_on": "user"}, "train_on must be all_assistant or last_assistant"),
        ({"validation": 1.0}, "validation must be at least 0 and below 1"),
        ({"learning_rate": -1.0}, "learning_rate must be finite"),
    ],
)
def test_a_bad_config_is_refused_when_it_is_made(settings, message):
    with pytest.raises(tinsmith.InvalidInput, match=message):
        replace(CONFIG, **settings)
