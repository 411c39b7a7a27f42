"""Values are checked where they come in, and the message names the field."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import tinsmith
from tinsmith.primitives.types import SampleRequest
from tinsmith.primitives.validation import validate_datums


def test_tokens_may_be_lists_arrays_or_tensors_and_become_int64():
    for tokens in ([1, 2], np.array([1, 2], np.int32), torch.tensor([1, 2])):
        model_input = tinsmith.ModelInput(tokens)
        assert model_input.tokens.dtype == np.int64
        assert model_input.to_ints() == [1, 2]
    assert tinsmith.ModelInput.from_ints([3]).length == len(tinsmith.ModelInput([3])) == 1


def test_a_datum_takes_lists_and_tensors_and_keeps_floats_as_float32():
    datum = tinsmith.Datum(
        [1, 2], {"target_tokens": torch.tensor([2, 3]), "weights": [0.5, 1], "logprobs": (0, -1)}
    )
    assert isinstance(datum.model_input, tinsmith.ModelInput)
    assert datum.loss_fn_inputs["weights"].dtype == np.float32
    assert datum.loss_fn_inputs["target_tokens"].dtype == np.int64
    with pytest.raises(dataclasses.FrozenInstanceError):
        datum.model_input = None


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([[1, 2]], r"model_input must be one-dimensional, got shape \(1, 2\)"),
        ([1.5], "model_input must be integer token ids, got dtype float64"),
        ([2**63], "model_input holds a negative token id at position 0"),
        (["a"], "model_input must be integer token ids"),
        ([1, -3], "model_input holds a negative token id at position 1"),
    ],
)
def test_bad_tokens_are_named(tokens, message):
    with pytest.raises(tinsmith.InvalidInput, match=message):
        tinsmith.ModelInput(tokens)


def test_inputs_that_are_no_numbers_are_named():
    with pytest.raises(tinsmith.InvalidInput, match=r"loss_fn_inputs\['weights'\] is not numeric"):
        tinsmith.Datum([1], {"target_tokens": [1], "weights": ["heavy"]})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "rank must be an integer of at least 1, got 0"),
        ({"rank": True}, "rank must be an integer"),
        ({"rank": 2.0}, "rank must be an integer"),
        ({"alpha": float("nan")}, "alpha must be a positive number"),
        (
            {"train_attn": False, "train_mlp": False, "train_unembed": False},
            "set at least one of train_attn, train_mlp, train_unembed, train_router",
        ),
    ],
)
def test_bad_lora_configs_are_named(changes, message):
    with pytest.raises(tinsmith.InvalidInput, match=message):
        tinsmith.LoraConfig(**changes)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rate", -1e-3),
        ("learning_rate", float("inf")),
        ("eps", float("nan")),
        ("weight_decay", -1),
        ("grad_clip_norm", -1),
        ("beta1", 1.0),
        ("beta2", -0.1),
    ],
)
def test_bad_adam_params_are_named(field, value):
    with pytest.raises(tinsmith.InvalidInput, match=f"AdamParams.{field} must be"):
        tinsmith.AdamParams(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -1),
        ("temperature", float("nan")),
        ("top_k", 0),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", 2**31),
        ("seed", -1),
        ("seed", 2**64),
        ("stop", ["a", 1]),
        ("stop", "\ud800"),
    ],
)
def test_bad_sampling_params_are_named(field, value):
    with pytest.raises(tinsmith.InvalidInput, match=f"{field} must"):
        tinsmith.SamplingParams(**{field: value})


def test_stop_may_be_a_string_strings_or_token_ids():
    assert tinsmith.SamplingParams(stop="END").stop_strings == ["END"]
    assert tinsmith.SamplingParams(stop=["a", "b"]).stop_strings == ["a", "b"]
    assert tinsmith.SamplingParams(stop=np.array([1, 2])).stop_tokens == [1, 2]
    assert tinsmith.SamplingParams().stop_list == []


def test_bad_sample_requests_are_named():
    with pytest.raises(tinsmith.InvalidInput, match="prompt is empty"):
        SampleRequest([])
    with pytest.raises(tinsmith.InvalidInput, match="num_samples must be at least 1"):
        SampleRequest([1], num_samples=0)
    for name in ("topk_prompt_logprobs", "topk_sample_logprobs", "prompt_alt_tokens_k"):
        with pytest.raises(tinsmith.InvalidInput, match=f"{name} must be >= 0"):
            SampleRequest([1], **{name: -1})
    with pytest.raises(tinsmith.InvalidInput, match="last_n needs prompt_logprobs"):
        SampleRequest([1, 2], prompt_logprobs_last_n=1)
    for last_n in (0, 2):
        with pytest.raises(tinsmith.InvalidInput, match=f"must be from 1 to 1, .* got {last_n}"):
            SampleRequest([1, 2], prompt_logprobs=True, prompt_logprobs_last_n=last_n)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([1, 2], r"must have shape \[2, K\], .* got \[2\]"),
        ([[1]], r"must have shape \[2, K\], .* got \[1, 1\]"),
        ([[1.0], [2.0]], "must be integer token ids"),
        ([[1, -1], [-2, 3]], "holds -2 at position 1, 0"),
        ([[-1], [-1]], "names no token"),
        (np.zeros((2, 0), int), "names no token"),
    ],
)
def test_bad_prompt_targets_are_named(targets, message):
    with pytest.raises(tinsmith.InvalidInput, match=f"target_prompt_logprobs {message}"):
        SampleRequest([1, 2, 3], target_prompt_logprobs=targets)


def test_a_bad_datum_is_named_by_its_index_and_field():
    good = tinsmith.Datum([1, 2], {"target_tokens": [2, 3], "weights": [1.0, 1.0]})
    for changes, message in (
        ({"weights": [1.0]}, r"datum 1: loss_fn_inputs\['weights'\] has shape \(1,\)"),
        ({"weights": [1.0, np.nan]}, r"datum 1: .*'weights'\] is nan at position 1"),
        ({"weights": [True, False]}, r"datum 1: .*'weights'\] must be numbers, got dtype bool"),
        ({"target_tokens": [2.0, 3.0]}, r"datum 1: .*'target_tokens'\] must be integers"),
        ({"target_tokens": [2, 10]}, r"datum 1: .*'target_tokens'\] holds token 10 at position 1"),
        ({"advantages": [1, 1]}, r"datum 1: .*'advantages'\] is not an input of this loss"),
    ):
        bad = tinsmith.Datum([1, 2], {**good.loss_fn_inputs, **changes})
        with pytest.raises(tinsmith.InvalidInput, match=message):
            validate_datums([good, bad], ["weights"], 10, 512)
    validate_datums([good], ["weights"], 10, 512)


def test_soft_targets_are_checked_cell_by_cell():
    targets, weights = np.ones((2, 3), int), np.ones((2, 3))
    wrong_token, wrong_weight = targets.copy(), weights.copy()
    wrong_token[1, 2] = 10
    wrong_weight[0, 1] = np.inf
    for inputs, message in (
        ({"target_tokens": wrong_token}, r"'target_tokens'\] holds token 10 at position \[1, 2\]"),
        ({"weights": wrong_weight}, r"'weights'\] is inf at position \[0, 1\]"),
        ({"weights": np.ones(2)}, r"'weights'\] has shape \(2,\), target_tokens \(2, 3\)"),
        ({"target_tokens": targets[:1]}, r"shape \(1, 3\), but model_input has 2 tokens"),
        ({"target_tokens": targets[:, :0]}, "give at least one target per position"),
        ({"target_tokens": targets[None]}, r"shape \(1, 2, 3\), but model_input has 2 tokens"),
    ):
        bad = tinsmith.Datum([1, 2], {"target_tokens": targets, "weights": weights, **inputs})
        with pytest.raises(tinsmith.InvalidInput, match=f"datum 0: .*{message}"):
            validate_datums([bad], ["weights"], 10, 512, multi_target=True)
    good = tinsmith.Datum([1, 2], {"target_tokens": targets, "weights": weights})
    validate_datums([good], ["weights"], 10, 512, multi_target=True)
    with pytest.raises(tinsmith.InvalidInput, match="this loss takes one target per position"):
        validate_datums([good], ["weights"], 10, 512)


def test_optional_inputs_may_be_left_out():
    inputs = {"target_tokens": [2, 3], "weights": [1.0, 1.0], "mask": [1.0, 0.0]}
    with_mask = tinsmith.Datum([1, 2], inputs)
    without = tinsmith.Datum([1, 2], {k: v for k, v in inputs.items() if k != "mask"})
    validate_datums([with_mask, without], ["weights"], 10, 512, optional=["mask"])
    with pytest.raises(tinsmith.InvalidInput, match="weights, other if you like"):
        validate_datums([with_mask], ["weights"], 10, 512, optional=["other"])


def test_a_trajectory_adds_up_its_segments():
    def segment(mask, versions):
        n = len(mask)
        return tinsmith.Segment(
            np.arange(n), np.array(mask), np.zeros(n, np.float32), np.array(versions, np.int32)
        )

    segments = [segment([False, True, True], [-1, 4, 5]), segment([False, True], [-1, 3])]
    trajectory = tinsmith.Trajectory(segments, [0.5, 1.0], True, False, [])
    assert trajectory.reward == 1.5
    assert trajectory.num_sampled_tokens == 3
    assert trajectory.oldest_version == 3
    nothing = tinsmith.Trajectory([segment([False], [-1])], [], False, True, [])
    assert (nothing.oldest_version, nothing.num_sampled_tokens, nothing.reward) == (-1, 0, 0.0)


@pytest.mark.parametrize("value", [object(), [1], np.zeros(2), "a", {}, 1j, True])
@pytest.mark.parametrize(
    ("made", "name"),
    [
        (tinsmith.AdamParams, "learning_rate"),
        (tinsmith.AdamParams, "beta1"),
        (tinsmith.LoraConfig, "rank"),
        (tinsmith.LoraConfig, "alpha"),
        (tinsmith.LoraConfig, "seed"),
        (tinsmith.SamplingParams, "max_tokens"),
        (tinsmith.SamplingParams, "temperature"),
        (tinsmith.SamplingParams, "top_k"),
        (tinsmith.SamplingParams, "top_p"),
        (tinsmith.SamplingParams, "seed"),
    ],
)
def test_a_value_of_another_kind_is_refused_by_name(made, name, value):
    with pytest.raises(tinsmith.InvalidInput, match=name):
        made(**{name: value})


def test_a_number_that_no_float_holds_is_refused():
    with pytest.raises(tinsmith.InvalidInput, match="learning_rate is too large"):
        tinsmith.AdamParams(learning_rate=10**400)


@pytest.mark.parametrize("stop", [5, 1.5, [1.5], [-1], [1 << 40], np.array(3), object(), {"a": 1}])
def test_stop_holds_strings_or_token_ids(stop):
    with pytest.raises(tinsmith.InvalidInput, match="stop"):
        tinsmith.SamplingParams(stop=stop)


def test_inputs_that_are_no_arrays_are_refused_by_name():
    with pytest.raises(tinsmith.InvalidInput, match=r"loss_fn_inputs\['weights'\] is no array"):
        tinsmith.Datum([1], {"weights": [[1], [1, 2]]})
    with pytest.raises(tinsmith.InvalidInput, match="loss_fn_inputs must map"):
        tinsmith.Datum([1], 5)
    with pytest.raises(tinsmith.InvalidInput, match="name of a loss_fn_input"):
        tinsmith.Datum([1], {None: [1.0]})
