"""What the cookbook has beside its recipes: chats, exports, decisions, evaluations."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from tinker_cookbook.recipes.decisions import Decision, DecisionRenderer
from tinker_cookbook.recipes.decisions.demo import TEAMS
from tinker_cookbook.renderers import get_renderer
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
    asked = "How do I sign in?"
    said = kitchen.python(
        "-m",
        "tinker_cookbook.recipes.decisions.demo",
        "--model_name=Qwen/Qwen3-8B",
        stdin=f"{asked}\n\n",
    )
    probabilities = json.loads("{" + said.partition("{")[2].partition("}")[0] + "}")

    folder = kitchen.workspace / "tiny"
    renderer = get_renderer("qwen3", AutoTokenizer.from_pretrained(folder))
    question = (
        f"A user asked the following question about Tinker:\n\n{asked}\n\n"
        "Which team should answer it?"
    )
    rendering = DecisionRenderer(renderer).render(Decision(question, TEAMS))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    logits = model(torch.tensor([rendering.tokens[: rendering.choice_pos]])).logits[0, -1]
    expected = logits[list(rendering.label_tokens.values())].softmax(-1).tolist()
    assert list(probabilities) == rendering.labels
    assert list(probabilities.values()) == pytest.approx(expected, abs=2e-4)  # four digits


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


@pytest.mark.slow
def test_the_experiment_on_true_thinking(kitchen):
    """Samples up to 2048 tokens, then scores answers after shortened thoughts."""
    kitchen.python("-m", "tinker_cookbook.recipes.true_thinking_score.run_small_experiment")
    found = json.loads((kitchen.workspace / "runs/tts-experiment/tts_results.json").read_text())
    assert found["problems"]
    assert not any("error" in problem for problem in found["problems"])
