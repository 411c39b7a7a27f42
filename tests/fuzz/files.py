"""Checkpoints and logs that were damaged on disk, read by the learner, in one thread."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from tests.actors.simulated import Life, Published
from tests.data import policy_datum
from tests.fuzz.driver import Case, quiet, told
from tests.fuzz.odd import Rng, copy_folder, damage_folder, damaged, pick
from tests.tiny import make_tiny_model
from tinsmith.actors.archive import adapter_archive, adapter_files
from tinsmith.actors.wal import Log
from tinsmith.engines.adapter_files import read_factors
from tinsmith.primitives.errors import TinsmithError
from tinsmith.primitives.types import AdamParams, LoraConfig

LORA = LoraConfig(rank=1, seed=1, train_unembed=False)
STEPS = 6


@contextlib.contextmanager
def living() -> Iterator[tuple[Life, Path, str]]:
    """A service in this thread, its home and the model's folder."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    model = make_tiny_model(folder / "model", "llama")
    (folder / "home").mkdir()
    small = mock.patch.dict(Log.__init__.__kwdefaults__, segment_bytes=1500)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with quiet(), small:
            life = Life(folder / "home", model, Published(), 1e9)
            try:
                yield life, folder, model
            finally:
                life.end()
    finally:
        torch.set_num_threads(before)
        shutil.rmtree(folder)


def trained(life: Life, model: str, run_id: str) -> list[dict[str, torch.Tensor]]:
    """Open a run and train it; its state before each operation and after the last."""
    life.run(life.controller.create_run(run_id, model, LORA, None, False, {}))
    states, rng = [life.learner.engine.state(run_id, True)], np.random.default_rng(0)
    for step in range(1, STEPS + 1):
        args: dict[str, Any] = dict(adam_params=AdamParams(learning_rate=1e-2))
        kind = "optim_step"
        if step % 2:
            kind, args = "forward_backward", dict(data=[policy_datum(rng, 6)], loss_fn="ppo")
        life.run(life.learner.submit(run_id, step, kind, args))
        states.append(life.learner.engine.state(run_id, True))
        if step in (2, 4):
            life.run(life.learner.park(run_id))
    return states


@contextlib.contextmanager
def checkpoints() -> Iterator[Case]:
    """Made a run of, loaded into one, merged, and sent as an archive."""
    with living() as (life, folder, model):
        trained(life, model, "good")
        save = life.learner.submit("good", STEPS + 1, "save_state", dict(name="saved"))
        path = life.run(save).path
        good = folder / "home/runs/good/weights/saved"
        storage, number = life.controller.storage, 0
        seq_id = STEPS + 1

        def case(rng: Rng) -> str:
            nonlocal number, seq_id
            number += 1
            bad = f"tinker://good/weights/bad-{number}"
            target = good.with_name(f"bad-{number}")
            copy_folder(good, target)
            if rng.random() < 0.3:
                _change_contents(rng, target)
            else:
                damage_folder(rng, target)
            what, run_id = rng.integers(0, 4), f"run-{number}"
            try:
                if what == 0:
                    optimizer = bool(rng.random() < 0.5)
                    created = (run_id, None, None, bad, optimizer, {})
                    life.run(life.controller.create_run(*created))
                    life.run(life.controller.close_run(run_id))
                elif what == 1:
                    seq_id += 1
                    load = dict(path=bad, optimizer=bool(rng.random() < 0.5))
                    life.run(life.learner.submit("good", seq_id, "load_state", load))
                elif what == 2:
                    read_factors(adapter_files(storage, bad))
                else:
                    for _ in adapter_archive(storage, bad):
                        pass
                return "done"
            except TinsmithError as error:
                return told(error)
            finally:
                shutil.rmtree(target)
                # It goes on as if nothing had happened.
                seq_id += 1
                load = dict(path=path, optimizer=True)
                life.run(life.learner.submit("good", seq_id, "load_state", load))

        yield case


def _change_contents(rng: Rng, folder: Path) -> None:
    """Whole files that say something else."""
    import json

    import safetensors.torch

    from tests.fuzz.odd import changed

    file = pick(rng, ["manifest.json", "adapter_config.json", "tensors", "optimizer"])
    if file.endswith(".json"):
        told = changed(rng, json.loads((folder / file).read_bytes()))
        (folder / file).write_text(json.dumps(told), errors="surrogatepass")
        return
    place = folder / ("adapter_model.safetensors" if file == "tensors" else "optimizer.safetensors")
    tensors = safetensors.torch.load(place.read_bytes())
    name = pick(rng, sorted(tensors))
    tensor = tensors.pop(name)
    what = rng.integers(0, 7)
    if what == 1:
        tensors[name] = tensor.reshape(-1)[:1].clone()
    elif what == 2:
        tensors[name] = tensor.to(
            pick(rng, [torch.int8, torch.float64, torch.bool, torch.bfloat16])
        )
    elif what == 3:
        tensors[name] = torch.full_like(tensor, pick(rng, [2**40, -1]))
    elif what == 4 and tensor.is_floating_point():
        tensors[name] = torch.full_like(tensor, float(pick(rng, ["nan", "inf"])))
    elif what == 5:
        tensors["other"] = tensor
    elif what == 6:
        tensors[name] = torch.empty(0)
    place.write_bytes(safetensors.torch.save(tensors))


@contextlib.contextmanager
def logs() -> Iterator[Case]:
    """Recovered: to a state that the run had, or refused."""
    with living() as (life, folder, model):
        states = trained(life, model, "good")
        good, number = folder / "good", 0
        copy_folder(folder / "home/runs/good/log", good)
        run = life.controller.registry.run("good")

        def case(rng: Rng) -> str:
            nonlocal number
            number += 1
            run_id = f"run-{number}"
            target = folder / f"home/runs/{run_id}/log"
            copy_folder(good, target)
            if rng.random() < 0.4:
                wal = pick(rng, sorted(target.glob("*.wal")))
                wal.write_bytes(damaged(rng, wal.read_bytes()))
            else:
                damage_folder(rng, target, links=False)
            from dataclasses import replace

            life.controller.registry.add_run(replace(run, run_id=run_id))
            try:
                grant = life.run(life.controller.reopen_run(run_id))
                state = life.learner.engine.state(run_id, True)
                wanted = states[grant.next_seq_id - 1]
                for name, tensor in state.items():
                    assert torch.equal(tensor, wanted[name]), (run_id, name, grant.next_seq_id)
                version = life.learner.engine.runs[run_id].version
                assert version == (grant.next_seq_id - 1) // 2, (version, grant)
                whole = grant.next_seq_id == STEPS + 1
                return "recovered" if whole else "recovered, cut"
            except TinsmithError as error:
                return told(error)
            finally:
                life.run(life.controller.delete_run(run_id))

        yield case
