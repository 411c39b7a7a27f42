"""A folder in which the cookbook finds, under the names it asks the hub for, what is local.

transformers and datasets take a relative folder for a hub id. So a recipe that runs in this folder
loads these stand-ins for its tokenizers and data sets, without a change to it.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tinker_cookbook.recipes.math_rl.math_env import MathEnv
from transformers import AutoTokenizer

from tests.tiny import make_tiny_model

Row = dict[str, Any]

# What recipes ask for when they are not told otherwise.
MODELS = (
    "Qwen/Qwen3-8B",
    "Qwen/Qwen3.5-4B",
    "Qwen/Qwen3.5-9B",
    "Qwen/Qwen3.5-9B-Base",
    "Qwen/Qwen3.5-397B-A17B",
    "Qwen/Qwen3.6-27B",
    "Qwen/Qwen3.6-35B-A3B",
    "Qwen/Qwen3.8-27B",
)
CODE_CONFIGS = ("primeintellect", "taco", "lcbv5", "codeforces")
CONTEXT = 8192  # games go on for many turns, and a token is a letter or two here


def make_workspace(folder: Path) -> dict[str, str]:
    """Write the stand-ins; returns the served models by name, all of them one tiny model."""
    model = make_model(folder / "tiny")
    for name in MODELS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(model)

    chats = [chat(i) for i in range(128)]
    dataset(folder / "HuggingFaceH4/no_robots", train=chats, test=chats)
    dataset(folder / "allenai/tulu-3-sft-mixture", train=chats)
    dataset(folder / "open-thoughts/OpenThoughts3-1.2M", train=[thought(i) for i in range(16)])
    problems = [problem(i) for i in range(16)]
    dataset(folder / "openai/gsm8k", "main", train=problems, test=problems[:2])
    dataset(folder / "zwhe99/DeepMath-103K", train=[problem(i) for i in range(64)])
    dataset(folder / "hicai-zju/SciKnowEval", test=[choice(i) for i in range(12)])
    comparisons = [comparison(i) for i in range(32)]
    dataset(folder / "Anthropic/hh-rlhf", train=comparisons, test=comparisons[:2])
    pages = [{"text": f"Page {i} is about the fox, and about {i} dogs."} for i in range(400)]
    dataset(folder / "Salesforce/wikitext", "wikitext-103-raw-v1", train=pages)
    jsonl(folder / "chats.jsonl", chats)
    texts = folder / "tinker_cookbook/example_data/multilingual.txt"
    texts.parent.mkdir(parents=True)
    texts.write_text("the fox and the dog\nle renard et le chien\n")
    with (folder / "forecasts.csv").open("w", newline="") as file:
        rows = csv.DictWriter(file, forecast(0))
        rows.writeheader()
        rows.writerows(forecast(i) for i in range(16))
    dataset(
        folder / "agentica-org/DeepCoder-Preview-Dataset",
        *CODE_CONFIGS,
        train=[program(i) for i in range(4)],
        test=[program(0)],
    )
    jsonl(folder / "rubrics.jsonl", [rubric(i) for i in range(8)])
    return dict.fromkeys(MODELS, model)


def make_model(path: Path) -> str:
    make_tiny_model(path, "qwen3")
    config = json.loads((path / "config.json").read_text())
    config["max_position_embeddings"] = CONTEXT
    (path / "config.json").write_text(json.dumps(config))
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens(["<think>", "</think>"])  # the Qwen renderers want these whole
    tokenizer.save_pretrained(path)
    return str(path)


def jsonl(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def dataset(folder: Path, *configs: str, **splits: list[Row]) -> None:
    """A data set as the hub keeps them: a file a split, and a card that says which is which."""
    card = ["---", "configs:"]
    for config in configs or ("default",):
        card += [f"- config_name: {config}", "  data_files:"]
        for split, rows in splits.items():
            jsonl(folder / config / f"{split}.jsonl", rows)
            card += [f"  - split: {split}", f"    path: {config}/{split}.jsonl"]
    (folder / "README.md").write_text("\n".join([*card, "---", ""]))


# ---- rows: sums so small that a tiny model gets some of them right ----


def terms(i: int) -> tuple[int, int]:
    return i % 2, i // 2 % 2


def chat(i: int) -> Row:
    """Every other one as the recipes for gsm8k ask: after an example, with a word on form."""
    a, b = terms(i)
    before, suffix = [], ""
    if i // 4 % 2:
        before, suffix = MathEnv.standard_fewshot_prefix(), MathEnv.question_suffix()
    question = {"role": "user", "content": f"What is {a} + {b}?{suffix}"}
    answer = {"role": "assistant", "content": rf"\boxed{{{a + b}}}"}
    return {"messages": [*before, question, answer]}


def problem(i: int) -> Row:
    a, b = terms(i)
    return {
        "question": f"What is {a} + {b}?",
        "answer": f"It is {a + b}.\n#### {a + b}",
        "final_answer": str(a + b),
    }


def comparison(i: int) -> Row:
    asked = f"\n\nHuman: Is {i} a number?\n\nAssistant:"
    return {"chosen": asked + " Yes.", "rejected": asked + " No."}


def rubric(i: int) -> Row:
    a, b = terms(i)
    return {
        "convo": [{"role": "user", "content": f"What is {a} + {b}?"}],
        "rubric_items": [
            {
                "rubric_str": f"Is it {a + b}?",
                "extraction_regex": r"(\d)",
                "grader_output_format_instruction": "Reply with 0 or 1.",
            }
        ],
    }


def thought(i: int) -> Row:
    a, b = terms(i)
    return {
        "conversations": [
            {"from": "human", "value": f"What is {a} + {b}?"},
            {"from": "gpt", "value": f"<think>\n{a} and {b}\n</think>\n\n{a + b}"},
        ]
    }


def choice(i: int) -> Row:
    a, b = terms(i)
    return {
        "domain": "Chemistry",
        "details": {"level": "L3"},
        "type": "mcq-4-choices",
        "question": f"What is {a} + {b}?",
        "choices": {"text": ["0", "1", "2"], "label": ["A", "B", "C"]},
        "answerKey": "ABC"[a + b],
    }


def forecast(i: int) -> dict[str, str]:
    a, b = terms(i)
    month = 9 if i % 4 < 3 else 11  # before the day that the recipe validates from, and after
    return {
        "submission_id": str(i),
        "event_ticker": f"SUM-{i}",
        "title": f"What will {a} + {b} be?",
        "snapshot_time": f"2025-{month:02}-01T00:00:00Z",
        "close_time": f"2025-{month:02}-02T00:00:00Z",
        "market_outcome": json.dumps({"odd": (a + b) % 2}),
        "category": "Sums",
        "markets": json.dumps(["odd"]),
        "sources": json.dumps([{"title": "A table", "summary": "It has sums.", "ranking": 1}]),
    }


def program(i: int) -> Row:
    a, b = terms(i)
    return {
        "problem": f"Print {a} + {b}.",
        "tests": json.dumps([{"input": "", "output": str(a + b), "testtype": "stdin_stdout"}]),
    }
