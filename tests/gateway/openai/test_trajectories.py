"""Requests with a trajectory id become training data: the tokens that were sampled, no others."""

from __future__ import annotations

import asyncio

import numpy as np
import openai
import pytest

import tinsmith
from tests.actors.test_training import new_run
from tests.gateway.openai.talk import ANSWERS, MESSAGES, TOOLS
from tinsmith.algorithms.datums import trajectory_datums
from tinsmith.envs import ChatRenderer
from tinsmith.primitives.types import Trajectory


async def fetch(client, name: str) -> Trajectory:
    data = await client.get(f"/trajectories/{name}", cast_to=object)
    assert data["id"] == name
    return tinsmith.trajectory_from_json(data)


def text(text: str, role: str = "user") -> dict[str, str]:
    return {"role": role, "content": text}


class Agent:
    """An agent framework: holds the messages, knows no tokens."""

    def __init__(self, client, name: str, **knobs) -> None:
        self.client, self.messages = client, []
        self.knobs = {"model": "tiny", "extra_headers": {"X-Trajectory-Id": name}, **knobs}

    async def ask(self, *messages: dict, **knobs):
        self.messages += messages
        got = await self.client.chat.completions.create(
            messages=self.messages, **self.knobs | knobs
        )
        (choice,) = got.choices
        self.messages.append(choice.message.model_dump())
        return choice


async def test_a_tool_conversation_is_one_segment_of_what_was_sampled(alice, caller):
    """Three turns; the calls come back to the server as the client's objects, and yet stand in
    the segment as the model wrote them."""
    agent = Agent(alice, "tools", model="caller", tools=TOOLS, temperature=0, logprobs=True)
    choices = [await agent.ask(MESSAGES[0])]
    for result in ("3", "7"):
        (call,) = choices[-1].message.tool_calls
        answer = {"role": "tool", "tool_call_id": call.id, "content": result}
        choices.append(await agent.ask(answer))
    assert choices[-1].message.content == ANSWERS[-1]

    trajectory = await fetch(alice, "tools")
    (segment,) = trajectory.segments
    tokenizer, end = caller.tokenizer, caller.tokenizer.eos_token
    sampled = [e.logprob for choice in choices for e in choice.logprobs.content]
    np.testing.assert_array_equal(segment.logprobs[segment.mask], np.float32(sampled))
    assert tokenizer.decode(segment.tokens[segment.mask]) == end.join([*ANSWERS, ""])
    whole = ChatRenderer(tokenizer).text([*MESSAGES, text(ANSWERS[2], "assistant")], TOOLS)
    assert whole.startswith(tokenizer.decode(segment.tokens))
    assert set(segment.versions[segment.mask]) == {caller.policy.policy.version}
    info = trajectory.info["turn_info"]
    assert [turn["stop_reason"] for turn in info] == ["stop"] * 3
    for turn, answer in zip(info, ANSWERS, strict=True):
        assert turn["segment"] == 0
        assert tokenizer.decode(segment.tokens[turn["start"] : turn["stop"]]) == answer + end
    roles = ["user", "assistant", "tool", "assistant", "tool", "assistant"]
    assert [message["role"] for message in trajectory.messages] == roles
    (called,) = trajectory.messages[1]["tool_calls"]
    assert called["function"] == {"name": "add", "arguments": {"a": 1, "b": 2}}

    (datum,) = trajectory_datums(trajectory, 1.0)
    output = await caller.training.forward([datum], "importance_sampling")
    used = datum.loss_fn_inputs["advantages"] != 0
    np.testing.assert_allclose(
        output.loss_fn_outputs[0]["logprobs"][used],
        datum.loss_fn_inputs["logprobs"][used],
        atol=1e-4,
    )


async def test_a_step_is_trained_from_what_was_fetched(alice, service):
    agent = Agent(alice, "train", max_tokens=12)
    for turn in range(3):
        await agent.ask(text(f"number {turn}?"))
    trajectory = await fetch(alice, "train")
    assert trajectory.num_sampled_tokens == sum(int(s.mask.sum()) for s in trajectory.segments)
    datums = trajectory_datums(trajectory, 1.0)
    training = await new_run(service)
    first = await training.forward_backward(datums, "importance_sampling")
    for datum, outputs in zip(datums, first.loss_fn_outputs, strict=True):
        used = datum.loss_fn_inputs["advantages"] != 0
        expected = datum.loss_fn_inputs["logprobs"][used]
        np.testing.assert_allclose(outputs["logprobs"][used], expected, atol=1e-4)
    await training.optim_step(tinsmith.AdamParams(learning_rate=0.01))
    second = await training.forward(datums, "importance_sampling")
    assert second.metrics["loss:sum"] < first.metrics["loss:sum"]


async def test_what_the_tokenizer_would_write_otherwise_stays_as_sampled(alice, native):
    """A random model's tokens are rarely those of its text."""
    tokenizer = native.get_tokenizer()
    agent = Agent(alice, "tokens", max_tokens=16, seed=5, temperature=0.8)
    answers = [(await agent.ask(text(f"number {turn}"))).message.content for turn in range(4)]
    trajectory = await fetch(alice, "tokens")
    sampled = np.concatenate([s.tokens[s.mask] for s in trajectory.segments])
    assert tokenizer.decode(sampled, skip_special_tokens=True) == "".join(answers)
    retokenized = [t for a in answers for t in tokenizer.encode(a, add_special_tokens=False)]
    assert retokenized != sampled.tolist()
    # The second turn saw the first one's tokens.
    info = trajectory.info["turn_info"][1]
    segment = trajectory.segments[info["segment"]]
    again = await native.sample(
        segment.tokens[: info["start"]],
        1,
        tinsmith.SamplingParams(max_tokens=16, seed=5, temperature=0.8),
    )
    expected = segment.tokens[info["start"] : info["stop"]]
    np.testing.assert_array_equal(again.sequences[0].tokens, expected)


async def test_a_stream_is_recorded_like_an_answer_in_one_piece(alice):
    agent = Agent(alice, "whole", max_tokens=16, seed=3)
    await agent.ask(text("number"))
    await agent.ask(text("again"))
    messages = [text("number")]
    for follow_up in (text("again"), None):
        content = ""
        async for chunk in await alice.chat.completions.create(
            **agent.knobs | {"extra_headers": {}},
            messages=messages,
            stream=True,
            extra_body={"trajectory_id": "streamed"},
        ):
            content += chunk.choices[0].delta.content or ""
        messages += [text(content, "assistant"), *([follow_up] if follow_up else [])]
    one, other = await fetch(alice, "whole"), await fetch(alice, "streamed")
    for expected, got in zip(one.segments, other.segments, strict=True):
        np.testing.assert_array_equal(got.tokens, expected.tokens)
        np.testing.assert_array_equal(got.mask, expected.mask)
        np.testing.assert_allclose(got.logprobs, expected.logprobs, atol=1e-5)


async def test_a_stop_string_is_cut_from_the_message_and_stays_in_the_tokens(alice, native):
    tokenizer = native.get_tokenizer()
    agent = Agent(alice, "stop", max_tokens=40, temperature=0)
    free = (await agent.ask(text("go"))).message.content
    stop = free[4:6]
    agent = Agent(alice, "stopped", max_tokens=40, temperature=0, stop=stop)
    assert (await agent.ask(text("go"))).message.content == free[: free.index(stop)]
    await agent.ask(text("on"))
    trajectory = await fetch(alice, "stopped")
    (segment,) = trajectory.segments
    first = trajectory.info["turn_info"][0]
    assert stop in tokenizer.decode(segment.tokens[first["start"] : first["stop"]])


async def test_branches_share_what_they_have_in_common_and_train_it_once(alice):
    agent = Agent(alice, "branches", max_tokens=8, temperature=0)
    await agent.ask(text("number"))
    common = list(agent.messages)
    for word in ("left", "right"):
        agent.messages = list(common)
        await agent.ask(text(word))
    agent.messages = [text("something else")]
    await agent.ask()
    trajectory = await fetch(alice, "branches")
    info = trajectory.info["turn_info"]
    assert [turn["segment"] for turn in info] == [0, 0, 1, 2]
    left, right, _ = trajectory.segments
    shared = info[0]["stop"]
    np.testing.assert_array_equal(left.tokens[:shared], right.tokens[:shared])
    assert left.mask[:shared].any()
    assert not right.mask[:shared].any()
    assert trajectory.num_sampled_tokens == sum(turn["stop"] - turn["start"] for turn in info)
    assert [m["content"] for m in trajectory.messages if m["role"] == "user"] == ["something else"]


async def test_a_conversation_that_its_client_rewrites_begins_a_new_segment(alice):
    agent = Agent(alice, "rewritten", max_tokens=8, temperature=0)
    await agent.ask(text("number"))
    agent.messages[-1]["content"] = "I never said that"
    await agent.ask(text("again"))
    trajectory = await fetch(alice, "rewritten")
    assert [turn["segment"] for turn in trajectory.info["turn_info"]] == [0, 1]


async def test_requests_of_one_trajectory_may_overlap(alice):
    agents = [Agent(alice, "overlap", max_tokens=8) for _ in range(6)]
    for _ in range(2):
        await asyncio.gather(*(a.ask(text(f"I am {i}")) for i, a in enumerate(agents)))
    trajectory = await fetch(alice, "overlap")
    assert trajectory.info["turns"] == 12
    assert trajectory.num_sampled_tokens == sum(
        turn["stop"] - turn["start"] for turn in trajectory.info["turn_info"]
    )


async def test_completions_go_on_from_texts_and_from_tokens(alice, native):
    tokenizer = native.get_tokenizer()
    knobs = dict(model="tiny", max_tokens=8, seed=1, stop="@@@")
    knobs["extra_body"] = {"trajectory_id": "plain"}
    prompt = "Thought:"
    for _ in range(3):
        got = await alice.completions.create(prompt=prompt, **knobs)
        prompt += got.choices[0].text + "\nObservation: 12\n"
    trajectory = await fetch(alice, "plain")
    # A turn that ended with the end token is gone on from without it: not the same sequence.
    ends = sum(turn["stop_reason"] == "stop" for turn in trajectory.info["turn_info"][:2])
    assert len(trajectory.segments) == 1 + ends

    knobs["extra_body"] = {"trajectory_id": "ids"}
    tokens = tokenizer.encode("Thought:")
    for _ in range(3):
        await alice.completions.create(prompt=tokens, **knobs)
        (segment,) = (await fetch(alice, "ids")).segments
        tokens = [*segment.tokens.tolist(), 40, 41]
    assert segment.mask.sum() == (await fetch(alice, "ids")).num_sampled_tokens


async def test_a_turn_that_fails_or_is_left_is_not_recorded(alice):
    agent = Agent(alice, "left", max_tokens=200)
    stream = await alice.chat.completions.create(**agent.knobs, messages=[text("go")], stream=True)
    async for _ in stream:
        break
    await stream.close()
    with pytest.raises(openai.BadRequestError):
        await agent.ask(text("go"), max_tokens=5000)
    assert (await fetch(alice, "left")).segments == []
    agent.messages = []
    await agent.ask(text("go"), max_tokens=4)
    assert len((await fetch(alice, "left")).segments) == 1


async def test_an_owner_sees_only_their_own(alice, bob):
    for client, word in ((alice, "mine"), (bob, "yours")):
        await Agent(client, "same/name", max_tokens=4).ask(text(word))
    await Agent(alice, "alices", max_tokens=4).ask(text("secret"))
    assert (await fetch(bob, "same/name")).messages[0]["content"] == "yours"
    assert (await fetch(alice, "same/name")).messages[0]["content"] == "mine"
    with pytest.raises(openai.NotFoundError, match="no trajectory 'alices'"):
        await fetch(bob, "alices")
    with pytest.raises(openai.NotFoundError):
        await bob.delete("/trajectories/alices", cast_to=object)
    listed = await bob.get("/trajectories", cast_to=object)
    assert [entry["id"] for entry in listed["data"]] == ["same/name"]
    assert listed["data"][0]["turns"] == 1
    await bob.delete("/trajectories/same/name", cast_to=object)
    with pytest.raises(openai.NotFoundError):
        await fetch(bob, "same/name")
    await fetch(alice, "same/name")


async def test_a_trajectory_that_was_forgotten_says_so(bob):
    await Agent(bob, "old", max_tokens=4).ask(text("a"))
    for index in range(100):
        await Agent(bob, f"new-{index}", max_tokens=1).ask(text("x" * 400))
    with pytest.raises(openai.NotFoundError, match="forgotten to make room"):
        await fetch(bob, "old")
    with pytest.raises(openai.NotFoundError, match="forgotten to make room"):
        await Agent(bob, "old", max_tokens=4).ask(text("b"))
    await bob.delete("/trajectories/old", cast_to=object)
    await Agent(bob, "old", max_tokens=4).ask(text("b"))


async def test_an_id_has_one_name_and_one_answer(alice):
    knobs = dict(model="tiny", max_tokens=2, extra_headers={"X-Trajectory-Id": "one"})
    with pytest.raises(openai.BadRequestError, match="different trajectories"):
        await alice.completions.create(prompt="x", extra_body={"trajectory_id": "two"}, **knobs)
    for wrong in (dict(prompt="x", n=2), dict(prompt=["x", "y"])):
        with pytest.raises(openai.BadRequestError):
            await alice.completions.create(**knobs, **wrong)
