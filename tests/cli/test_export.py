from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.actors.script import run_script
from tests.actors.test_training import same_weights_logprobs
from tests.data import text_datum
from tinsmith.primitives.op import Op
from tinsmith.primitives.types import LoraConfig

RUN_ID = "5d0c7b1e-3f1a-4a55-9d0e-6a4b7c1f2e90:train:0"


@pytest.fixture(scope="module")
async def exported(service, tmp_path_factory):
    """A trained run, as the gateway names them, with its two checkpoints of the same weights."""
    create = Op(
        service.controller.call(
            "create_run", RUN_ID, "tiny-llama", LoraConfig(rank=4, seed=0), None, False, {}
        )
    )
    await create
    training = await service.resume_training_client(RUN_ID)
    training.forward_backward([text_datum(np.random.default_rng(0), 40)])
    await training.optim_step()
    saved = [
        (await training.save_state("full")).path,
        (await training.save_weights_for_sampler("newest")).path,
    ]
    yield saved, await same_weights_logprobs(training)
    await service.delete_training_run(RUN_ID)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def logprobs(model) -> list[np.ndarray]:
    """As `same_weights_logprobs`."""
    found = []
    for i in range(2):
        datum = text_datum(np.random.default_rng(100 + i), 40)
        with torch.no_grad():
            logits = model(torch.from_numpy(datum.model_input.tokens)[None]).logits[0]
        targets = torch.from_numpy(datum.loss_fn_inputs["target_tokens"])
        found.append(logits.log_softmax(-1).gather(1, targets[:, None])[:, 0].numpy())
    return found


def from_peft(home: Path, folder: Path) -> list[np.ndarray]:
    base = AutoModelForCausalLM.from_pretrained(home / "models" / "tiny-llama")
    return logprobs(peft.PeftModel.from_pretrained(base, folder))


def test_an_archive_is_named_after_the_checkpoint_and_loads_in_peft(
    exported, command, tiny_home, here
):
    (full, newest), expected = exported
    result = command("export", full, "--json")
    assert result.exit_code == 0, result.output
    out = Path(json.loads(result.stdout)["out"])
    assert out == here / f"{RUN_ID.replace(':', '-')}-full.tar.gz"
    assert json.loads(result.stdout)["base_model"] == "tiny-llama"
    with tarfile.open(out) as tar:
        assert tar.getnames() == ["adapter_config.json", "adapter_model.safetensors"]
        tar.extractall(here / "unpacked", filter="data")
    np.testing.assert_allclose(from_peft(tiny_home, here / "unpacked"), expected, atol=1e-4)

    # A run's id means its newest checkpoint; the same weights are the same bytes.
    assert command("export", RUN_ID, "-o", "run.tar.gz").exit_code == 0
    assert newest in command("export", RUN_ID, "-o", "again.tar.gz").stdout
    assert (here / "run.tar.gz").read_bytes() == out.read_bytes()
    assert sorted(p.name for p in here.iterdir() if p.name.startswith(".")) == []


def test_a_folder_is_written_unpacked(exported, command, tiny_home, here):
    (full, _), expected = exported
    result = command("export", full, "--out", "some/folder")
    assert result.exit_code == 0, result.output
    folder = here / "some" / "folder"
    assert sorted(p.name for p in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    np.testing.assert_allclose(from_peft(tiny_home, folder), expected, atol=1e-4)


async def test_a_merged_model_loads_in_transformers_and_as_a_base_model(
    service, exported, command, tiny_home, here
):
    (_, newest), expected = exported
    result = command("export", newest, "--merge", "-o", "merged")
    assert result.exit_code == 0, result.output
    assert f"tiny-llama with {newest} merged in to {here / 'merged'}" in result.stdout
    model = AutoModelForCausalLM.from_pretrained(here / "merged")
    np.testing.assert_allclose(logprobs(model), expected, atol=1e-4)
    for path in (here / "merged", tiny_home / "models" / "tiny-llama"):
        tokenizer = AutoTokenizer.from_pretrained(path)
        assert tokenizer.apply_chat_template(
            [{"role": "user", "content": "fox"}], tokenize=False
        ).startswith("<|im_start|>user\nfox")

    training = await service.create_lora_training_client(str(here / "merged"), rank=2)
    np.testing.assert_allclose(await same_weights_logprobs(training), expected, atol=1e-4)
    await service.delete_training_run(training.run_id)
    assert await service.unload_model(str(here / "merged"))


def test_nothing_is_replaced_unless_asked_and_only_what_was_exported(exported, command, here):
    (full, _), _ = exported
    for words in (("-o", "a.tar.gz"), ("-o", "folder"), ("--merge", "-o", "model")):
        assert command("export", full, *words).exit_code == 0
        result = command("export", full, *words)
        assert result.exit_code == 2
        assert "exists already; take another name, or --overwrite" in result.stderr
        assert command("export", full, *words, "--overwrite").exit_code == 0
    (here / "mine").mkdir()
    (here / "mine" / "config.json").write_text("{}")
    (here / "b.tar.gz").mkdir()
    (here / "file").write_text("")
    for out, why in (
        ("mine", "nothing that was exported"),
        ("b.tar.gz", "no file"),
        ("file", "no folder"),
    ):
        result = command("export", full, "-o", out, "--overwrite")
        assert result.exit_code == 2
        assert why in result.stderr
    assert (here / "mine" / "config.json").exists()


def test_neither_a_checkpoint_nor_the_base_is_overwritten(exported, command, tiny_home):
    (full, newest), _ = exported
    checkpoint = tiny_home / "runs" / RUN_ID / "weights" / "full"
    base = tiny_home / "models" / "tiny-llama"
    for out, why in ((checkpoint, "nothing that was exported"), (base, "the base model itself")):
        result = command("export", newest, "--merge", "-o", out, "--overwrite")
        assert result.exit_code == 2
        assert why in result.stderr
    assert command("export", full, "-o", "fine").exit_code == 0
    assert (base / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("path", "words", "message"),
    [
        ("tinker://{run}/weights/none", (), "no checkpoint"),
        ("tinker://{run}/none", (), "is not a checkpoint path"),
        ("tinker://../weights/none", (), "must be 1 to 128"),
        ("{run}x", (), "did you mean"),
        ("tinker://{run}/weights/full", ("--merge", "-o", "m.tar.gz"), "--merge writes a folder"),
    ],
)
def test_what_cannot_be_exported_is_said_in_one_line(exported, command, here, path, words, message):
    result = command("export", path.format(run=RUN_ID), *words)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert list(here.iterdir()) == []


def test_exporting_starts_no_cluster(exported, tiny_home, here):
    (full, _), _ = exported
    out = run_script(
        """
        import sys
        from tinsmith.cli import app
        for words in (["-o", sys.argv[3]], ["--merge", "-o", sys.argv[4]]):
            app(["export", sys.argv[1], "--home", sys.argv[2], *words], standalone_mode=False)
        assert "ray" not in sys.modules
        """,
        full,
        tiny_home,
        here / "a.tar.gz",
        here / "merged",
    )
    assert out.count("wrote") == 2
