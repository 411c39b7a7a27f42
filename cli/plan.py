"""`tinsmith plan`: how a model would be laid out over GPUs, and what each would hold."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any, Literal

import typer

from .options import AsJson, Home, print_json, print_table

GB = 1e9


def plan(
    home: Home,
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A folder, name or hub id; some large models need no files."
        ),
    ],
    gpus: Annotated[list[int], typer.Option(min=1, help="GPUs of the learner; repeat for more.")],
    memory: Annotated[float, typer.Option(help="Of each, in GB.")] = 80,
    layout: Annotated[
        str, typer.Option(help='"auto", or degrees as in "data=2,shard=4,tensor=2".')
    ] = "auto",
    rank: Annotated[int, typer.Option(min=1, help="Of a run's adapter.")] = 32,
    context: Annotated[int, typer.Option(min=1, help="Tokens of the longest sequence.")] = 2048,
    weights: Annotated[
        Literal["fp32", "bf16"], typer.Option(help="What the frozen weights are kept in.")
    ] = "bf16",
    experts: Annotated[
        Literal["each", "shared"],
        typer.Option(help="A mixture's adapters: of each expert, or shared by a layer's."),
    ] = "each",
    as_json: AsJson = False,
) -> None:
    """Print a layout of the learner's ranks, and the memory of each, without loading the model."""
    from transformers import AutoConfig

    from ..engines.layout import Layout
    from ..engines.models import resolve_model
    from ..engines.plan import Demand, Planner
    from ..engines.published import published_config
    from ..primitives.errors import InvalidInput

    config = published_config(model)
    if config is None:
        config = AutoConfig.from_pretrained(resolve_model(model, home))
    planner = Planner(config, Demand(rank, context, weights, experts), int(memory * GB))
    estimates = []
    for count in gpus:
        if layout == "auto":
            estimates.append(planner.choose(count))
            continue
        wanted = Layout.parse(layout)
        if wanted.world != count:
            raise InvalidInput(f"layout {wanted} is for {wanted.world} GPUs, not {count}")
        estimates.append(planner.estimate(wanted))
    if as_json:
        for count, estimate in zip(gpus, estimates, strict=True):
            told: dict[str, Any] = {**asdict(estimate), "layout": str(estimate.layout)}
            print_json({"gpus": count, **told, "total": estimate.total, "fits": estimate.fits})
        return
    title = (
        f"{model}: {planner.sizes.total / GB:.3g} B parameters in {weights}, an adapter of rank "
        f"{rank} ({planner.adapter.size / 1e6:.4g} M), sequences of {context} tokens; "
        f"GB of the fullest of its ranks, of {memory:g}"
    )
    columns = ["GPUs", "layout", "weights", "gathered", "adapter", "pass", "logits", "all", ""]
    rows = []
    for count, e in zip(gpus, estimates, strict=True):
        parts = (e.weights, e.gathered, e.adapters, e.activations, e.logits, e.total)
        how = "fits, checkpointed" if e.checkpointing else "fits"
        rows.append(
            [
                str(count),
                str(e.layout),
                *(f"{part / GB:.1f}" for part in parts),
                how if e.fits else "does not fit",
            ]
        )
    print_table(title, columns, rows)
    for count, estimate in zip(gpus, estimates, strict=True):
        if not estimate.fits:
            gpu = "GPU does" if count == 1 else "GPUs do"
            typer.echo(f"{count} {gpu} not do: {planner.remedy(count)}")
