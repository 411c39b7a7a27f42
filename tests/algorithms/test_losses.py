"""Every loss and its gradient against a few lines of numpy, on random inputs, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tinsmith
from tinsmith.algorithms.losses import get_loss, loss_names, ratio_metrics


def reference(name, p, x, c):
    """(loss, d loss / d p) of one token, written out by cases. `x["s"]` is its sequence's ratio."""
    if name == "cross_entropy":
        return -x["weights"] * p, -x["weights"]
    q, a = x["logprobs"], x["advantages"]
    r = np.exp(p - q)
    if name == "importance_sampling":
        return -r * a, -r * a
    if name == "dro":
        return -(p * a - c["beta"] / 2 * (p - q) ** 2), -(a - c["beta"] * (p - q))
    if name == "stable_reinforce":
        pull = c["kl_coeff"] * (p - q) if x["sampled_mask"] else 0.0
        weight = min(max(r, 1 / c["ratio_cap"]), c["ratio_cap"]) * (a - pull)
        return -weight * p, -weight
    low, high = x["clip_low_threshold"], x["clip_high_threshold"]
    ratio = x["s"] if name == "gspo" else r
    clipped = min(max(ratio, low), high)
    if name == "cispo":
        return -clipped * p * a, -clipped * a
    assert name in ("ppo", "gspo")
    blocked = (a > 0 and ratio > high) or (a < 0 and ratio < low)
    return (-clipped * a, 0.0) if blocked else (-ratio * a, -ratio * a)


CONFIGS = {
    "cross_entropy": {},
    "importance_sampling": {},
    "ppo": {"clip_low_threshold": 0.7, "clip_high_threshold": 1.1},
    "cispo": {"clip_low_threshold": 0.5, "clip_high_threshold": 1.5},
    "gspo": {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1},
    "dro": {"beta": 0.3},
    "stable_reinforce": {"kl_coeff": 0.7, "ratio_cap": 1.3},
}


def test_every_loss_has_a_reference():
    assert loss_names() == sorted(CONFIGS)


def random_inputs(rng, tokens, config):
    """A batch of three sequences whose tokens stand mixed, with every input of every loss."""
    p = rng.normal(-1, 1, tokens)
    x = {
        "weights": rng.normal(size=tokens),
        "logprobs": p + rng.normal(0, 0.5, tokens),
        "advantages": np.where(rng.random(tokens) < 0.2, 0, rng.normal(size=tokens)),
        "sequence_ratio_mask": (rng.random(tokens) < 0.5) * 1.0,
        "sampled_mask": (rng.random(tokens) < 0.5) * 1.0,
        "clip_low_threshold": rng.uniform(0.5, 1, tokens),
        "clip_high_threshold": rng.uniform(1, 1.5, tokens),
        "datum": rng.integers(0, 3, tokens),
    }
    return p, x


def with_stand_ins(x, p, config):
    """`x` with what stands in for the optional inputs it lacks, and the sequences' ratios."""
    used = (x["advantages"] != 0) * 1.0
    same = {k: np.full(len(p), config.get(k, np.nan)) for k in CONFIGS["ppo"]}
    x = {"sequence_ratio_mask": used, "sampled_mask": used, **same, **x}
    ratios = []
    for datum in x["datum"]:
        here = (x["datum"] == datum) & (x["sequence_ratio_mask"] != 0)
        ratios.append(np.exp(np.mean(p[here] - x["logprobs"][here])))
    return {**x, "s": np.array(ratios)}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("configured", [True, False])
@pytest.mark.parametrize("optional", [True, False])
def test_losses_and_gradients_equal_the_reference(name, configured, optional):
    loss = get_loss(name)
    config = loss.fill_config(CONFIGS[name] if configured or name == "dro" else None)
    p, x = random_inputs(np.random.default_rng(0), 500, config)
    names = {*loss.inputs, "datum", *(loss.optional if optional else ())}
    given = {key: torch.tensor(x[key]) for key in names}
    p_tensor = torch.tensor(p, requires_grad=True)
    per_token = loss.function(p_tensor, loss.fill_inputs(given, config), config)
    (gradient,) = torch.autograd.grad(per_token.sum(), p_tensor)

    kept = names | {"weights", "logprobs", "advantages"}
    x = with_stand_ins({k: v for k, v in x.items() if k in kept}, p, config)
    expected = np.array(
        [reference(name, p[t], {k: v[t] for k, v in x.items()}, config) for t in range(len(p))]
    )
    np.testing.assert_allclose(per_token.detach(), expected[:, 0], rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(gradient, expected[:, 1], rtol=1e-10, atol=1e-12)


def test_gspos_gradient_is_that_of_the_sequences_ratio():
    """With one advantage per sequence and no clipping: d of `-n s A`, `s` written as it is."""
    rng = np.random.default_rng(1)
    q = torch.tensor(rng.normal(-1, 1, 20))
    p = (q + torch.tensor(rng.normal(0, 0.1, 20))).requires_grad_()
    advantages = torch.tensor([0.7] * 12 + [-1.3] * 8, dtype=torch.float64)
    datum = torch.tensor([0] * 12 + [1] * 8)
    loss = get_loss("gspo")
    config = loss.fill_config({"clip_low_threshold": 0.0, "clip_high_threshold": 9.0})
    inputs = loss.fill_inputs({"logprobs": q, "advantages": advantages, "datum": datum}, config)
    (got,) = torch.autograd.grad(loss.function(p, inputs, config).sum(), p)
    first, second = torch.exp((p - q)[:12].mean()), torch.exp((p - q)[12:].mean())
    (expected,) = torch.autograd.grad(-(12 * first * 0.7 + 8 * second * -1.3), p)
    torch.testing.assert_close(got, expected)


def test_gspo_without_a_masked_token_has_ratio_1():
    loss = get_loss("gspo")
    config = loss.fill_config(None)
    zeros = torch.zeros(3)
    inputs = {"logprobs": zeros - 9, "advantages": zeros + 2, "sequence_ratio_mask": zeros}
    inputs = loss.fill_inputs({**inputs, "datum": zeros.long()}, config)
    torch.testing.assert_close(loss.function(zeros, inputs, config), zeros - 2)


def test_stable_reinforce_stops_at_its_fixed_point_and_is_reinforce_at_ratio_1():
    loss = get_loss("stable_reinforce")
    config = loss.fill_config({"kl_coeff": 0.5})
    advantages = torch.tensor([1.0, -1.0, 0.3, -0.2])
    for gap, expected in ((torch.zeros(4), -advantages), (advantages / 0.5, torch.zeros(4))):
        p = (torch.full((4,), -3.0) + gap).requires_grad_()
        inputs = {"logprobs": torch.full((4,), -3.0), "advantages": advantages}
        inputs = loss.fill_inputs(inputs, config)
        (gradient,) = torch.autograd.grad(loss.function(p, inputs, config).sum(), p)
        torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=0)


def test_documented_defaults_are_tinkers():
    assert get_loss("ppo").fill_config(None) == {
        "clip_low_threshold": 0.8,
        "clip_high_threshold": 1.2,
    }
    assert get_loss("cispo").fill_config({}) == {
        "clip_low_threshold": 0.0,
        "clip_high_threshold": 4.0,
    }
    # The paper's.
    assert get_loss("gspo").fill_config({}) == {
        "clip_low_threshold": pytest.approx(0.9997),
        "clip_high_threshold": pytest.approx(1.0004),
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_a_token_not_needed_has_no_loss_and_no_gradient(name):
    loss = get_loss(name)
    config = loss.fill_config(CONFIGS[name])
    inputs = {key: torch.zeros(3) for key in loss.inputs} | {"datum": torch.zeros(3).long()}
    inputs = loss.fill_inputs(inputs, config)
    needed = loss.needed(inputs, config)
    p = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    per_token = loss.function(p, inputs, config)
    (gradient,) = torch.autograd.grad(per_token.sum(), p)
    assert (gradient[~needed] == 0).all()
    assert (per_token[~needed] == 0).all()
    assert needed.all() == (name == "dro")


@pytest.mark.parametrize(
    ("name", "mask"), [("gspo", "sequence_ratio_mask"), ("stable_reinforce", "sampled_mask")]
)
def test_masked_tokens_without_advantage_are_needed(name, mask):
    inputs = {"advantages": torch.tensor([0.0, 0.0, 1.0]), mask: torch.tensor([0.0, 1.0, 0.0])}
    assert get_loss(name).needed(inputs, {}).tolist() == [False, True, True]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "0.2", None])
def test_settings_must_be_finite_numbers(value):
    with pytest.raises(tinsmith.InvalidInput, match=r"clip_low_threshold.* finite number"):
        get_loss("ppo").fill_config({"clip_low_threshold": value})


P = torch.log(torch.tensor([0.5, 1.0, 1.5, 9.0]))


@pytest.mark.parametrize(
    ("name", "clipped"),
    # The sequence's ratio is the geometric mean of 0.5, 1 and 1.5: 0.91.
    [("ppo", 2 / 3), ("cispo", 0), ("gspo", 1), ("stable_reinforce", 0)],
)
def test_ratio_metrics_tell_what_was_clipped(name, clipped):
    loss = get_loss(name)
    config = loss.fill_config(None)
    inputs = {
        "logprobs": torch.zeros(4),
        "advantages": torch.tensor([1.0, 1.0, 1.0, 0.0]),
        "datum": torch.zeros(4).long(),
    }
    inputs = loss.fill_inputs(inputs, config)
    needed = loss.needed(inputs, config)
    metrics = ratio_metrics(loss, torch.where(needed, P, torch.nan), inputs, config, needed)
    assert metrics["ratio:mean"] == pytest.approx(1.0)
    assert metrics["ratio:max"] == pytest.approx(1.5)
    assert metrics["clip_fraction:mean"] == pytest.approx(clipped)
    assert all(key.split(":")[1] in ("mean", "sum", "min", "max") for key in metrics)


def test_per_token_thresholds_count_for_the_clip_fraction():
    loss = get_loss("ppo")
    config = loss.fill_config(None)
    inputs = {
        "logprobs": torch.zeros(4),
        "advantages": torch.ones(4),
        "clip_high_threshold": torch.tensor([1.2, 1.2, 1.6, 10.0]),
    }
    inputs = loss.fill_inputs(inputs, config)
    metrics = ratio_metrics(loss, P, inputs, config, loss.needed(inputs, config))
    assert metrics["clip_fraction:mean"] == pytest.approx(1 / 4)
