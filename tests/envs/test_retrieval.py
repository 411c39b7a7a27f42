from __future__ import annotations

import json
import logging
import math
import random
import re
import sys

import pytest

from tinsmith.envs import Corpus, RetrievalQA, check_env, load_questions, register
from tinsmith.envs.fork_server import EnvSource
from tinsmith.envs.isolation import EnvPool
from tinsmith.envs.registry import pickled_factory
from tinsmith.envs.retrieval import Passage
from tinsmith.envs.retrieval_qa import Question, exact_match, f1
from tinsmith.primitives.errors import InvalidInput, NotFound, Unavailable

TEXTS = {
    "otter": "Sea otters hold hands while they sleep, so as not to drift apart.",
    "crow": "Crows remember the faces of people who were unkind to them.",
    "wombat": "The droppings of wombats are cubes.",
}
QUESTION = Question("Which animal has cubic droppings?", ("wombat", "the wombats"), ("wombat",))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    file = tmp_path_factory.mktemp("corpus") / "animals.jsonl"
    rows = [{"id": name, "text": text, "title": name.title()} for name, text in TEXTS.items()]
    file.write_text("\n".join(map(json.dumps, rows)))
    return Corpus.from_jsonl(file, strict=True)


def call(query: str, **more: object) -> str:
    arguments = {"query": query, **more}
    return f"<tool_call>{json.dumps({'name': 'search', 'arguments': arguments})}</tool_call>"


def test_a_search_gives_the_passages_that_fit_best_with_their_ids(corpus):
    assert corpus.search("wombats' droppings", 1) == f"[wombat] Wombat\n{TEXTS['wombat']}"
    assert [p.id for p, _ in corpus.find("otter hands people", 10)] == ["otter", "crow"]
    assert corpus.search("quantum") == "No passage has any of these words."
    assert corpus.find("") == []
    assert corpus.find("the of") == []  # nothing but stop words
    with pytest.raises(InvalidInput, match="k must be at least 1"):
        corpus.find("otter", 0)


def test_scores_are_bm25s_as_lucene_computes_them():
    draw = random.Random(0)
    words = [f"word{i}" for i in range(30)]
    texts = [draw.choices(words, k=draw.randint(3, 40)) for _ in range(40)]
    corpus = Corpus.from_texts([" ".join(text) for text in texts])
    mean = sum(map(len, texts)) / len(texts)
    for _ in range(20):
        query = draw.sample(words, 4)
        wanted = {}
        for i, text in enumerate(texts):
            score = 0.0
            for word in query:
                n, tf = sum(word in other for other in texts), text.count(word)
                idf = math.log(1 + (len(texts) - n + 0.5) / (n + 0.5))
                score += idf * tf / (tf + 1.5 * (1 - 0.75 + 0.75 * len(text) / mean))
            wanted[str(i)] = score
        found = {p.id: score for p, score in corpus.find(" ".join(query), len(texts))}
        assert found == pytest.approx({k: v for k, v in wanted.items() if v > 0}, rel=1e-4)


def test_bad_rows_are_skipped_with_their_lines_or_refused(tmp_path, caplog):
    file = tmp_path / "rows.jsonl"
    good = '{"id": "a", "text": "one otter"}'
    bad = [
        "{",
        "[1]",
        '{"text": ""}',
        '{"text": 3}',
        good,
        '{"text": "x", "title": 1}',
        '{"id": []}',
    ]
    file.write_text("\n".join([good, "", *bad, '{"text": "two"}']))
    with caplog.at_level(logging.WARNING):
        corpus = Corpus.from_jsonl(file)
    assert [p.id for p in corpus.passages] == ["a", "10"]
    assert [row.where for row in corpus.skipped] == [f"line {n}" for n in range(3, 10)]
    assert "'a' was there before" in corpus.skipped[4].why
    assert "skipped 7 of 9: line 3: " in caplog.text
    with pytest.raises(InvalidInput, match=r"rows\.jsonl, line 3: Expecting property name"):
        Corpus.from_jsonl(file, strict=True)
    with pytest.raises(NotFound, match=r"nothing\.jsonl cannot be read"):
        Corpus.from_jsonl(tmp_path / "nothing.jsonl")
    file.write_text("{")
    with pytest.raises(InvalidInput, match="at least one passage"):
        Corpus.from_jsonl(file)


def test_a_folder_is_cut_into_passages_between_paragraphs(tmp_path):
    (tmp_path / "deep").mkdir()
    paragraphs = [f"paragraph {i} " + "word " * 40 for i in range(4)]
    (tmp_path / "deep" / "long.txt").write_text("\n\n".join(paragraphs))
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    corpus = Corpus.from_folder(tmp_path, words=90)
    assert [p.id for p in corpus.passages] == ["deep/long.txt#0", "deep/long.txt#1"]
    assert re.findall(r"paragraph (\d)", corpus.passages[1].text) == ["2", "3"]
    assert [row.where for row in corpus.skipped] == ["empty.txt", "latin.txt"]
    with pytest.raises(InvalidInput, match=r"empty\.txt: it is empty"):
        Corpus.from_folder(tmp_path, strict=True)
    with pytest.raises(NotFound, match="there is no folder"):
        Corpus.from_folder(tmp_path / "nowhere")


def test_a_slow_index_is_kept_and_read_back_and_a_broken_one_is_built_anew(tmp_path, caplog):
    options = {"cache": tmp_path, "cache_after_seconds": 0.0}
    texts = list(TEXTS.values())
    first = Corpus.from_texts(texts, **options)
    (kept,) = tmp_path.iterdir()
    again = Corpus.from_texts(texts, **options)
    assert again.find("otters sleep crows", 3) == first.find("otters sleep crows", 3)
    stamp = kept.stat().st_mtime_ns
    (kept / "params.index.json").write_text("{")
    broken = Corpus.from_texts(texts, **options)
    assert "is built anew" in caplog.text
    assert broken.find("wombats") == first.find("wombats")
    assert [kept] == list(tmp_path.iterdir())
    assert kept.stat().st_mtime_ns != stamp
    Corpus.from_texts(texts[:2], **options)
    assert len(list(tmp_path.iterdir())) == 2
    Corpus.from_texts(texts[:1], cache=tmp_path)  # fast: not worth keeping
    assert len(list(tmp_path.iterdir())) == 2


def test_without_its_library_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(Unavailable, match=r'pip install "tinsmith\[envs\]"'):
        Corpus.from_texts(["one"])


def test_passages_need_ids_of_their_own():
    with pytest.raises(InvalidInput, match="two passages of the corpus have the id 'a'"):
        Corpus([Passage("a", "x"), Passage("a", "y")])


def test_answers_are_scored_as_squad_does():
    assert exact_match("  The Eiffel-Tower! ", "eiffeltower") == 1
    assert exact_match("Paris, France", "Paris") == 0
    assert f1("a", "the") == 1  # nothing is left of either
    assert f1("", "Paris") == 0
    draw = random.Random(0)
    for _ in range(200):
        given, right = (draw.choices("pqrst", k=draw.randint(1, 6)) for _ in range(2))
        left = list(right)
        common = 0
        for word in given:
            if word in left:
                left.remove(word)
                common += 1
        precision, recall = common / len(given), common / len(right)
        wanted = 2 * precision * recall / (precision + recall) if common else 0.0
        assert f1(" ".join(given), " ".join(right)) == pytest.approx(wanted, abs=1e-12)


async def test_a_question_is_answered_after_searching_and_the_recall_is_told(corpus):
    env = RetrievalQA(corpus, [QUESTION], max_passages=2)
    observation, _ = await env.reset(seed=0)
    assert observation[-1]["content"] == QUESTION.question
    messages, reward, terminated, _, info = await env.step(call("people crows", k=99))
    assert messages[0]["content"].startswith("[crow] Crow\n")
    assert (reward, terminated, info["gold_recall"], info["retrieved"]) == (
        0.0,
        False,
        0.0,
        ["crow"],
    )
    *_, info = await env.step(call("cubes droppings"))
    assert info["gold_recall"] == 1.0
    _, reward, terminated, _, info = await env.step("It is a wombat.")
    assert (reward, terminated) == (0.5, True)  # one word of three, and the one that was wanted
    assert (info["exact"], info["f1"], info["success"]) == (0.0, 0.5, False)
    exact = RetrievalQA(corpus, [QUESTION], reward="exact")
    await exact.reset(seed=0)
    assert (await exact.step("The Wombat!"))[1] == 1.0


def test_it_keeps_to_the_interface_and_refuses_what_it_cannot_play(corpus):
    check_env(RetrievalQA(corpus, [QUESTION]), actions=(call("wombats"), "wombat"))
    with pytest.raises(InvalidInput, match="reward must be"):
        RetrievalQA(corpus, [QUESTION], reward="bleu")
    with pytest.raises(InvalidInput, match="no question in split 'train'"):
        RetrievalQA(corpus, [], split="train")


def test_questions_are_read_checked_and_split(tmp_path, corpus):
    file = tmp_path / "questions.jsonl"
    rows = [
        {"question": f"What is {i}?", "answer": f"number {i}", "gold": "crow"} for i in range(50)
    ]
    bad = [
        {"answers": ["a"]},
        {"question": "q", "answers": []},
        {"question": "q", "answers": ["!"]},
    ]
    file.write_text("\n".join(map(json.dumps, rows + bad)))
    questions = load_questions(file)
    assert len(questions) == 50
    assert questions[0] == Question("What is 0?", ("number 0",), ("crow",))
    with pytest.raises(InvalidInput, match="line 51: `question` must be a text"):
        load_questions(file, strict=True)
    train = {q.question for q in RetrievalQA(corpus, questions, "train").questions}
    held_out = {q.question for q in RetrievalQA(corpus, questions, "eval").questions}
    assert not train & held_out
    assert len(train | held_out) == 50
    assert 2 <= len(held_out) <= 20


async def test_episodes_share_the_corpus_that_was_registered_with_them(corpus):
    register("animals", lambda **kwargs: RetrievalQA(corpus, [QUESTION], **kwargs))
    source = EnvSource("animals", pickled_factory("animals"))
    async with EnvPool() as pool, pool.open(source, {"reward": "exact"}) as env:
        await env.reset(0, None)
        found = await env.step(call("droppings"))
        assert "[wombat]" in found.messages[0]["content"]
        assert (await env.step("wombat")).reward == 1.0
