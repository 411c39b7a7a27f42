"""Every loss and its gradient against a few lines of numpy, on random inputs, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tinsmith
from tinsmith.algorithms.losses import get_loss, loss_names, ratio_metrics


def reference(name, p, x, c):
    """(loss, d loss / d p) of one token, the penalty on the divergence from a reference included."""
    loss, gradient = without_penalty(name, p, x, c)
    d = x["reference_logprobs"] - p
    k3, k2 = (c.get(f"kl_{k}_coeff", 0.0) * x["kl_weights"] for k in ("k3", "k2"))
    loss += k3 * (np.exp(d) - 1 - d) + k2 * d**2 / 2
    return loss, gradient + k3 * (1 - np.exp(d)) - k2 * d


def without_penalty(name, p, x, c):
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
    if a < 0 and 0 < c.get("dual_clip", 0) < ratio:
        return -c["dual_clip"] * a, 0.0
    blocked = (a > 0 and ratio > high) or (a < 0 and ratio < low)
    return (-clipped * a, 0.0) if blocked else (-ratio * a, -ratio * a)


CONFIGS = {
    "cross_entropy": {},
    "importance_sampling": {"kl_k3_coeff": 0.3, "kl_k2_coeff": 0.2},
    "ppo": {
        "clip_low_threshold": 0.7,
        "clip_high_threshold": 1.1,
        "dual_clip": 1.3,
        "kl_k2_coeff": 0.4,
    },
    "cispo": {"clip_low_threshold": 0.5, "clip_high_threshold": 1.5, "kl_k3_coeff": 0.1},
    "gspo": {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1, "kl_k3_coeff": 0.2},
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
        "reference_logprobs": p + rng.normal(0, 0.5, tokens),
        "kl_weights": np.where(rng.random(tokens) < 0.3, 0, rng.random(tokens)),
        "clip_low_threshold": rng.uniform(0.5, 1, tokens),
        "clip_high_threshold": rng.uniform(1, 1.5, tokens),
        "datum": rng.integers(0, 3, tokens),
    }
    return p, x


def with_stand_ins(x, p, config):
    """`x` with what stands in for the optional inputs it lacks, and the sequences' ratios."""
    used = (x["advantages"] != 0) * 1.0
    thresholds = ("clip_low_threshold", "clip_high_threshold")
    same = {k: np.full(len(p), config.get(k, np.nan)) for k in thresholds}
    masks = dict.fromkeys(("sequence_ratio_mask", "sampled_mask", "kl_weights"), used)
    x = {**masks, **same, **x}
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
    if "reference_logprobs" in loss.optional:
        names.add("reference_logprobs")
    given = {key: torch.tensor(x[key]) for key in names}
    p_tensor = torch.tensor(p, requires_grad=True)
    per_token = loss.function(p_tensor, loss.fill_inputs(given, config), config)
    (gradient,) = torch.autograd.grad(per_token.sum(), p_tensor)

    kept = names | {"weights", "logprobs", "advantages", "reference_logprobs"}
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


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("ppo", 0.8, 1.2), ("cispo", 0.0, 4.0), ("gspo", 0.9997, 1.0004)],  # gspo: the paper's
)
def test_documented_defaults_are_tinkers_and_all_else_is_off(name, low, high):
    config = get_loss(name).fill_config(None)
    assert config.pop("clip_low_threshold") == pytest.approx(low)
    assert config.pop("clip_high_threshold") == pytest.approx(high)
    assert set(config.values()) == {0.0}


def test_clip_higher_lets_unlikely_tokens_rise_further_than_it_lets_them_fall():
    """DAPO's thresholds, eq. 10: the gradient is there up to 1.28, and down to 0.8."""
    loss = get_loss("ppo")
    config = loss.fill_config({"clip_low_threshold": 0.8, "clip_high_threshold": 1.28})
    p = torch.log(torch.tensor([1.27, 1.29, 0.81, 0.79])).requires_grad_()
    inputs = {"logprobs": torch.zeros(4), "advantages": torch.tensor([1.0, 1.0, -1.0, -1.0])}
    inputs = loss.fill_inputs(inputs, config)
    (gradient,) = torch.autograd.grad(loss.function(p, inputs, config).sum(), p)
    torch.testing.assert_close(gradient, torch.tensor([-1.27, 0.0, 0.81, 0.0]))


def test_k2s_gradient_on_the_policys_own_samples_is_that_of_the_divergence():
    """Over a whole vocabulary, and k3's that of the other direction: their docstring's claims."""
    rng = np.random.default_rng(0)
    scores, reference_scores = (torch.tensor(rng.normal(size=7)) for _ in range(2))
    ref = reference_scores.log_softmax(0)
    loss = get_loss("importance_sampling")
    for key, divergence in (
        ("kl_k2_coeff", lambda p: (p.exp() * (p - ref)).sum()),
        ("kl_k3_coeff", lambda p: (ref.exp() * (ref - p)).sum()),
    ):
        config = loss.fill_config({key: 1.0})
        z = scores.clone().requires_grad_()
        p = z.log_softmax(0)
        inputs = {
            "logprobs": p.detach(),
            "advantages": torch.zeros(7, dtype=torch.float64),
            "reference_logprobs": ref,
            "kl_weights": p.detach().exp(),  # each token as often as it is sampled
        }
        got = loss.function(p, loss.fill_inputs(inputs, config), config).sum()
        (got_gradient,) = torch.autograd.grad(got, z, retain_graph=True)
        (expected,) = torch.autograd.grad(divergence(p), z)
        torch.testing.assert_close(got_gradient, expected, rtol=1e-10, atol=1e-12)


def test_a_divergence_without_its_reference_is_refused():
    loss = get_loss("ppo")
    config = loss.fill_config({"kl_k3_coeff": 0.1})
    with pytest.raises(
        tinsmith.InvalidInput, match="need loss_fn_inputs\\['reference_logprobs'\\]"
    ):
        loss.fill_inputs({"logprobs": torch.zeros(2), "advantages": torch.ones(2)}, config)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_token_not_needed_has_no_loss_and_no_gradient(name):
    loss = get_loss(name)
    config = loss.fill_config(CONFIGS[name])
    inputs = {key: torch.zeros(3) for key in loss.inputs} | {"datum": torch.zeros(3).long()}
    if "reference_logprobs" in loss.optional:
        inputs["reference_logprobs"] = torch.ones(3)
    inputs = loss.fill_inputs(inputs, config)
    needed = loss.needed(inputs, config)
    p = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    per_token = loss.function(p, inputs, config)
    (gradient,) = torch.autograd.grad(per_token.sum(), p)
    assert (gradient[~needed] == 0).all()
    assert (per_token[~needed] == 0).all()
    assert needed.all() == (name == "dro")


@pytest.mark.parametrize(
    ("name", "mask", "settings"),
    [
        ("gspo", "sequence_ratio_mask", {}),
        ("stable_reinforce", "sampled_mask", {}),
        ("cispo", "kl_weights", {"kl_k2_coeff": 0.1}),
    ],
)
def test_masked_tokens_without_advantage_are_needed(name, mask, settings):
    inputs = {"advantages": torch.tensor([0.0, 0.0, 1.0]), mask: torch.tensor([0.0, 1.0, 0.0])}
    config = get_loss(name).fill_config(settings)
    assert get_loss(name).needed(inputs, config).tolist() == [False, True, True]


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
