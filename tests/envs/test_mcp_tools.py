from __future__ import annotations

import asyncio
import os
import re
import socket
import sys
from pathlib import Path

import pytest

from tests.envs.mcp_which import LOCAL, SERVER, twice
from tests.envs.scripted import Scripted
from tests.tiny import tiny_tokenizer
from tinsmith.envs import ChatRenderer, EnvPool, EpisodeSpec, ToolSet, play_episode
from tinsmith.envs.mcp_env import MCPEnv
from tinsmith.envs.mcp_tools import MCPTools
from tinsmith.primitives.errors import EnvironmentFailure, InvalidInput, NotFound


async def test_a_servers_tools_are_listed_and_called_and_its_trouble_is_told():
    server = MCPTools(**LOCAL, call_seconds=1.5)
    tools = ToolSet([twice, *await server.open()], syntax="plain")
    try:
        add = tools.schemas[1]["function"]
        assert (add["name"], add["description"]) == ("add", "Add two numbers.")
        assert add["parameters"]["required"] == ["a"]
        for turn, text, ok in [
            ("add(1, b=2)", "3", True),
            ("add(4)", "5", True),
            ("twice('ha')", "haha", True),
            ("add('x')", "valid integer", False),
            ("add(1, 2, 3)", "Error in add: takes 2 arguments, got 3", False),
            ("add(1, a=2)", "Error in add: multiple values for argument 'a'", False),
            ("fail('no luck')", "no luck", False),
            ("picture()", "[image, which is no text]", True),
            ("sleep(20)", "Error in sleep: no answer within 1.5 s", False),
            ("die()", "Error in die: ", False),
            ("add(1, 2)", "Error in add: ", False),
        ]:
            (result,) = await tools.run(turn)
            assert text in result.text
            assert result.ok == ok, result
    finally:
        await server.close()


async def test_a_server_is_reached_over_http():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = await asyncio.create_subprocess_exec(sys.executable, SERVER, str(port))
    try:
        server = MCPTools(url=f"http://127.0.0.1:{port}/mcp", prefix="far_", only=["add"])
        for _ in range(600):
            try:
                tools = ToolSet(await server.open(), syntax="plain")
                break
            except EnvironmentFailure:  # not listening yet
                await asyncio.sleep(0.1)
        assert list(tools.tools) == ["far_add"]
        assert (await tools.run("far_add(1, 2)"))[0].text == "3"
        process.kill()
        await process.wait()
        assert not (await tools.run("far_add(1, 2)"))[0].ok
        await server.close()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_a_server_that_does_not_start_fails_the_episode():
    for server, told in [
        (MCPTools("no-such-program"), "there is no program"),
        (MCPTools(sys.executable, ["-c", "raise SystemExit('no key')"]), r"(?s)wrote:.*no key"),
        (MCPTools("sleep", ["60"], start_seconds=0.5), r"did not list its tools within 0\.5 s"),
    ]:
        with pytest.raises(EnvironmentFailure, match=told):
            await server.open()
    with pytest.raises(InvalidInput, match="a command or a url"):
        MCPTools()


class Seen(ChatRenderer):
    """Keeps the tools that the conversation began with."""

    def start(self, messages, tools=None):
        self.tools = tools
        return super().start(messages, tools)


async def test_the_server_ends_with_its_episode():
    tokenizer = tiny_tokenizer()
    policy = Scripted(tokenizer, ["pid()", "done"])
    async with EnvPool() as pool:
        spec = EpisodeSpec("tests.envs.mcp_which:Which", policy)
        renderer = Seen(tokenizer)
        trajectory = await play_episode(pool, renderer, spec)
        process = int(trajectory.messages[-2]["content"])
        for _ in range(100):
            if not running(process):
                break
            await asyncio.sleep(0.1)
        assert not running(process)
    assert [tool["function"]["name"] for tool in renderer.tools][:2] == ["twice", "add"]


def running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]


async def test_questions_from_a_file_are_answered_with_tools(tmp_path):
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text(
        '{"question": "2 + 3?", "answer": 5}\n\n{"question": "1 + 1?", "answer": "2"}\n'
    )
    tokenizer = tiny_tokenizer()
    call = '<tool_call>{"name": "add", "arguments": {"a": 2, "b": 3}}</tool_call>'
    kwargs = {"tasks": str(tasks), "servers": [LOCAL], "system_prompt": "Add."}
    async with EnvPool() as pool:
        spec = EpisodeSpec(
            "tinsmith.envs.mcp_env:MCPEnv",
            Scripted(tokenizer, [call, "It is <answer> 5</answer>."]),
            env_kwargs=kwargs,
        )
        trajectory = await play_episode(pool, ChatRenderer(tokenizer), spec)
    assert trajectory.messages[1]["content"] == "2 + 3?"
    assert trajectory.rewards == [0.0, 1.0]


def test_answers_are_compared_exactly_or_as_expressions(tmp_path):
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text('{"question": "?", "answer": "Fi(ve|fth)"}\n' * 5)
    exact = MCPEnv(str(tasks), [])
    exact.begin(0, None)
    assert [exact.score(text) for text in (" fi(VE|fth)\n", "Five")] == [1.0, 0.0]
    regex = MCPEnv(str(tasks), [], match="regex", split="eval")
    regex.begin(0, None)
    assert [regex.score(text) for text in ("the Fifth", "five")] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "line 2: Expecting"),
        ('{"question": "?"}', "line 2: `answer` must be a text, got None"),
        ('{"question": [1], "answer": "1"}', r"line 2: `question` must be a text, got \[1\]"),
        ('{"question": "?", "answer": "("}', "line 2: `answer` is no regular expression: missing"),
    ],
)
def test_bad_rows_are_skipped_or_refused_with_their_line(tmp_path, caplog, line, told):
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text('{"question": "?", "answer": "."}\n' + line)
    assert len(MCPEnv(str(tasks), [], match="regex").tasks) == 1
    assert "skipped 1 of 2" in caplog.text
    assert re.search(told, caplog.text)
    with pytest.raises(InvalidInput, match=told):
        MCPEnv(str(tasks), [], match="regex", strict=True)
    with pytest.raises(NotFound, match="No such file"):
        MCPEnv(str(tasks) + "x", [])
