"""Rows to datums: the tokens are those that the model is given and samples."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.envs.scripted import sequence
from tests.envs.test_renderer import FORGETFUL_TEMPLATE
from tests.tiny import tiny_tokenizer
from tinsmith.algorithms.chat_data import (
    AnswerRenderer,
    Chat,
    ExampleMaker,
    answer_datum,
    chat_of,
    chat_sequences,
    end_tokens,
)
from tinsmith.algorithms.rows import collect
from tinsmith.primitives.errors import InvalidInput, NotFound


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str, **more) -> dict:
    return {"role": "assistant", "content": text, **more}


CHAT = [
    {"role": "system", "content": "the quick"},
    user("What is 3 times 4?"),
    assistant("12"),
    user("CALC(12+34)"),
    assistant("46!"),
]


@pytest.fixture(scope="module")
def renderer() -> AnswerRenderer:
    return AnswerRenderer(tiny_tokenizer())


def texts(tokenizer, tokens, mask) -> list[str]:
    """The runs of marked tokens, as text."""
    starts = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
    return [tokenizer.decode(tokens[a:b]) for a, b in starts.reshape(-1, 2)]


def test_what_is_trained_is_what_would_have_been_sampled(renderer):
    """The same conversation, played turn by turn by a policy, gives the same tokens and mask."""
    played = renderer.start(CHAT[:2])
    played.add_turn(sequence(renderer.tokenizer, "12"))
    played.add_messages([CHAT[3]])
    played.add_turn(sequence(renderer.tokenizer, "46!"))
    (segment,) = played.segments()
    ((tokens, mask),) = chat_sequences(renderer, Chat(CHAT))
    np.testing.assert_array_equal(tokens, segment.tokens)
    np.testing.assert_array_equal(mask, segment.mask)
    assert texts(renderer.tokenizer, tokens, mask) == ["12<|im_end|>", "46!<|im_end|>"]


def test_only_the_last_turn_can_be_trained(renderer):
    ((tokens, mask),) = chat_sequences(renderer, Chat(CHAT), "last_assistant")
    ((all_tokens, _),) = chat_sequences(renderer, Chat(CHAT))
    np.testing.assert_array_equal(tokens, all_tokens)
    assert texts(renderer.tokenizer, tokens, mask) == ["46!<|im_end|>"]


def test_a_turn_of_weight_0_is_given_but_not_trained(renderer):
    chat = [*CHAT[:2], assistant("13", weight=0), user("no"), assistant("12")]
    ((tokens, mask),) = chat_sequences(renderer, Chat(chat))
    assert texts(renderer.tokenizer, tokens, mask) == ["12<|im_end|>"]
    assert "13<|im_end|>" in renderer.tokenizer.decode(tokens)


def test_where_the_template_drops_reasoning_a_conversation_is_several_sequences():
    renderer = AnswerRenderer(tiny_tokenizer())
    renderer.tokenizer.chat_template = FORGETFUL_TEMPLATE
    chat = [user("3*4"), assistant("<think>3 4</think>12"), user("+1"), assistant("13")]
    first, second = chat_sequences(renderer, Chat(chat))
    assert texts(renderer.tokenizer, *first) == ["<think>3 4</think>12<|im_end|>"]
    assert texts(renderer.tokenizer, *second) == ["13<|im_end|>"]
    assert "<think>" not in renderer.tokenizer.decode(second[0])
    make = ExampleMaker(renderer.tokenizer, renderer.ends, 512)
    assert len(make(1, {"messages": chat}).datums) == 2


def test_an_answer_that_the_template_writes_otherwise_than_it_asks_follows_the_prompt():
    """DeepSeek-R1's template prompts with an opened <think> that it does not write itself."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}"
    )
    renderer = AnswerRenderer(tokenizer)
    answer = renderer.answer([user("Hello")], assistant("why</think>12"))
    assert tokenizer.decode(answer) == "why</think>12<|im_end|>"
    assert tokenizer.decode(renderer.prompt([user("Hello")])).endswith("<think>\n")


def test_a_datum_predicts_the_next_token_and_weighs_the_answer(renderer):
    datum = answer_datum(renderer, [user("Hello")], assistant("12"))
    prompt = renderer.prompt([user("Hello")])
    answer = renderer.answer([user("Hello")], assistant("12"))
    whole = np.concatenate([prompt, answer])
    np.testing.assert_array_equal(datum.model_input.tokens, whole[:-1])
    np.testing.assert_array_equal(datum.loss_fn_inputs["target_tokens"], whole[1:])
    expected = [0] * (len(prompt) - 1) + [1] * len(answer)
    assert datum.loss_fn_inputs["weights"].tolist() == expected


def test_end_tokens_are_the_tokenizers_and_the_models(tmp_path, renderer):
    (tmp_path / "config.json").write_text('{"eos_token_id": 2}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 2]}')
    assert end_tokens(renderer.tokenizer, tmp_path) == (renderer.tokenizer.eos_token_id, 7)


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "12"}]},
        {"prompt": "Hi", "completion": "12"},
        {"prompt": [user("Hi")], "completion": [assistant("12")]},
        {"prompt": [user("Hi")], "completion": "12", "messages": None},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
                assistant("12"),
            ]
        },
    ],
    ids=["sharegpt", "texts", "messages", "mixed", "parts"],
)
def test_rows_of_many_forms_are_one_conversation(row):
    assert chat_of(row).messages == [user("Hi"), assistant("12")]


def test_raw_texts_go_on_without_a_template():
    tokenizer = tiny_tokenizer()
    make = ExampleMaker(tokenizer, end_tokens(tokenizer), 512, completions="text")
    (datum,) = make(1, {"prompt": "the quick", "completion": " fox"}).datums
    assert tokenizer.decode(datum.model_input.tokens) == "the quick fox"
    weighed = datum.loss_fn_inputs["target_tokens"][datum.loss_fn_inputs["weights"] == 1]
    assert tokenizer.decode(weighed) == " fox<|im_end|>"


# ---- bad rows ----

BAD = [
    ("{", "not JSON: Expecting property name"),
    ('"text"', "a row must be an object, got str"),
    ('{"text": "hello"}', "it has text"),
    ('{"messages": []}', "at least one message"),
    ('{"messages": [{"role": "narrator", "content": "x"}]}', "message 0 has the role 'narrator'"),
    ('{"messages": [{"role": "user", "content": 3}]}', r"message 0 \(user\): content must be text"),
    ('{"messages": [{"role": "user", "content": "x"}]}', "no turn of the assistant"),
    ('{"messages": [{"role": "assistant", "content": "x"}]}', "begins with the assistant"),
    ('{"prompt": "x", "completion": " "}', r"message 0 \(assistant\) is empty"),
    ('{"prompt": "x", "completion": "\\ud800"}', "not valid Unicode"),
    ('{"prompt": "x", "completion": "y", "tools": 3}', "tools must be a list"),
]
GOOD = '{"prompt": "What is 3 times 4?", "completion": "12"}'


@pytest.mark.parametrize(("line", "complaint"), BAD)
def test_a_bad_row_is_refused_with_its_line_or_left_out_and_counted(tmp_path, line, complaint):
    file = tmp_path / "rows.jsonl"
    file.write_text(f"{GOOD}\n\n{line}\n{GOOD}\n")
    tokenizer = tiny_tokenizer()
    make = ExampleMaker(tokenizer, end_tokens(tokenizer), 512)
    examples, report = collect(str(file), make)
    assert [example.row for example in examples] == [1, 4]
    assert (report.rows, report.used, [number for number, _ in report.bad]) == (3, 2, [3])
    assert any("line 3: " in text for text in report.lines())
    with pytest.raises(InvalidInput, match=f"rows.jsonl, line 3: .*({complaint})"):
        collect(str(file), make, strict=True)


def test_bytes_that_are_no_text_are_a_bad_row(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(GOOD.encode() + b'\n{"prompt": "\xff"}\n')
    make = ExampleMaker(tiny_tokenizer(), (2,), 512)
    _, report = collect(file, make)
    assert report.bad[0][0] == 2
    assert "UTF-8" in report.bad[0][1]


def test_data_of_which_nothing_can_be_used_is_refused():
    with pytest.raises(
        InvalidInput, match=r"(?s)no row can be used.*line 1: a row must be an object"
    ):
        collect([3], ExampleMaker(tiny_tokenizer(), (2,), 512))
    with pytest.raises(NotFound, match="there is no file"):
        collect("nonesuch.jsonl", ExampleMaker(tiny_tokenizer(), (2,), 512))


def test_long_rows_are_left_out_or_cut_and_counted():
    tokenizer = tiny_tokenizer()
    rows = [
        {"prompt": "Hi", "completion": "12"},
        {"prompt": "Hi", "completion": "the quick brown fox " * 10},
        {"prompt": "the quick brown fox " * 10, "completion": "12"},
    ]
    skip = ExampleMaker(tokenizer, end_tokens(tokenizer), 40)
    examples, report = collect(rows, skip)
    assert ([e.row for e in examples], report.too_long) == ([1], [2, 3])
    with pytest.raises(InvalidInput, match=r"line 2: .* tokens; at most 40 fit"):
        collect(rows, skip, strict=True)
    cut = ExampleMaker(tokenizer, end_tokens(tokenizer), 40, too_long="truncate")
    examples, report = collect(rows, cut)
    assert [(e.row, e.truncated) for e in examples] == [(1, False), (2, True)]
    assert report.too_long == [3]  # its answer lies beyond the cut
    assert examples[1].datums[0].model_input.length == 39


def test_rows_come_from_hugging_faces_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    row = {"messages": [user("Hi"), assistant("12")]}
    tokenizer = tiny_tokenizer()
    make = ExampleMaker(tokenizer, end_tokens(tokenizer), 512)
    ((example,), _) = collect(datasets.Dataset.from_list([row]), make)
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    ((same,), report) = collect(f"hf:{tmp_path}:train", make)
    np.testing.assert_array_equal(
        example.datums[0].model_input.tokens, same.datums[0].model_input.tokens
    )
    assert report.rows == 1
    with pytest.raises(NotFound, match="no data set"):
        collect(f"hf:{tmp_path}:nonesuch", make)
