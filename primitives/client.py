"""The API: clients whose operations are submitted when called and awaited when it matters.

Start here. `ServiceClient` opens training runs and samplers; `TrainingClient` is one run's ordered
log of operations; `SamplingClient` is a policy, pinned to a version or live.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import Any, Literal

import msgspec
import numpy as np

from . import tracing
from .arguments import check_flag, check_integer, check_number, check_text
from .errors import Busy, InvalidInput, NotFound, Unavailable
from .learner_link import Answered, LearnerLink, RunGrant
from .metrics_text import metrics_text
from .op import Handle, Op, chain, completed, failed, forward_result
from .patience import patiently
from .resending import Resending
from .sampler_link import SamplerGrant, SamplerLink
from .sync import HasSync
from .types import (
    ROUTED_EXPERTS,
    AdamParams,
    Checkpoint,
    Datum,
    ExpertAdapters,
    ForwardBackwardOutput,
    LoraConfig,
    Match,
    OptimStepResponse,
    PolicyRef,
    PublishResponse,
    SampledToken,
    SampleRequest,
    SampleResponse,
    SamplingParams,
    SaveResponse,
    ServerCapabilities,
    TokensLike,
    TrainingInfo,
    TrainingRun,
    Trajectory,
    token_array,
)
from .validation import check_ttl

LogprobsWanted = Literal["all", "loss"]
CustomLoss = Callable[[Sequence[Datum], list[Any]], tuple[Any, Mapping[str, float]]]

MAX_WORKERS = 1024
MAX_EPISODES = 100_000  # that a worker plays at once


def load_tokenizer(model_path: str) -> Any:
    """The Hugging Face tokenizer of a resolved model folder."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_path)


class SamplingClient(HasSync):
    """A policy to sample from: one immutable version, or live (always the newest published).

    Picklable once it is ready (`await client.ready()`), so that environment workers can use it.
    Requests under way survive the death of the sampler: they are sent again to the one that takes its
    place, and with a seed give the same tokens.
    """

    def __init__(self, grant: Future[SamplerGrant]) -> None:
        self._connect(grant)

    def _connect(self, grant: Future[SamplerGrant]) -> None:
        self._grant = grant
        self._link = chain(grant, lambda granted: completed(SamplerLink(granted)))

    def ready(self) -> Op[SamplingClient]:
        """Wait until the sampler can serve this policy."""
        return Op(self._grant).then(lambda _: self)

    def sample(
        self,
        prompt: TokensLike,
        num_samples: int = 1,
        sampling_params: SamplingParams | None = None,
        *,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
        prompt_logprobs_last_n: int | None = None,
        target_prompt_logprobs: Any = None,
        prompt_alt_tokens_k: int = 0,
        topk_sample_logprobs: int = 0,
    ) -> Op[SampleResponse]:
        """Sample `num_samples` continuations of `prompt` (token ids `[T]`).

        Without `max_tokens` a sample may go on to the end of the model's context. What else may be
        asked for comes in the `SampleResponse`, as it says there.

        Args:
            include_prompt_logprobs: the logprob of every prompt token.
            topk_prompt_logprobs: the K likeliest tokens at every prompt position.
            prompt_logprobs_last_n: score only the last N prompt tokens in these two; what is
                before them may then come from the prefix cache.
            target_prompt_logprobs: int64 `[T - 1, K]`, tokens to score: row i at prompt position
                i + 1; -1 names none.
            prompt_alt_tokens_k: K draws at every prompt position but the first.
            topk_sample_logprobs: the K likeliest tokens for every sampled token.

        Raises:
            InvalidInput: empty prompt, token ids out of range, prompt and `max_tokens` beyond
                the model's context.
            NotFound: this version is no longer held by the sampler.
            OutOfCapacity: the request can never fit in the sampler's memory.
        """
        request = SampleRequest(
            token_array(prompt, "prompt"),
            SamplingParams() if sampling_params is None else sampling_params,
            num_samples=num_samples,
            prompt_logprobs=include_prompt_logprobs,
            topk_prompt_logprobs=topk_prompt_logprobs,
            prompt_logprobs_last_n=prompt_logprobs_last_n,
            target_prompt_logprobs=target_prompt_logprobs,
            prompt_alt_tokens_k=prompt_alt_tokens_k,
            topk_sample_logprobs=topk_sample_logprobs,
            request_id=_request_id(),
        )
        span = tracing.start("sample", request=request.request_id, samples=num_samples)

        def send(link: SamplerLink) -> Future[SampleResponse]:
            span.set(run=link.grant.policy.run_id)
            return patiently(lambda: link.sample(replace(request, traceparent=span.traceparent)))

        future = chain(self._link, send)
        span.end_with(future)
        return Op(future)

    async def sample_stream(
        self,
        prompt: TokensLike,
        num_samples: int = 1,
        sampling_params: SamplingParams | None = None,
        *,
        topk_sample_logprobs: int = 0,
    ) -> AsyncGenerator[SampledToken]:
        """Sample, yielding each token as it is drawn, with the K likeliest tokens if
        `topk_sample_logprobs=K`. Leaving the loop withdraws the request. Routed experts are told with
        whole samples only.

        Raises:
            Unavailable: the sampler died when it had given something; as `sample` otherwise.
        """
        link = await Op(self._link)
        request_id = _request_id()
        span = tracing.start("sample", request=request_id, run=link.grant.policy.run_id)
        request = SampleRequest(
            token_array(prompt, "prompt"),
            SamplingParams() if sampling_params is None else sampling_params,
            num_samples=num_samples,
            topk_sample_logprobs=topk_sample_logprobs,
            request_id=request_id,
            traceparent=span.traceparent,
        )
        with span:
            while True:
                tokens = link.stream(request)
                try:
                    async with aclosing(tokens):  # type: ignore[type-var]
                        async for token in tokens:
                            yield token
                    return
                except Busy as refused:  # before its first token
                    await asyncio.sleep(refused.retry_after_s)

    def compute_logprobs(
        self, prompt: TokensLike, *, prompt_logprobs_last_n: int | None = None
    ) -> Op[np.ndarray]:
        """Logprobs of the tokens of `prompt` under this policy, float32 `[T]`, NaN first; with
        `prompt_logprobs_last_n=N` only of the last N, NaN before them."""
        response = self.sample(
            prompt,
            1,
            SamplingParams(max_tokens=1),
            include_prompt_logprobs=True,
            prompt_logprobs_last_n=prompt_logprobs_last_n,
        )
        return response.then(_prompt_logprobs)

    def get_tokenizer(self) -> Any:
        """The base model's Hugging Face tokenizer. Blocks until the client is ready."""
        return load_tokenizer(self._grant.result().model_path)

    @property
    def policy(self) -> PolicyRef:
        """Which weights this client samples from. Blocks until the client is ready."""
        return self._grant.result().policy

    @property
    def model_path(self) -> str:
        """The resolved folder of its base model. Blocks until the client is ready."""
        return self._grant.result().model_path

    def __getstate__(self) -> SamplerGrant:
        if not self._grant.done():
            raise InvalidInput("await client.ready() before sending a SamplingClient elsewhere")
        return self._link.result().grant

    def __setstate__(self, grant: SamplerGrant) -> None:
        self._connect(completed(grant))


_CLIENT = uuid.uuid4().hex[:8]
_requests = itertools.count(1)


def _request_id() -> str:
    """Names a sampling request in logs, traces and crash reports."""
    return f"{_CLIENT}-{next(_requests)}"


def _prompt_logprobs(response: SampleResponse) -> np.ndarray:
    assert response.prompt_logprobs is not None
    return response.prompt_logprobs


class TrainingClient(HasSync):
    """One training run. Its operations take effect in the order of the calls, exactly once;
    nothing needs to be awaited in between. Operations under way survive the death of the learner:
    they are sent again to the one that takes its place."""

    def __init__(self, grant: RunGrant, controller: Handle) -> None:
        self.run_id = grant.run_id
        self.base_model = grant.base_model
        self._link = LearnerLink(grant, controller, self._answered)
        self._controller = controller
        self._lock = threading.Lock()
        self._next_seq_id = grant.next_seq_id
        self._open: dict[int, None] = {}  # numbers taken whose results are not there; ascending
        self._failed: set[int] = set()  # numbers above the first of these

    def _take_seq_ids(self, count: int = 1) -> int:
        with self._lock:
            first = self._next_seq_id
            self._next_seq_id += count
            self._open.update(dict.fromkeys(range(first, first + count)))
            return first

    def _answered(self) -> Answered:
        with self._lock:
            before = next(iter(self._open), self._next_seq_id)
            self._failed = {seq_id for seq_id in self._failed if seq_id >= before}
            return Answered(before, sorted(self._failed))

    def _note_answer(self, seq_id: int, done: Future[Any]) -> None:
        with self._lock:
            self._open.pop(seq_id, None)
            if done.cancelled() or done.exception() is not None:
                self._failed.add(seq_id)

    def _submit(self, kind: str, *, seq_id: int | None = None, **args: Any) -> Op[Any]:
        seq = self._take_seq_ids() if seq_id is None else seq_id
        span = tracing.start(kind, run=self.run_id, op=seq)
        future = self._link.submit(seq, kind, args, span.traceparent)
        span.end_with(future)
        future.add_done_callback(lambda done: self._note_answer(seq, done))
        return Op(future, withdraw=lambda: self._link.withdraw(seq))

    @property
    def _grant(self) -> RunGrant:
        return self._link.grant

    def forward(
        self,
        data: Sequence[Datum],
        loss_fn: str = "cross_entropy",
        loss_fn_config: Mapping[str, float] | None = None,
        *,
        logprobs: LogprobsWanted = "all",
    ) -> Op[ForwardBackwardOutput]:
        """The loss and per-token logprobs of `data`, without gradients."""
        return self._forward_op("forward", data, loss_fn, loss_fn_config, logprobs)

    def forward_backward(
        self,
        data: Sequence[Datum],
        loss_fn: str = "cross_entropy",
        loss_fn_config: Mapping[str, float] | None = None,
        *,
        logprobs: LogprobsWanted = "all",
    ) -> Op[ForwardBackwardOutput]:
        """Add the gradient of the loss, summed over tokens and datums, to the run's gradient.

        `logprobs="all"` returns the logprob of every target token; `"loss"` computes (and
        returns) only those that the loss needs, NaN elsewhere, which saves their logits.

        Raises:
            InvalidInput: naming the datum and the field; the run's gradient is unchanged.
            NotFound: no loss of that name.
        """
        return self._forward_op("forward_backward", data, loss_fn, loss_fn_config, logprobs)

    def _forward_op(
        self,
        kind: str,
        data: Sequence[Datum],
        loss_fn: str,
        loss_fn_config: Mapping[str, float] | None,
        logprobs: LogprobsWanted,
        seq_id: int | None = None,
    ) -> Op[ForwardBackwardOutput]:
        if not isinstance(logprobs, str) or logprobs not in ("all", "loss"):
            raise InvalidInput(f'logprobs must be "all" or "loss", got {logprobs!r}')
        _check_datums(data)
        check_text("loss_fn", loss_fn)
        return self._submit(
            kind,
            seq_id=seq_id,
            data=list(data),
            loss_fn=loss_fn,
            loss_fn_config=_loss_config(loss_fn_config),
            logprobs=logprobs,
        )

    def forward_backward_custom(
        self, data: Sequence[Datum], loss_fn: CustomLoss
    ) -> Op[ForwardBackwardOutput]:
        """`forward_backward` with your own torch loss over logprobs.

        `loss_fn(data, logprobs)` gets one float32 tensor (requires grad) per datum in the shape of
        its `target_tokens`, and returns (scalar loss, metrics). It runs here, in a thread. The
        learner runs one forward pass for the logprobs and one forward and backward pass with the
        weights `-d loss / d logprob`, which give exactly the gradient of your loss.
        """
        _check_datums(data)
        if not callable(loss_fn):
            raise InvalidInput(f"loss_fn must be a function, got {loss_fn!r}")
        plain = [_with_weights(datum, None) for datum in data]
        first = self._take_seq_ids(2)
        forward = self._forward_op("forward", plain, "cross_entropy", None, "all", first)
        target: Future[ForwardBackwardOutput] = Future()

        def differentiate(done: Future[ForwardBackwardOutput]) -> None:
            try:
                output = done.result()
                weights, metrics = _custom_weights(data, loss_fn, output)
            except BaseException as error:
                # The second number is taken: let the log pass over it.
                self._submit("skip", seq_id=first + 1)
                target.set_exception(error)
                return
            weighted = [_with_weights(d, w) for d, w in zip(data, weights, strict=True)]
            backward = self._forward_op(
                "forward_backward", weighted, "cross_entropy", None, "loss", first + 1
            )
            result = backward.then(
                lambda out: ForwardBackwardOutput(output.loss_fn_outputs, out.metrics | metrics)
            )
            forward_result(result.future, target)

        def hand_to_pool(done: Future[ForwardBackwardOutput]) -> None:
            _custom_loss_pool.submit(differentiate, done)

        forward.future.add_done_callback(hand_to_pool)
        return Op(target)

    def optim_step(self, adam_params: AdamParams | None = None) -> Op[OptimStepResponse]:
        """Consume the accumulated gradient in one Adam step; the run's version goes up by one.

        Once a live sampling client exists, the new version is published with every step: when
        this op is done, live clients sample from it.
        """
        params = AdamParams() if adam_params is None else adam_params
        if not isinstance(params, AdamParams):
            raise InvalidInput(f"adam_params must be AdamParams, got {type(params).__name__}")
        return self._submit("optim_step", adam_params=params)

    def set_share(self, share: float) -> Op[None]:
        """How much of the learner this run gets for another's 1 (what a run begins with), while
        both want it: tokens computed are shared in this proportion.

        Raises:
            InvalidInput: `share` is not a positive number.
        """
        valid = isinstance(share, int | float) and not isinstance(share, bool)
        if not valid or not 0 < share < float("inf"):
            raise InvalidInput(f"share must be a positive number, got {share!r}")
        check_number("share", share)
        return self._submit("set_share", share=float(share))

    def save_state(
        self,
        name: str,
        *,
        user_metadata: Mapping[str, Any] | None = None,
        overwrite: bool = False,
        ttl_seconds: int | None = None,
    ) -> Op[SaveResponse]:
        """Save weights and optimizer under `tinker://<run>/weights/<name>`; immutable.

        `user_metadata` (JSON values) is kept in the checkpoint's manifest; after `ttl_seconds`
        the checkpoint is deleted.
        """
        return self._save("save_state", name, user_metadata, overwrite, ttl_seconds)

    def _save(
        self,
        kind: str,
        name: str,
        user_metadata: Mapping[str, Any] | None,
        overwrite: bool,
        ttl_seconds: int | None,
    ) -> Op[SaveResponse]:
        check_text("name", name)
        check_flag("overwrite", overwrite)
        return self._submit(
            kind,
            name=name,
            user_metadata=_json_values(user_metadata),
            overwrite=overwrite,
            ttl_seconds=check_ttl(ttl_seconds),
        )

    def load_state(self, path: str) -> Op[SaveResponse]:
        """Replace this run's weights by a checkpoint's; the optimizer starts afresh."""
        check_text("path", path)
        return self._submit("load_state", path=path, optimizer=False)

    def load_state_with_optimizer(self, path: str) -> Op[SaveResponse]:
        """Replace this run's weights and optimizer state by a checkpoint's."""
        check_text("path", path)
        return self._submit("load_state", path=path, optimizer=True)

    def save_weights_for_sampler(
        self,
        name: str,
        *,
        user_metadata: Mapping[str, Any] | None = None,
        overwrite: bool = False,
        ttl_seconds: int | None = None,
    ) -> Op[SaveResponse]:
        """Save a PEFT adapter under `tinker://<run>/sampler_weights/<name>`; immutable."""
        return self._save("save_weights_for_sampler", name, user_metadata, overwrite, ttl_seconds)

    def save_weights_and_get_sampling_client(self) -> Op[SamplingClient]:
        """Publish the weights as they are at this point of the log, in memory, and return a client
        pinned to that version."""
        published = self._submit("publish", keep=True, every_step=False)
        grants = self._sampler_grant(published)
        return Op(grants).then(lambda grant: SamplingClient(completed(grant)))

    def live_sampling_client(self) -> SamplingClient:
        """A client that always samples from the newest published version, also for the rest of a
        request under way. From here on every `optim_step` publishes."""
        published = self._submit("publish", keep=False, every_step=True)
        return SamplingClient(self._sampler_grant(published, live=True))

    def _sampler_grant(
        self, published: Op[PublishResponse], live: bool = False
    ) -> Future[SamplerGrant]:
        def ask(response: PublishResponse) -> Future[SamplerGrant]:
            policy = PolicyRef(self.run_id, None if live else response.version)
            return self._controller.call("grant_sampler", self.base_model, policy)

        return chain(published.future, ask)

    def get_info(self) -> Op[TrainingInfo]:
        """The run's facts at this point of its log."""
        return self._submit("get_info")

    def get_tokenizer(self) -> Any:
        """The base model's Hugging Face tokenizer."""
        return load_tokenizer(self._grant.model_path)


_custom_loss_pool = ThreadPoolExecutor(4, thread_name_prefix="tinsmith-custom-loss")


def _check_datums(data: Sequence[Datum]) -> None:
    if not isinstance(data, Sequence):
        raise InvalidInput(f"data must be a list of Datum, got a {type(data).__name__}")
    for index, datum in enumerate(data):
        if not isinstance(datum, Datum):
            raise InvalidInput(f"data[{index}] is a {type(datum).__name__}, not a Datum")


def _loss_config(config: Mapping[str, float] | None) -> dict[str, float]:
    if config is None:
        return {}
    if not isinstance(config, Mapping):
        raise InvalidInput(f"loss_fn_config must map names to numbers, got {config!r}")
    for name, value in config.items():
        check_text("a name in loss_fn_config", name)
        check_number(f"loss_fn_config[{name!r}]", value)
    return dict(config)


def _json_values(user_metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    if user_metadata is None:
        return {}
    if not isinstance(user_metadata, Mapping):
        raise InvalidInput(f"user_metadata must map names to JSON values, got {user_metadata!r}")
    try:
        # As it is written and read back: no NaN, no half of a surrogate pair, no number beyond 64 bits.
        text = json.dumps(dict(user_metadata), allow_nan=False)
        return msgspec.json.decode(text, type=dict[str, Any])
    except (TypeError, ValueError, RecursionError, msgspec.MsgspecError) as error:
        raise InvalidInput(f"user_metadata must hold JSON values: {error}") from None


def _with_weights(datum: Datum, weights: np.ndarray | None) -> Datum:
    targets = datum.loss_fn_inputs.get("target_tokens")
    if targets is None:
        raise InvalidInput("forward_backward_custom: every datum needs target_tokens")
    if weights is None:
        weights = np.zeros(targets.shape, np.float32)
    inputs = {"target_tokens": targets, "weights": weights}
    if ROUTED_EXPERTS in datum.loss_fn_inputs:
        inputs[ROUTED_EXPERTS] = datum.loss_fn_inputs[ROUTED_EXPERTS]
    return Datum(datum.model_input, inputs)


def _custom_weights(
    data: Sequence[Datum], loss_fn: CustomLoss, output: ForwardBackwardOutput
) -> tuple[list[np.ndarray], dict[str, float]]:
    import torch

    logprobs = [
        torch.tensor(out["logprobs"], dtype=torch.float32, requires_grad=True)
        for out in output.loss_fn_outputs
    ]
    loss, metrics = loss_fn(data, logprobs)
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        raise InvalidInput("a custom loss must return (scalar tensor, metrics)")
    if not loss.requires_grad:
        raise InvalidInput("the custom loss does not depend on the logprobs; is it detached?")
    grads = torch.autograd.grad(loss, logprobs, allow_unused=True)
    weights = [
        np.zeros(p.shape, np.float32) if g is None else (-g).numpy()
        for p, g in zip(logprobs, grads, strict=True)
    ]
    return weights, {**metrics, "custom_loss:sum": float(loss.detach())}


class EnvClient(HasSync):
    """A pool of environment workers. Episodes go to the worker with the fewest under way.

    `ask` has the controller give the workers, started anew if they went with a controller that died:
    what they played is then played again.
    """

    def __init__(
        self,
        pool: str,
        workers: list[Handle],
        controller: Handle,
        ask: Callable[[], Future[list[Handle]]],
    ) -> None:
        def still_wanted(_: list[Handle]) -> Future[list[Handle]]:
            return failed(NotFound("the workers were ended")) if self._closed else ask()

        self._pool = pool
        self._controller = controller
        self._closed = False
        self._way = Resending(workers, lambda held: held, still_wanted, controller)
        self._running = [0] * len(workers)
        self._lock = threading.Lock()

    @property
    def _workers(self) -> list[Handle]:
        return self._way.grant

    def run_episode(self, spec: Any) -> Op[Trajectory]:
        """Play one episode (`envs.EpisodeSpec`) to its end; `cancel()` ends it before.

        Raises:
            EnvironmentFailure: the environment raised, hung, died or used too much memory.
            Unavailable: the worker process died, and is restarted; or this client was closed.
        """
        return self._play("run_episode", spec)

    def play_match(self, spec: Any) -> Op[Match]:
        """Play one match (`envs.MatchSpec`) to its end; `cancel()` ends it before. Raises as
        `run_episode`."""
        return self._play("play_match", spec)

    def _play(self, method: str, spec: Any) -> Op[Any]:
        with self._lock:
            index = int(np.argmin(self._running))
            self._running[index] += 1
        name = uuid.uuid4().hex
        future: Future[Any] = self._way.send(
            lambda workers: workers[index].call(method, name, spec), "an episode"
        )

        def leave(_: Future[Any]) -> None:
            with self._lock:
                self._running[index] -= 1

        future.add_done_callback(leave)
        return Op(future, withdraw=lambda: self._workers[index].call("withdraw", name))

    def close(self) -> Op[None]:
        """End the workers and whatever they play."""
        self._closed = True
        return Op(self._controller.call("end_env_workers", self._pool))

    async def __aenter__(self) -> EnvClient:
        return self

    async def __aexit__(self, *exc: object) -> None:
        with suppress(Unavailable):  # they went with the service
            await self.close()


class ServiceClient(HasSync):
    """The way in, made by `tinsmith.connect()`. `home` is where the service keeps its files,
    `controller` what this client and other front doors (the gateway) call, and `owns_cluster`
    whether closing it ends the cluster."""

    def __init__(
        self,
        controller: Handle,
        home: str,
        on_close: Callable[[], None] | None = None,
        owns_cluster: bool = False,
    ) -> None:
        self.home = home
        self.owns_cluster = owns_cluster
        self.controller = controller
        self._on_close = on_close

    def get_server_capabilities(self) -> Op[ServerCapabilities]:
        """Models at hand, their context lengths, and the losses."""
        return Op(self.controller.call("capabilities"))

    def create_lora_training_client(
        self,
        base_model: str,
        rank: int = 32,
        seed: int | None = None,
        *,
        alpha: float = 32.0,
        train_attn: bool = True,
        train_mlp: bool = True,
        train_unembed: bool = True,
        train_router: bool = False,
        experts: ExpertAdapters = "each",
        user_metadata: Mapping[str, Any] | None = None,
    ) -> Op[TrainingClient]:
        """Start a training run on `base_model`: a local folder, a model's short name or a Hugging
        Face id.

        Raises:
            InvalidInput: a rank below 1, an unsupported model family.
            NotFound: no such model.
        """
        check_text("base_model", base_model)
        lora = LoraConfig(
            rank, alpha, seed, train_attn, train_mlp, train_unembed, train_router, experts
        )
        return self._create(base_model, lora, None, False, user_metadata)

    def create_training_client_from_state(
        self, path: str, *, user_metadata: Mapping[str, Any] | None = None
    ) -> Op[TrainingClient]:
        """Start a new run from a checkpoint's weights, with a fresh optimizer."""
        return self._create(None, None, path, False, user_metadata)

    def create_training_client_from_state_with_optimizer(
        self, path: str, *, user_metadata: Mapping[str, Any] | None = None
    ) -> Op[TrainingClient]:
        """Start a new run from a checkpoint's weights and optimizer state."""
        return self._create(None, None, path, True, user_metadata)

    def resume_training_client(self, run_id: str, *, path: str | None = None) -> Op[TrainingClient]:
        """Go on with a run where its log ends, whatever became of the learner or the whole service
        meanwhile. A run that was closed goes on from its newest `weights` checkpoint, optimizer
        included.

        Args:
            path: go on from this checkpoint instead; what the run did after it is forgotten.

        Raises:
            CorruptLog: the log is damaged; with `path` the run can go on.
            NotFound: no such run, or it was closed and has no checkpoint.
        """
        check_text("run_id", run_id)
        if path is not None:
            check_text("path", path)
        return self._training("resume_run", run_id, path)

    def _create(
        self,
        base_model: str | None,
        lora: LoraConfig | None,
        path: str | None,
        optimizer: bool,
        user_metadata: Mapping[str, Any] | None,
    ) -> Op[TrainingClient]:
        for name, text in (("base_model", base_model), ("path", path)):
            if text is not None:
                check_text(name, text)
        run_id, creation = uuid.uuid4().hex[:12], uuid.uuid4().hex
        how = (base_model, lora, path, optimizer, _json_values(user_metadata))
        return self._training("create_run", run_id, *how, creation)

    def _training(self, method: str, *args: Any) -> Op[TrainingClient]:
        grant: Op[RunGrant] = Op(self.controller.call(method, *args))
        return grant.then(lambda g: TrainingClient(g, self.controller))

    def create_sampling_client(
        self, model_path: str | None = None, base_model: str | None = None
    ) -> Op[SamplingClient]:
        """A client for a saved checkpoint (`tinker://…`) or for a bare base model."""
        if (model_path is None) == (base_model is None):
            raise InvalidInput("give exactly one of model_path and base_model")
        for name, text in (("model_path", model_path), ("base_model", base_model)):
            if text is not None:
                check_text(name, text)
        if model_path is not None:
            future = self.controller.call("grant_checkpoint_sampler", model_path)
        else:
            future = self.controller.call("grant_sampler", base_model, PolicyRef())
        return Op(future).then(lambda grant: SamplingClient(completed(grant)))

    def create_env_client(
        self, base_model: str, num_workers: int = 1, max_concurrent: int = 64
    ) -> Op[EnvClient]:
        """Environment workers that render and tokenize for `base_model`; each plays up to
        `max_concurrent` episodes at once, every environment in a process of its own."""
        check_text("base_model", base_model)
        counts = (
            ("num_workers", num_workers, MAX_WORKERS),
            ("max_concurrent", max_concurrent, MAX_EPISODES),
        )
        for name, count, most in counts:
            check_integer(name, count)
            if not 1 <= count <= most:
                raise InvalidInput(f"{name} must be at least 1 and at most {most:,}, got {count}")
        pool = uuid.uuid4().hex

        def ask() -> Future[list[Handle]]:
            how = (base_model, num_workers, max_concurrent)
            return self.controller.call("env_workers", pool, *how)

        return Op(ask()).then(lambda workers: EnvClient(pool, workers, self.controller, ask))

    def metrics(self) -> Op[str]:
        """What all processes of the service count and measure, in Prometheus's text format
        (`docs/observability.md` says what each means)."""
        return Op(self.controller.call("metrics")).then(metrics_text)

    def list_training_runs(self) -> Op[list[TrainingRun]]:
        """All runs, newest first."""
        return Op(self.controller.call("list_runs"))

    def get_training_run(self, run_id: str) -> Op[TrainingRun]:
        check_text("run_id", run_id)
        return Op(self.controller.call("get_run", run_id))

    def delete_training_run(self, run_id: str) -> Op[None]:
        """Forget a run: its memory, its checkpoints and its files."""
        check_text("run_id", run_id)
        return Op(self.controller.call("delete_run", run_id))

    def close_training_run(self, run_id: str) -> Op[None]:
        """Free a run's memory and its log. Its checkpoints stay, and `resume_training_client` opens it
        again; what was not saved is lost, operations still waiting fail.

        Raises:
            NotFound: no such run.
        """
        check_text("run_id", run_id)
        return Op(self.controller.call("close_run", run_id))

    def unload_model(self, base_model: str) -> Op[bool]:
        """Free a base model's memory; the next use, or a sample under way, loads it again.
        False, and nothing happens, while it has open runs (`close_training_run`)."""
        check_text("base_model", base_model)
        return Op(self.controller.call("unload", base_model))

    def list_checkpoints(self, run_id: str | None = None) -> Op[list[Checkpoint]]:
        """Checkpoints of one run or of all, newest first."""
        if run_id is not None:
            check_text("run_id", run_id)
        return Op(self.controller.call("list_checkpoints", run_id))

    def delete_checkpoint(self, path: str) -> Op[None]:
        """Delete a checkpoint; who samples from it is told that it is gone."""
        check_text("path", path)
        return Op(self.controller.call("delete_checkpoint", path))

    def set_checkpoint_ttl(self, path: str, ttl_seconds: int | None) -> Op[None]:
        """Have a checkpoint deleted `ttl_seconds` from now; None keeps it."""
        check_text("path", path)
        return Op(self.controller.call("set_checkpoint_ttl", path, check_ttl(ttl_seconds)))

    def publish_checkpoint(self, path: str, public: bool = True) -> Op[None]:
        """Let all users of a gateway with keys read a checkpoint, or no longer."""
        check_text("path", path)
        check_flag("public", public)
        return Op(self.controller.call("publish_checkpoint", path, public))

    def copy_checkpoint(self, path: str, run_id: str) -> Op[str]:
        """Copy a checkpoint's files to another run, under the same name; returns the new path.

        Raises:
            InvalidInput: the run has a checkpoint of that name, or another base model or LoRA.
            NotFound: no such checkpoint or run.
        """
        check_text("path", path)
        check_text("run_id", run_id)
        return Op(self.controller.call("copy_checkpoint", path, run_id))

    def close(self) -> None:
        """Leave the service, stopping it if `connect()` started it. Runs that are open can be
        resumed when it is started again with the same home."""
        if self._on_close is not None:
            self._on_close()
            self._on_close = None

    async def __aenter__(self) -> ServiceClient:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await asyncio.to_thread(self.close)
