"""`tinsmith serve`: the Tinker API, and OpenAI's, over HTTP."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any

import typer

from ..actors.wal import REPLAY_SECONDS
from ..primitives.errors import Unavailable
from .options import (
    Address,
    BaseWeights,
    Engine,
    Home,
    Layout,
    Learners,
    ReorderSamplerWeights,
    Samplers,
)
from .supervise import supervise


def serve(
    home: Home,
    model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]MODEL",
            help="A base model to serve, by folder, short name or hub id, under its own name or "
            "another; repeat for more.",
            show_default="all in the models folder, and what clients name",
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            help="Keys that requests must carry; `tinsmith keys add` makes it.",
            show_default="none: this machine alone can connect",
        ),
    ] = None,
    address: Address = None,
    session_timeout: Annotated[
        float, typer.Option(help="Seconds without a heartbeat after which a client is let go.")
    ] = 120.0,
    idle_unload: Annotated[
        float, typer.Option(help="Seconds without use after which a base model is unloaded.")
    ] = 1800.0,
    learner_threads: Annotated[
        int | None, typer.Option(help="Threads of a learner.", show_default="all CPUs")
    ] = None,
    sampler_threads: Annotated[
        int | None, typer.Option(help="Threads of a sampler.", show_default="all CPUs")
    ] = None,
    engine: Engine = "auto",
    learners: Learners = 1,
    layout: Layout = None,
    base_weights: BaseWeights = "auto",
    reorder_sampler_weights: ReorderSamplerWeights = False,
    samplers: Samplers = 1,
    replay_seconds: Annotated[
        float,
        typer.Option(
            help="Seconds that doing a run's operations again may take when a learner died."
        ),
    ] = REPLAY_SECONDS,
    trace_file: Annotated[
        Path | None,
        typer.Option(
            help="Append spans of every operation to this file, a JSON object per line.",
            show_default="$TINSMITH_TRACE_FILE, if any",
        ),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show the actors' output.")] = False,
) -> None:
    """Serve clients of the Tinker API and of OpenAI's until interrupted, then finish what is
    under way. A server that dies is started again."""
    try:
        from ..gateway.access import Access
        from ..gateway.keys import KeyFile
        from ..gateway.served_models import parse_served
        from ..gateway.server import check_host
        from ..gateway.settings import Settings
    except ImportError as error:
        raise Unavailable(
            f"serving needs more packages ({error}): pip install 'tinsmith[gateway]'"
        ) from None
    from ..engines.models import resolve_model

    access = Access(None if api_key_file is None else KeyFile(api_key_file))
    check_host(host, access)
    served = parse_served(model or [])
    for target in served.values():
        resolve_model(target, home, say)
    settings = Settings(models=served, session_timeout_s=session_timeout, idle_unload_s=idle_unload)
    cluster = dict(
        address=address,
        home=home,
        learner_threads=learner_threads,
        sampler_threads=sampler_threads,
        engine=engine,
        learners=learners,
        layout=layout,
        base_weights=base_weights,
        reorder_sampler_weights=reorder_sampler_weights,
        samplers=samplers,
        replay_seconds=replay_seconds,
        trace_file=trace_file,
        verbose=verbose,
    )
    status = supervise(_server, (cluster, settings, access, host, port), say)
    if status:
        raise typer.Exit(status if status > 0 else 128 - status)
    say("stopped")


def _server(cluster: dict[str, Any], settings: Any, access: Any, host: str, port: int) -> None:
    from ..actors import telemetry
    from ..actors.cluster import connect
    from ..gateway.server import serve as serve_http

    telemetry.set_up("gateway", cluster["trace_file"])

    async def run() -> None:
        say("starting")
        async with connect(**cluster) as service:
            await serve_http(service, settings, access, host, port, say)

    asyncio.run(run())


def say(text: str) -> None:
    typer.echo(f"tinsmith: {text}", err=True)
