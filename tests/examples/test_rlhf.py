from __future__ import annotations

import importlib.util

import numpy as np

from tests.actors.script import ROOT


async def test_the_rlhf_example_raises_its_reward(service, tiny_home):
    spec = importlib.util.spec_from_file_location("rlhf", ROOT / "examples" / "rlhf.py")
    rlhf = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rlhf)
    words = "--model tiny-llama --epochs 15 --steps 10 --max-tokens 20"
    words += " --learning-rate 0.01 --policy-learning-rate 0.002 --kl 0.1"
    args = rlhf.arguments().parse_args([*words.split(), "--home", str(tiny_home)])
    told = np.array(await rlhf.main(args))  # joins the tests' cluster
    assert told[0, 1] < 1e-3 < told[-1, 1]  # it leaves the fine-tuned policy
    assert told[-3:, 0].mean() > told[:1, 0].mean() + 0.5
