"""Tinsmith's vocabulary in the SDK's words."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tinker import types

import tinsmith


def sdk_datum(datum: tinsmith.Datum) -> types.Datum:
    return types.Datum(
        model_input=types.ModelInput.from_ints(datum.model_input.to_ints()),
        loss_fn_inputs={k: types.TensorData.from_numpy(v) for k, v in datum.loss_fn_inputs.items()},
    )


def sparse_datum(datum: tinsmith.Datum) -> types.Datum:
    """Two-dimensional inputs as the SDK sends them when they come as torch tensors."""
    return types.Datum(
        model_input=types.ModelInput.from_ints(datum.model_input.to_ints()),
        loss_fn_inputs={k: torch.tensor(v) for k, v in datum.loss_fn_inputs.items()},
    )


def prompt(tokens: Any) -> types.ModelInput:
    return types.ModelInput.from_ints([int(t) for t in tokens])


def outputs(result: types.ForwardBackwardOutput) -> list[np.ndarray]:
    return [out["logprobs"].to_numpy() for out in result.loss_fn_outputs]
