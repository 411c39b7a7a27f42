"""The cookbook's supervised loop with both kinds of evaluators, which no recipe's options give."""

import asyncio
import sys

from tinker_cookbook.eval.custom_evaluators import CustomEvaluator, grader_fn
from tinker_cookbook.supervised import train
from tinker_cookbook.supervised.data import FromConversationFileBuilder
from tinker_cookbook.supervised.types import ChatDatasetBuilderCommonConfig

MODEL, RENDERER = "Qwen/Qwen3.5-9B-Base", "role_colon"
SUMS = [{"input": f"What is {a} + {b}?", "output": str(a + b)} for a in (0, 1) for b in (0, 1)]


def sums() -> CustomEvaluator:
    return CustomEvaluator(SUMS, grader_fn, MODEL, RENDERER)


config = train.Config(
    log_path=sys.argv[1].removeprefix("log_path="),
    model_name=MODEL,
    recipe_name="evaluated_sft",
    renderer_name=RENDERER,
    dataset_builder=FromConversationFileBuilder(
        common_config=ChatDatasetBuilderCommonConfig(
            model_name_for_tokenizer=MODEL, renderer_name=RENDERER, max_length=64, batch_size=15
        ),
        file_path="chats.jsonl",
        test_size=8,  # held out: the supervised evaluator's
    ),
    evaluator_builders=[sums],
    learning_rate=1e-2,
    num_epochs=4,
    eval_every=8,
)
asyncio.run(train.main(config))
