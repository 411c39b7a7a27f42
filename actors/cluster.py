"""`connect()`: start or join a Ray cluster, and find its controller."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

import psutil

from ..engines.base_weights import BaseWeights, check_base_weights
from ..engines.layout import Layout
from ..engines.vllm_start import EngineName, VllmOptions, chosen_engine
from ..primitives.client import ServiceClient
from ..primitives.errors import InvalidInput, StorageFailure, Unavailable
from ..primitives.op import Op
from ..primitives.paths import default_home
from ..primitives.sync import SyncClient, run_blocking
from .placement import Placement
from .scaling import Replicas
from .wal import REPLAY_SECONDS

NAMESPACE = "tinsmith"
_ADDRESS = re.compile(r"(ray://)?[^/\s]+:\d+")


class Connection:
    """What `connect()` returns: `await` it, enter it with `async with`, or take its `.sync`."""

    def __init__(self, address: str | None, home: str | Path | None, options: dict[str, Any]):
        self._address, self._options = address, options
        self._home = str(Path(home if home is not None else default_home()).expanduser().absolute())
        self._service: ServiceClient | None = None

    def __await__(self) -> Generator[Any, None, ServiceClient]:
        return self._connect().__await__()

    async def __aenter__(self) -> ServiceClient:
        return await self._connect()

    async def __aexit__(self, *exc: object) -> None:
        if self._service is not None:
            await asyncio.to_thread(self._service.close)

    @property
    def sync(self) -> SyncClient:
        return run_blocking(self._connect()).sync

    async def _connect(self) -> ServiceClient:
        if self._service is None:
            self._service = await asyncio.to_thread(
                _start, self._address, self._home, self._options
            )
        return self._service


def connect(
    address: str | None = None,
    *,
    home: str | Path | None = None,
    num_cpus: int | None = None,
    learner_threads: int | None = None,
    sampler_threads: int | None = None,
    kv_bytes: int | None = None,
    run_bytes: int | None = None,
    engine: EngineName = "auto",
    vllm: VllmOptions | None = None,
    learners: int = 1,
    base_weights: BaseWeights = "auto",
    reorder_sampler_weights: bool = False,
    layout: str | None = None,
    samplers: int | Replicas = 1,
    placement: Placement | None = None,
    replay_seconds: float = REPLAY_SECONDS,
    trace_file: str | Path | None = None,
    verbose: bool = False,
) -> Connection:
    """Open the service: `service = await tinsmith.connect()`.

    Args:
        address: None starts a cluster on this machine, which ends with `service.close()` or this
            process; "auto" joins one that runs here, "host:port" the one with that head, and
            "ray://host:port" one elsewhere.
        home: where runs, checkpoints and models are kept (default: `$TINSMITH_HOME`, else
            `~/.tinsmith`).
        num_cpus: CPUs of a cluster started here (default: all).
        learner_threads, sampler_threads: torch threads of the two engines (default: all CPUs).
        kv_bytes: memory for a sampler's key/value cache (default: a quarter of what is free).
        run_bytes: memory for the parameters, gradients and optimizers of a learner's runs (default: a
            third of what is free once the base model is loaded). Idle runs beyond it wait on disk.
        engine: what samples: `vllm`, `torch`, or `auto`: vLLM if it is installed and there is a
            GPU. (A cluster that runs already keeps its own.)
        vllm: how vLLM is started.
        learners: how many compute the batches of a base model's runs, each a part of them.
        base_weights: what learners and torch samplers keep the frozen weights in: `fp32`, `bf16`,
            quantised to `int8` or `nf4` (QLoRA), or `auto`: on a GPU bf16 for a model stored in it,
            else fp32.
        reorder_sampler_weights: torch samplers keep a second copy of fp32 weights, in the order that a
            CPU's products are quickest with, where they otherwise share the learner's.
        layout: over how many ranks each base model's learner is cut, and how: "shard=2,tensor=2" (see
            `docs/sharding.md`), or "auto" for what the model and the cluster's GPUs ask for (None: one
            rank).
        samplers: how many a base model has: a number, or `Replicas` for as many as it takes.
        placement: what learners, samplers and environment workers reserve of the cluster
            (default: GPUs, where there are any).
        replay_seconds: how long doing operations again may take when a learner died. Lower: snapshots
            of the runs are taken more often.
        trace_file: append spans of every operation to this file, a JSON object per line, from all
            processes (default: `$TINSMITH_TRACE_FILE`, if any; see `docs/observability.md`).
        verbose: show the actors' own output.

    Raises:
        InvalidInput: a setting is not one of its values, or two do not go together.
        StorageFailure: `home` cannot be written.
        Unavailable: no cluster answers at `address`; vLLM, a quantised base, or traces are asked
            for and what they need is not installed.
    """
    if address is not None and address != "auto" and not _ADDRESS.fullmatch(address):
        raise InvalidInput(
            f'address must be None, "auto", "host:port" or "ray://host:port", got {address!r}'
        )
    if not isinstance(learners, int) or isinstance(learners, bool) or learners < 1:
        raise InvalidInput(f"learners must be an integer of at least 1, got {learners!r}")
    seconds = isinstance(replay_seconds, int | float) and not isinstance(replay_seconds, bool)
    if not seconds or not 0 < replay_seconds < float("inf"):
        raise InvalidInput(f"replay_seconds must be a positive number, got {replay_seconds!r}")
    check_base_weights(base_weights)
    ranks = layout if layout is None or layout == "auto" else Layout.parse(layout)
    if ranks is not None and learners > 1:
        raise InvalidInput(
            f"learners={learners} and layout={layout!r} do not go together: say data={learners} in "
            "the layout"
        )
    options = dict(
        num_cpus=num_cpus,
        verbose=verbose,
        trace_file=None if trace_file is None else str(Path(trace_file).expanduser().absolute()),
        actor=dict(
            learner_threads=learner_threads,
            sampler_threads=sampler_threads,
            kv_bytes=kv_bytes,
            run_bytes=run_bytes,
            learners=learners,
            vllm=chosen_engine(engine, vllm, base_weights),
            base_weights=base_weights,
            reorder_sampler_weights=reorder_sampler_weights,
            layout=ranks,
            replicas=Replicas.of(samplers),
            placement=placement,
            replay_seconds=float(replay_seconds),
        ),
    )
    return Connection(address, home, options)


def _start(address: str | None, home: str, options: dict[str, Any]) -> ServiceClient:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    from . import telemetry
    from .controller import ON_THE_HEAD, Controller
    from .handle import RayHandle, leave_cluster

    if address is None:
        _check_home(home)
    told = telemetry.passed_on(options["trace_file"])
    telemetry.trace("client", told.get(telemetry.TRACE_FILE))
    ours = not ray.is_initialized()
    if ours:
        _join_ray(address, options)
    local = ours and address is None
    actor = (
        ray.remote(Controller)
        .options(
            name="controller",
            namespace=NAMESPACE,
            get_if_exists=True,
            lifetime=None if local else "detached",
            num_cpus=0,
            resources=ON_THE_HEAD,
            # One that dies comes back under the same handle; calls to it wait, and are made again.
            max_restarts=-1,
            max_task_retries=-1,
            runtime_env={"env_vars": told} if told else None,  # and of all that it starts
        )
        .remote(home, **options["actor"])
    )
    handle = RayHandle(actor, "controller")

    def close() -> None:
        if ours:
            leave_cluster()

    try:
        running_home = Op(handle.call("ping")).result()
        if running_home != home:
            raise Unavailable(
                f"a service with home {running_home!r} runs in this cluster already; "
                f"connect with that home, or close it first (asked for {home!r})"
            )
    except BaseException:
        close()
        raise
    return ServiceClient(handle, home, close, owns_cluster=local)


def _check_home(home: str) -> None:
    """
    Raises:
        StorageFailure: nothing can be written there.
    """
    try:
        Path(home).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=home) as file:
            file.write(b"room")
    except OSError as error:
        raise StorageFailure(
            f"the home {home} cannot be written: {error}. Give another one (home=..., --home, "
            "TINSMITH_HOME), or make room"
        ) from error


def _join_ray(address: str | None, options: dict[str, Any]) -> None:
    import ray

    _let_ray_speak_on_stderr()
    common = dict(namespace=NAMESPACE, log_to_driver=options["verbose"], logging_level="ERROR")
    try:
        if address is None:
            _start_ray(options["num_cpus"] or os.cpu_count(), common)
        else:
            ray.init(address=address, **common)
    except ValueError as error:  # ray:// without Ray's client installed, for instance
        raise Unavailable(f"cannot join a Ray cluster at {address!r}: {error}") from error
    except ConnectionError as error:
        raise Unavailable(f"no Ray cluster answers at {address!r}: {error}") from error


def _let_ray_speak_on_stderr() -> None:
    """Of its nodes' warnings, for instance: stdout is the script's, and of commands with `--json`. Ray has
    no setting for it."""
    from ray._private import worker

    speak = getattr(worker, "print_to_stdstream", None)
    if speak is not None and speak.__name__ != "on_stderr":

        def on_stderr(data: dict[str, Any], *args: Any, **kwargs: Any) -> None:
            speak({**data, "is_err": True}, *args, **kwargs)

        worker.print_to_stdstream = on_stderr


def _start_ray(num_cpus: int | None, common: dict[str, Any]) -> None:
    """Ray gives its own processes 30 s to start, which a busy machine may need more than."""
    import ray

    there = set(psutil.Process().children(recursive=True))
    for _ in range(2):
        try:
            ray.init(
                num_cpus=num_cpus,
                include_dashboard=False,
                address="local",
                # Its head would keep the last 100,000 calls for the dashboard: 200 MB.
                _system_config={"task_events_report_interval_ms": 0},
                **common,
            )
            return
        except Exception as error:  # Ray has no type of its own for it
            if "timed out during startup" not in str(error):
                raise
            for child in set(psutil.Process().children(recursive=True)) - there:
                with contextlib.suppress(psutil.NoSuchProcess):
                    if child.name() in ("raylet", "gcs_server"):  # the rest ends with these
                        child.kill()
    raise Unavailable("Ray did not start in 30 s, tried twice: is this machine overloaded?")
