"""A run over a quantised base, from `connect` to its samples."""

from __future__ import annotations

import importlib.util
import json

import pytest

from tests.actors.script import run_script


@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
def test_learner_and_sampler_of_a_quantised_base_agree(tiny_home):
    out = run_script(
        """
        import json, sys
        import numpy as np
        import tinsmith
        from tests.data import text_datum

        with tinsmith.connect(
            home=sys.argv[1], num_cpus=2, learner_threads=1, sampler_threads=1, kv_bytes=1 << 24,
            base_weights="nf4",
        ).sync as service:
            training = service.create_lora_training_client("tiny-llama", rank=4, seed=0)
            training.forward_backward([text_datum(np.random.default_rng(0), 40)])
            training.optim_step(tinsmith.AdamParams(learning_rate=0.01))
            policy = training.save_weights_and_get_sampling_client()
            params = tinsmith.SamplingParams(max_tokens=12, seed=0, stop=[])
            drawn = policy.sample([1, 2, 3], 1, params).sequences[0]
            tokens = np.array([1, 2, 3, *drawn.tokens])
            inputs = {"target_tokens": tokens[1:], "weights": np.ones(len(tokens) - 1)}
            scored = training.forward([tinsmith.Datum(tokens[:-1], inputs)], "cross_entropy")
            logprobs = scored.loss_fn_outputs[0]["logprobs"][-12:]
            print(json.dumps({
                "weights": training.get_info().base_weights,
                "apart": float(np.abs(logprobs - drawn.logprobs).max()),
            }))
        """,
        tiny_home,
    )
    told = json.loads(out.splitlines()[-1])
    assert told["weights"] == "nf4"
    assert told["apart"] < 1e-4
