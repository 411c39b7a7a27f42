"""Weights are mapped from files that processes share, converted ones too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.tiny import make_tiny_model
from tinsmith.engines.backbone import Backbone
from tinsmith.engines.model_folder import mappable, stored_dtypes

MAPS = Path("/proc/self/maps")
linux = pytest.mark.skipif(not MAPS.exists(), reason="only Linux says what is mapped")


@pytest.fixture
def half(tmp_path) -> Path:
    """A model that is stored in bfloat16."""
    path = make_tiny_model(tmp_path / "full", "llama")
    AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).save_pretrained(
        tmp_path / "half"
    )
    return tmp_path / "half"


def mapped_files(backbone: Backbone) -> set[str]:
    """The files that a model's parameters lie in ("" for memory)."""
    regions = [line.split(maxsplit=5) for line in MAPS.read_text().splitlines()]
    found = set()
    for parameter in backbone.model.parameters():
        for region in regions:
            start, stop = (int(edge, 16) for edge in region[0].split("-"))
            if start <= parameter.data_ptr() < stop:
                found.add(region[5] if len(region) > 5 else "")
    return found


@linux
def test_weights_as_stored_are_mapped_from_the_models_own_file(tiny_llama, tmp_path):
    backbone = Backbone(tiny_llama, "fp32", copies=tmp_path / "copies")
    assert mapped_files(backbone) == {f"{tiny_llama}/model.safetensors"}
    assert not (tmp_path / "copies").exists()


@linux
def test_converted_weights_are_written_once_and_mapped(half, tmp_path):
    copies = tmp_path / "copies"
    first, second = (Backbone(half, "fp32", copies=copies) for _ in range(2))
    (file,) = copies.glob("*/model.safetensors")
    assert mapped_files(first) == mapped_files(second) == {str(file)}
    assert set(stored_dtypes(file.parent)) == {"F32"}
    alone = Backbone(half, "fp32")
    for ours, theirs in zip(first.model.parameters(), alone.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_where_no_copy_can_be_written_each_process_converts(half, tmp_path):
    (tmp_path / "copies").write_text("no folder")
    assert mappable(half, torch.float32, tmp_path / "copies") == half
    assert Backbone(half, "fp32", copies=tmp_path / "copies").unembedding.dtype == torch.float32


def test_other_weights_of_the_same_name_get_a_copy_of_their_own(half, tmp_path):
    before = mappable(half, torch.float32, tmp_path / "copies")
    weights = half / "model.safetensors"
    weights.write_bytes(weights.read_bytes())
    assert mappable(half, torch.float32, tmp_path / "copies") != before
