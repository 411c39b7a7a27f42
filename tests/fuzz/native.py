"""Calls of every public method of the native clients, with arguments that they do not take."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np

from tests.data import policy_datum, text_datum
from tests.fuzz.driver import Case, quiet, told
from tests.fuzz.odd import Rng, pick, value
from tests.fuzz.web import MODEL, WAIT_SECONDS, connected
from tinsmith.primitives.client import EnvClient, SamplingClient, ServiceClient, TrainingClient
from tinsmith.primitives.errors import TinsmithError
from tinsmith.primitives.op import Op
from tinsmith.primitives.types import AdamParams, Datum, LoraConfig, ModelInput, SamplingParams

RANDOM = np.random.default_rng(0)
DATA = [policy_datum(RANDOM, 6)]
# Of what a case makes beside the calls, the arguments that are taken.
MADE: dict[Any, dict[str, Any]] = {
    AdamParams: dict(learning_rate=1e-4, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.0, grad_clip_norm=1.0),
    SamplingParams: dict(max_tokens=2, seed=1, stop=["x"], temperature=1.0, top_k=5, top_p=0.9),
    LoraConfig: dict(rank=1, alpha=32.0, seed=1, train_mlp=True, experts="each"),
    ModelInput: dict(tokens=[1, 2, 3]),
    Datum: dict(model_input=[1, 2], loss_fn_inputs={"target_tokens": [1, 2], "weights": [1.0, 1.0]}),
}  # fmt: skip


@contextlib.contextmanager
def calls() -> Iterator[Case]:
    with connected() as service, calls_of(service) as case:
        yield case


@contextlib.contextmanager
def calls_of(service: ServiceClient) -> Iterator[Case]:
    training = service.create_lora_training_client(MODEL, rank=2, seed=1).result(WAIT_SECONDS)
    sampling = service.create_sampling_client(base_model=MODEL).result(WAIT_SECONDS)
    path = training.save_state("saved").result(WAIT_SECONDS).path
    params = SamplingParams(max_tokens=2, stop=[])
    batch = dict(
        data=DATA, loss_fn="ppo", loss_fn_config={"clip_low_threshold": 0.8}, logprobs="all"
    )
    save = dict(name="again", user_metadata={"a": 1}, overwrite=True, ttl_seconds=60)
    checkpoint = dict(path=path, user_metadata={"a": 1})
    methods: list[tuple[Any, str, dict[str, Any]]] = [
        (training, "forward", batch),
        (training, "forward_backward", batch),
        (training, "forward_backward_custom", dict(data=[text_datum(RANDOM, 4)], loss_fn=_loss)),
        (training, "optim_step", dict(adam_params=AdamParams(learning_rate=1e-5))),
        (training, "set_share", dict(share=1.0)),
        (training, "save_state", save),
        (training, "save_weights_for_sampler", save),
        (training, "load_state", dict(path=path)),
        (training, "load_state_with_optimizer", dict(path=path)),
        (training, "save_weights_and_get_sampling_client", {}),
        (training, "live_sampling_client", {}),
        (training, "get_info", {}),
        (training, "get_tokenizer", {}),
        (sampling, "ready", {}),
        (
            sampling,
            "sample",
            dict(
                prompt=[1, 2, 3],
                num_samples=1,
                sampling_params=params,
                include_prompt_logprobs=True,
                topk_prompt_logprobs=1,
                prompt_logprobs_last_n=1,
                target_prompt_logprobs=[[1], [2]],
                prompt_alt_tokens_k=1,
                topk_sample_logprobs=1,
            ),
        ),
        (sampling, "sample_stream", dict(prompt=[1, 2], num_samples=1, sampling_params=params, topk_sample_logprobs=1)),
        (sampling, "compute_logprobs", dict(prompt=[1, 2, 3], prompt_logprobs_last_n=2)),
        (sampling, "get_tokenizer", {}),
        (service, "get_server_capabilities", {}),
        (service, "create_lora_training_client", dict(base_model=MODEL, rank=1, seed=1, alpha=32.0, train_attn=True, experts="each", user_metadata={})),
        (service, "create_training_client_from_state", checkpoint),
        (service, "create_training_client_from_state_with_optimizer", checkpoint),
        (service, "resume_training_client", dict(run_id="nobody", path=path)),
        (service, "create_sampling_client", dict(model_path=path, base_model=None)),
        (service, "create_env_client", dict(base_model="nothing", num_workers=1, max_concurrent=1)),
        (service, "metrics", {}),
        (service, "list_training_runs", {}),
        (service, "get_training_run", dict(run_id=training.run_id)),
        (service, "delete_training_run", dict(run_id="nobody")),
        (service, "close_training_run", dict(run_id="nobody")),
        (service, "unload_model", dict(base_model="nothing")),
        (service, "list_checkpoints", dict(run_id=training.run_id)),
        (service, "delete_checkpoint", dict(path="tinker://nobody/weights/x")),
        (service, "set_checkpoint_ttl", dict(path="tinker://nobody/weights/x", ttl_seconds=5)),
        (service, "publish_checkpoint", dict(path=path, public=False)),
        (service, "copy_checkpoint", dict(path=path, run_id=training.run_id)),
    ]  # fmt: skip
    _check_complete(service, {(type(client), name) for client, name, _ in methods})

    def case(rng: Rng) -> str:
        try:
            if rng.random() < 0.25:
                made = pick(rng, list(MADE))
                made(**_changed(rng, MADE[made]))
                return "made"
            client, name, args = pick(rng, methods)
            changed = _changed(rng, args) if args else {}
            _finish(getattr(client, name)(**changed))
            return "done"
        except TinsmithError as error:
            return told(error)
        finally:
            assert training.get_info().result(WAIT_SECONDS).run_id == training.run_id

    with quiet():
        yield case
    service.close_training_run(training.run_id).result(WAIT_SECONDS)


def _check_complete(service: ServiceClient, called: set[tuple[type, str]]) -> None:
    """That every public method of the clients is there."""
    for kind in (type(service), TrainingClient, SamplingClient):
        for name, _ in inspect.getmembers(kind, inspect.isfunction):
            if not name.startswith("_") and (kind, name) not in called:
                assert name in ("close", "play_match", "run_episode"), (kind, name)


def _changed(rng: Rng, args: dict[str, Any]) -> dict[str, Any]:
    """One or two of them are something else."""
    args = dict(args)
    names = sorted(name for name in args if args[name] is not _loss)  # what it raises is its own
    for _ in range(int(rng.integers(1, 3))):
        name = pick(rng, names)
        old = args[name]
        if isinstance(old, list) and rng.random() < 0.5:
            args[name] = [*old[:-1], value(rng)]
        elif isinstance(old, dict) and rng.random() < 0.5:
            args[name] = {**old, pick(rng, [*old, "other", 1, None]): value(rng)}
        elif name == "data" and rng.random() < 0.7:
            args[name] = [_datum(rng)]
        else:
            args[name] = value(rng)
    return args


def _datum(rng: Rng) -> Datum:
    inputs: dict[str, Any] = dict(DATA[0].loss_fn_inputs)
    inputs[pick(rng, [*inputs, "other"])] = value(rng)
    return Datum(DATA[0].model_input, inputs)


def _loss(data: Any, logprobs: Any) -> Any:
    return sum(p.sum() for p in logprobs), {}


def _finish(called: Any) -> None:
    """Wait for whatever a call gave."""
    if isinstance(called, Op):
        called = called.result(WAIT_SECONDS)
    elif inspect.isasyncgen(called):
        asyncio.run(_drain(called))
    if isinstance(called, SamplingClient):
        called.ready().result(WAIT_SECONDS)
    elif isinstance(called, TrainingClient):
        called._controller.call("close_run", called.run_id).result(WAIT_SECONDS)
    elif isinstance(called, EnvClient):
        called.close().result(WAIT_SECONDS)


async def _drain(stream: Any) -> None:
    async with asyncio.timeout(WAIT_SECONDS):
        async for _ in stream:
            pass
