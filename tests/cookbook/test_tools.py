"""What the cookbook has beside its recipes: chats, exports, decisions, evaluations."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.cookbook.kitchen import BASE

CHAT = "tinker_cookbook.chat_app.tinker_chat_cli"


def test_chatting_with_a_checkpoint(kitchen, taught):
    said = kitchen.python(
        "-m",
        CHAT,
        f"base_model={BASE}",
        f"model_path={taught.checkpoints[-1]['sampler_path']}",
        "max_tokens=24",
        stdin="What is 1 + 1?\nquit\n",
    )
    assert "2" in said.partition("Assistant:")[2].partition("User:")[0]


def test_weights_are_downloaded_and_built_for_other_engines(kitchen, taught, tmp_path):
    kitchen.python(
        "-c",
        "import sys; from tinker_cookbook import weights; path, model, out = sys.argv[1:]\n"
        "adapter = weights.download(tinker_path=path, output_dir=f'{out}/adapter')\n"
        "for build, name in ((weights.build_lora_adapter, 'peft'), (weights.build_hf_model, 'hf')):\n"
        "    build(base_model=model, adapter_path=adapter, output_path=f'{out}/{name}')",
        taught.checkpoints[-1]["state_path"],
        BASE,
        tmp_path,
    )
    base = kitchen.workspace / BASE
    tokenizer = AutoTokenizer.from_pretrained(base)
    prompt = tokenizer("User: What is 1 + 1?\n\nAssistant:", return_tensors="pt")
    answers, logits = [], []
    for model in (
        AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32),
        peft.PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), tmp_path / "peft"
        ),
    ):
        tokens = model.generate(**prompt, max_new_tokens=24, do_sample=False)
        answers.append(tokenizer.decode(tokens[0, prompt.input_ids.shape[1] :]))
        logits.append(model(**prompt).logits.detach())
    torch.testing.assert_close(*logits, atol=1e-3, rtol=0)
    assert "boxed{2}" in answers[0]
    assert answers[0] == answers[1]


def test_decisions_demo(kitchen):
    said = kitchen.python(
        "-m",
        "tinker_cookbook.recipes.decisions.demo",
        "--model_name=Qwen/Qwen3-8B",
        stdin="How do I sign in?\n\n",
    )
    probabilities = json.loads("{" + said.partition("{")[2].partition("}")[0] + "}")
    assert set(probabilities) == {"billing", "sdk", "console", "cookbook"}
    assert sum(probabilities.values()) == pytest.approx(1, abs=1e-3)


def test_the_example_of_an_evaluator(kitchen):
    said = kitchen.python("-m", "tinker_cookbook.eval.custom_evaluators")
    assert 0 <= json.loads(said.splitlines()[-1].replace("'", '"'))["accuracy"] <= 1


def test_prompts_are_sampled_for_distillation(kitchen):
    kitchen.python(
        "-m",
        "tinker_cookbook.recipes.prompt_distillation.create_data",
        "output_file=distilled.jsonl",
    )
    # A model of this size never says which language it is.
    assert (kitchen.workspace / "distilled.jsonl").read_text() == ""
