"""Runs a function on rank 0 of a learner whose ranks are processes of this machine."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import cloudpickle
import torch
import torch.multiprocessing as multiprocessing

from tinsmith.engines.layout import Layout
from tinsmith.engines.ranks import Ranks, open_store
from tinsmith.engines.sharded_backbone import ShardedBackbone
from tinsmith.engines.sharded_pass import Leader, serve

HOST = "127.0.0.1"
PRELOADED = ["tests.engines.on_ranks", "tinsmith.engines.learner", "transformers.models.qwen3"]


def on_ranks(
    layout: str,
    paths: list[str],
    function: Any,
    folder: Path,
    around: Any = None,
    weights: str = "fp32",
) -> list[Any]:
    """`function(leader)` for each of these models in turn; or `around(serve)` as the last rank has it,
    meanwhile."""
    parsed, out = Layout.parse(layout), folder / "told.pt"
    multiprocessing.set_forkserver_preload(PRELOADED)  # imported once, for all that is to come
    ports = [open_store(HOST) for _ in paths]
    multiprocessing.start_processes(
        _rank,
        (
            parsed,
            paths,
            [store.port for store in ports],
            *map(_by_value, (function, around)),
            out,
            weights,
        ),
        nprocs=parsed.world,
        start_method="forkserver",
    )
    return torch.load(out, weights_only=False)


def _by_value(function: Any) -> bytes:
    """Test modules go by other names in the ranks, which start without pytest."""
    if function is not None:
        defined_in = getattr(function, "func", function).__module__
        cloudpickle.register_pickle_by_value(sys.modules[defined_in])
    return cloudpickle.dumps(function)


def _rank(
    rank: int,
    layout: Layout,
    paths: list[str],
    ports: list[int],
    pickled: bytes,
    pickled_around: bytes,
    out: Path,
    weights: Any,
) -> None:
    torch.set_num_threads(1)
    function, around = map(cloudpickle.loads, (pickled, pickled_around))
    told, teller = [], 0 if around is None else layout.world - 1
    for path, port in zip(paths, ports, strict=True):
        ranks = Ranks(layout, rank, open_store(HOST, port), "cpu")
        backbone = ShardedBackbone(path, weights, ranks)
        if rank == 0:
            leader = Leader(ranks, backbone)
            told.append(function(leader))
            leader.dismiss()
        elif rank == teller:
            told.append(around(partial(serve, ranks, backbone)))
        else:
            serve(ranks, backbone)
        ranks.leave()
    if rank == teller:
        torch.save(told, out)
