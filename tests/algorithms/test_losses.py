"""Every loss and its gradient against a few lines of numpy, on random inputs, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tinsmith
from tinsmith.algorithms.losses import get_loss, loss_names, ratio_metrics


def reference(name, p, x, c):
    """(loss, d loss / d p) of one token, written out by cases."""
    if name == "cross_entropy":
        return -x["weights"] * p, -x["weights"]
    q, a = x["logprobs"], x["advantages"]
    r = np.exp(p - q)
    if name == "importance_sampling":
        return -r * a, -r * a
    if name == "dro":
        return -(p * a - c["beta"] / 2 * (p - q) ** 2), -(a - c["beta"] * (p - q))
    low, high = c["clip_low_threshold"], c["clip_high_threshold"]
    clipped = min(max(r, low), high)
    if name == "cispo":
        return -clipped * p * a, -clipped * a
    assert name == "ppo"
    blocked = (a > 0 and r > high) or (a < 0 and r < low)
    return (-clipped * a, 0.0) if blocked else (-r * a, -r * a)


CONFIGS = {
    "cross_entropy": {},
    "importance_sampling": {},
    "ppo": {"clip_low_threshold": 0.7, "clip_high_threshold": 1.1},
    "cispo": {"clip_low_threshold": 0.5, "clip_high_threshold": 1.5},
    "dro": {"beta": 0.3},
}


def test_every_loss_has_a_reference():
    assert loss_names() == sorted(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("given", [True, False])
def test_losses_and_gradients_equal_the_reference(name, given):
    rng = np.random.default_rng(0)
    loss = get_loss(name)
    config = loss.fill_config(CONFIGS[name] if given or name == "dro" else None)
    tokens = 500
    p = rng.normal(-1, 1, tokens)
    x = {
        "weights": rng.normal(size=tokens),
        "logprobs": p + rng.normal(0, 0.5, tokens),
        "advantages": rng.normal(size=tokens),
    }
    p_tensor = torch.tensor(p, requires_grad=True)
    inputs = {key: torch.tensor(x[key]) for key in loss.inputs}
    per_token = loss.function(p_tensor, inputs, config)
    (gradient,) = torch.autograd.grad(per_token.sum(), p_tensor)
    expected = np.array(
        [reference(name, p[t], {k: v[t] for k, v in x.items()}, config) for t in range(tokens)]
    )
    np.testing.assert_allclose(per_token.detach(), expected[:, 0], rtol=1e-12)
    np.testing.assert_allclose(gradient, expected[:, 1], rtol=1e-12)


def test_documented_defaults_are_tinkers():
    assert get_loss("ppo").fill_config(None) == {
        "clip_low_threshold": 0.8,
        "clip_high_threshold": 1.2,
    }
    assert get_loss("cispo").fill_config({}) == {
        "clip_low_threshold": 0.0,
        "clip_high_threshold": 4.0,
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_a_token_not_needed_has_no_loss_and_no_gradient(name):
    loss = get_loss(name)
    config = loss.fill_config(CONFIGS[name])
    inputs = {key: torch.zeros(3) for key in loss.inputs}
    needed = loss.needed(inputs, config)
    p = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    per_token = loss.function(p, inputs, config)
    (gradient,) = torch.autograd.grad(per_token.sum(), p)
    assert (gradient[~needed] == 0).all()
    assert (per_token[~needed] == 0).all()
    assert needed.all() == (name == "dro")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "0.2", None])
def test_settings_must_be_finite_numbers(value):
    with pytest.raises(tinsmith.InvalidInput, match=r"clip_low_threshold.* finite number"):
        get_loss("ppo").fill_config({"clip_low_threshold": value})


def test_ratio_metrics_tell_what_was_clipped():
    p = torch.log(torch.tensor([0.5, 1.0, 1.5, 9.0]))
    inputs = {"logprobs": torch.zeros(4), "advantages": torch.tensor([1.0, 1.0, 1.0, 0.0])}
    loss = get_loss("ppo")
    metrics = ratio_metrics(p, inputs, loss.fill_config(None), loss.needed(inputs, {}))
    assert metrics["ratio:mean"] == pytest.approx(1.0)
    assert metrics["ratio:max"] == pytest.approx(1.5)
    assert metrics["clip_fraction:mean"] == pytest.approx(2 / 3)
