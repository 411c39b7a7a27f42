"""Every mistake raises the SDK's own typed error at once, says what is wrong, and costs nothing
else: the same client goes on."""

from __future__ import annotations

import contextlib
import time

import numpy as np
import pytest
import tinker
from tinker import types

from tests.data import policy_datum, text_datum
from tests.gateway.sdk import prompt, sdk_datum

ADAM = types.AdamParams(learning_rate=1e-3)
GREEDY = types.SamplingParams(max_tokens=2, temperature=0.0)
PROMPT_SECONDS = 20  # on a busy machine; a retry loop takes minutes


@pytest.fixture(scope="module")
def client(url):
    with tinker.ServiceClient(base_url=url) as client:
        yield client


@pytest.fixture(scope="module")
def training(client):
    return client.create_lora_training_client(base_model="tiny-llama", rank=4).result()


@pytest.fixture(scope="module")
def sampler(client):
    return client.create_sampling_client(base_model="tiny-llama").result()


def refused(call, says: str, error=tinker.RequestFailedError) -> None:
    started = time.monotonic()
    with pytest.raises(error) as caught:
        finished(call())
    assert says in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert time.monotonic() - started < PROMPT_SECONDS
    if isinstance(caught.value, tinker.RequestFailedError):
        assert caught.value.category is types.RequestErrorCategory.User


def finished(called):
    return called.result() if hasattr(called, "result") else called


def good(make=text_datum) -> types.Datum:
    return sdk_datum(make(np.random.default_rng(0)))


def with_inputs(**inputs) -> types.Datum:
    datum = good(policy_datum)
    merged = {**datum.loss_fn_inputs, **inputs}
    return types.Datum(
        model_input=datum.model_input,
        loss_fn_inputs={k: v for k, v in merged.items() if v is not None},
    )


def train(training) -> float:
    result = training.forward_backward([good()], "cross_entropy")
    training.optim_step(ADAM).result()
    return result.result().metrics["loss:sum"]


@pytest.fixture(autouse=True)
def goes_on(training, sampler):
    """Whatever was refused: this client trains and samples afterwards."""
    yield
    assert np.isfinite(train(training))
    assert sampler.sample(prompt([5, 6]), 1, GREEDY).result().sequences


# ---- runs ----


@pytest.mark.parametrize(
    ("how", "says", "error"),
    [
        (dict(base_model="no-such-model"), "no-such-model", tinker.RequestFailedError),
        (dict(base_model="tiny-llama", rank=0), "rank", tinker.BadRequestError),
        (dict(base_model="tiny-llama", rank=-3), "rank", tinker.BadRequestError),
        (dict(base_model="tiny-llama", rank=10**9), "rank", tinker.BadRequestError),
        (dict(base_model="tiny-llama", seed=-1), "seed", tinker.BadRequestError),
        (dict(base_model="tiny-llama", seed=2**80), "seed", tinker.BadRequestError),
    ],
)
def test_runs_that_cannot_be(client, how, says, error):
    refused(lambda: client.create_lora_training_client(**how), says, error)


def test_an_optimizer_that_there_is_not(client):
    refused(
        lambda: client.create_lora_training_client(
            base_model="tiny-llama", rank=4, optimizer=types.DimuonOptimizerConfig()
        ),
        "use adamw",
        tinker.BadRequestError,
    )


# ---- datums ----

TOO_LONG = [1] * 513


@pytest.mark.parametrize(
    ("datum", "says"),
    [
        (with_inputs(advantages=None), "advantages"),
        (with_inputs(advantages=types.TensorData.from_numpy(np.ones(3, np.float32))), "advantages"),
        (
            with_inputs(advantages=types.TensorData.from_numpy(np.ones((12, 2), np.float32))),
            "advantages",
        ),
        (
            with_inputs(advantages=types.TensorData.from_numpy(np.full(12, np.nan, np.float32))),
            "advantages",
        ),
        (
            with_inputs(target_tokens=types.TensorData.from_numpy(np.full(12, 336))),
            "target_tokens",
        ),
        (
            with_inputs(target_tokens=types.TensorData.from_numpy(np.full(12, -7))),
            "target_tokens",
        ),
        (
            types.Datum(
                model_input=prompt([335, 336]), loss_fn_inputs=good(policy_datum).loss_fn_inputs
            ),
            "model_input",
        ),
        (types.Datum(model_input=prompt([]), loss_fn_inputs={}), "datum 1"),
        (
            types.Datum(
                model_input=prompt(TOO_LONG),
                loss_fn_inputs={
                    "target_tokens": TOO_LONG,
                    "logprobs": [0.0] * 513,
                    "advantages": [0.0] * 513,
                },
            ),
            "512",
        ),
    ],
)
def test_a_bad_datum_is_named(training, datum, says):
    call = lambda: training.forward_backward([good(policy_datum), datum], "ppo")  # noqa: E731
    refused(call, says)
    refused(call, "datum 1")


def test_no_datum_at_all(training):
    # The SDK sends nothing, and has no result.
    with pytest.raises(Exception):  # noqa: B017, PT011
        training.forward_backward([], "ppo").result()


def test_images_in_training(training):
    image = types.ImageChunk(data=b"\x89PNG", format="png", expected_tokens=3)
    datum = types.Datum(
        model_input=types.ModelInput(chunks=[image]), loss_fn_inputs=good().loss_fn_inputs
    )
    refused(lambda: training.forward_backward([datum], "cross_entropy"), "only text is supported")


# ---- losses and their settings ----


@pytest.mark.parametrize(
    ("loss", "config", "says"),
    [
        ("no_such_loss", None, "no_such_loss"),
        ("custom", None, "forward_backward_custom"),
        ("stable_reinforce", None, "with_provenance"),
        ("ppo", {"no_such_key": 1.0}, "no_such_key"),
        ("ppo", {"clip_low_threshold": "low"}, "must be a number, got 'low'"),
        ("ppo", {"clip_low_threshold": float("nan")}, "clip_low_threshold"),
    ],
)
def test_bad_losses(training, loss, config, says):
    refused(lambda: training.forward_backward([good(policy_datum)], loss, config), says)


@pytest.mark.parametrize(
    "wrong",
    [
        dict(learning_rate=-1.0),
        dict(learning_rate=float("nan")),
        dict(beta1=1.5),
        dict(eps=-1e-8),
        dict(grad_clip_norm=-1.0),
    ],
)
def test_bad_adam_params(training, wrong):
    (name,) = wrong
    error = (tinker.RequestFailedError, tinker.UnprocessableEntityError)
    refused(lambda: training.optim_step(types.AdamParams(**wrong)), name, error)


# ---- checkpoints ----


def test_a_name_is_taken_once(training):
    saved = training.save_state("twice").result()
    refused(lambda: training.save_state("twice"), "exists already")
    assert training.load_state(saved.path).result()


@pytest.mark.parametrize("name", ["../x", "a/b", "", "x" * 300, ".hidden", "a b", "ä"])
def test_names_that_no_checkpoint_has(training, name):
    error = (tinker.RequestFailedError, tinker.UnprocessableEntityError)
    for save in (training.save_state, training.save_weights_for_sampler):
        refused(lambda save=save: save(name), "", error)


@pytest.mark.parametrize("ttl", [-5, 0, 10**30])
def test_lives_that_no_checkpoint_has(training, ttl):
    error = (tinker.RequestFailedError, tinker.UnprocessableEntityError)
    refused(lambda: training.save_state("short", ttl_seconds=ttl), "ttl_seconds", error)


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("tinker://nobody/weights/x", "no checkpoint"),
        ("tinker://a/../../weights/x", "not a checkpoint path"),
        ("tinker://../weights/x", "run id '..'"),
        ("/etc/passwd", "not a checkpoint path"),
        ("tinker://x", "not a checkpoint path"),
    ],
)
def test_paths_that_lead_nowhere(client, training, path, says):
    refused(lambda: training.load_state(path), says)
    refused(lambda: client.create_training_client_from_state(path), says)
    error = (tinker.NotFoundError, tinker.BadRequestError)
    if path.startswith("tinker://"):
        refused(lambda: client.create_sampling_client(model_path=path), says, error)


def test_a_sampler_checkpoint_has_no_optimizer(client, training):
    path = training.save_weights_for_sampler("no-optimizer").result().path
    refused(lambda: client.create_training_client_from_state_with_optimizer(path), "no optimizer")


# ---- sampling ----


@pytest.mark.parametrize(
    ("params", "says"),
    [
        (dict(max_tokens=600), "512"),
        (dict(max_tokens=0), "max_tokens"),
        (dict(max_tokens=2, top_k=0), "top_k"),
        (dict(max_tokens=2, top_k=-2), "top_k"),
        (dict(max_tokens=2, top_p=0.0), "top_p"),
        (dict(max_tokens=2, top_p=1.5), "top_p"),
        (dict(max_tokens=2, temperature=-1.0), "temperature"),
        (dict(max_tokens=2, seed=-1), "seed"),
    ],
)
def test_bad_sampling_params(sampler, params, says):
    error = (tinker.RequestFailedError, tinker.UnprocessableEntityError)
    call = lambda: sampler.sample(prompt([5, 6]), 1, types.SamplingParams(**params))  # noqa: E731
    refused(call, says, error)


@pytest.mark.parametrize("params", [dict(seed=2**80), dict(top_k=2**40), dict(stop=[2**40, -1])])
def test_odd_sampling_params_do_no_harm(sampler, params):
    """Taken or refused, but no server error."""
    settings = types.SamplingParams(max_tokens=2, temperature=1.0, **params)
    with contextlib.suppress(tinker.UnprocessableEntityError):
        error = sampler.sample(prompt([5, 6]), 1, settings).exception(timeout=PROMPT_SECONDS)
        assert error is None or error.category is types.RequestErrorCategory.User


@pytest.mark.parametrize(
    ("chunks", "says"),
    [
        ([], "empty"),
        ([types.EncodedTextChunk(tokens=[])], "empty"),
        ([types.EncodedTextChunk(tokens=[336])], "336"),
        ([types.EncodedTextChunk(tokens=[1] * 513)], "512"),
        ([types.ImageChunk(data=b"\x89PNG", format="png", expected_tokens=3)], "only encoded_text"),
    ],
)
def test_bad_prompts(sampler, chunks, says):
    refused(lambda: sampler.sample(types.ModelInput(chunks=chunks), 1, GREEDY), says)


def test_no_samples(sampler):
    error = (tinker.RequestFailedError, tinker.UnprocessableEntityError)
    refused(lambda: sampler.sample(prompt([1]), 0, GREEDY), "num_samples", error)
    refused(lambda: sampler.sample(prompt([1]), 10**6, GREEDY), "num_samples", error)


def test_sampling_from_no_model(client):
    refused(
        lambda: (
            client.create_sampling_client(base_model="no-such-model")
            .result()
            .sample(prompt([1]), 1, GREEDY)
        ),
        "no-such-model",
        (tinker.RequestFailedError, tinker.NotFoundError),
    )


# ---- what there is not ----


def test_operations_on_a_run_that_there_is_not(client, training):
    from tinker.lib.public_interfaces.training_client import TrainingClient

    ghost = TrainingClient(client.holder, 99, "no-such-run", info=training._info)
    for call in (
        lambda: ghost.forward_backward([good()], "cross_entropy"),
        lambda: ghost.optim_step(ADAM),
        lambda: ghost.save_state("x"),
        lambda: ghost.save_weights_for_sampler("x"),
    ):
        refused(call, "no-such-run", tinker.NotFoundError)


def test_requests_that_there_are_not(url):
    import httpx

    def ask(path, **body):
        return httpx.post(f"{url}/api/v1/{path}", json=body)

    assert ask("get_info", model_id="nobody").status_code == 404
    assert ask("retrieve_future", request_id="nothing").status_code == 404
    assert ask("session_heartbeat", session_id="nobody").status_code == 404
    assert ask("cancel_future", request_id="nothing").status_code == 200
    for answer in (ask("no_such_route"), ask("optim_step", model_id="x")):
        assert answer.status_code in (404, 422)
        assert answer.json()["detail"]


def test_the_rest_client_says_so_too(client):
    rest = client.create_rest_client()
    for call in (
        lambda: rest.get_training_run("nobody"),
        lambda: rest.list_checkpoints("nobody"),
        lambda: rest.get_weights_info_by_tinker_path("tinker://nobody/weights/x"),
        lambda: rest.delete_checkpoint("nobody", "weights/x"),
        lambda: rest.get_session("nobody"),
        lambda: rest.get_sampler("nobody"),
    ):
        refused(call, "nobody", tinker.NotFoundError)
