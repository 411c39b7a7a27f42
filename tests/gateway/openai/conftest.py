"""The endpoints on a real server over the tests' cluster, and `openai`'s own client."""

from __future__ import annotations

import asyncio
import socket
import threading
from types import SimpleNamespace

import openai
import pytest
import uvicorn
from fastapi import FastAPI, HTTPException, Request

import tinsmith
from tests.gateway.openai.talk import ANSWERS, MESSAGES, TOOL_TEMPLATE, TOOLS
from tests.tiny import make_tiny_model
from tinsmith.envs import ChatRenderer
from tinsmith.gateway.openai import ServedModel, ServedPolicy, TrajectoryStore, openai_router

CONTEXT = 512
OWNERS = {"key-alice": "alice", "key-bob": "bob"}


class ThesePolicies:
    """Named policies, the same for all owners."""

    def __init__(self, served: dict[str, ServedPolicy]) -> None:
        self.served = served

    async def owner(self, request: Request) -> str:
        key = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if key not in OWNERS:
            raise HTTPException(401, "wrong API key; set OPENAI_API_KEY")
        return OWNERS[key]

    async def models(self, owner: str) -> list[ServedModel]:
        return [ServedModel(name, 1_700_000_000) for name in self.served]

    async def open(self, owner: str, model: str) -> ServedPolicy:
        if model not in self.served:
            raise tinsmith.NotFound(f"no model {model!r}")
        return self.served[model]


@pytest.fixture(scope="package")
async def native(service):
    """The sampling client behind the model `tiny`."""
    return await service.create_sampling_client(base_model="tiny-llama")


@pytest.fixture(scope="package")
async def caller(service, tmp_path_factory):
    """A run that learned by heart to call a tool twice and then to answer."""
    folder = make_tiny_model(tmp_path_factory.mktemp("models") / "caller", "llama")
    tokenizer = (await service.create_sampling_client(base_model=folder)).get_tokenizer()
    tokenizer.chat_template = TOOL_TEMPLATE
    tokenizer.save_pretrained(folder)
    training = await service.create_lora_training_client(folder, rank=16, seed=0)
    renderer = ChatRenderer(tokenizer)
    data = []
    for turn, answer in enumerate(ANSWERS):
        prompt = renderer.tokens(renderer.text(MESSAGES[: 1 + 2 * turn], TOOLS))
        said = [*renderer.tokens(answer), tokenizer.eos_token_id]
        tokens, weights = [*prompt, *said], [0.0] * (len(prompt) - 1) + [1.0] * len(said)
        data.append(tinsmith.Datum(tokens[:-1], {"target_tokens": tokens[1:], "weights": weights}))
    for _ in range(60):
        output = training.forward_backward(data)
        await training.optim_step(tinsmith.AdamParams(learning_rate=0.005, grad_clip_norm=1.0))
    assert (await output).metrics["loss:sum"] < 1
    policy = await training.save_weights_and_get_sampling_client()
    return SimpleNamespace(training=training, policy=policy, tokenizer=tokenizer)


@pytest.fixture(scope="package")
async def url(native, caller):
    """Where the server is."""
    tokenizer, bare = native.get_tokenizer(), native.get_tokenizer()
    bare.chat_template = None
    policies = ThesePolicies(
        {
            "tiny": ServedPolicy(native, tokenizer, CONTEXT),
            "tinker://bare/sampler_weights/1": ServedPolicy(native, bare, CONTEXT),
            "caller": ServedPolicy(caller.policy, caller.tokenizer, CONTEXT),
        }
    )
    app = FastAPI()
    app.include_router(openai_router(policies, TrajectoryStore(owner_tokens=20_000)))
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
    server.should_exit = True
    await asyncio.to_thread(thread.join)


@pytest.fixture(scope="package")
async def alice(url):
    async with openai.AsyncOpenAI(base_url=url, api_key="key-alice") as client:
        yield client


@pytest.fixture(scope="package")
async def bob(url):
    async with openai.AsyncOpenAI(base_url=url, api_key="key-bob") as client:
        yield client
