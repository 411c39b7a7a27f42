"""What a layout may be."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig, Qwen3MoeConfig

from tinsmith import InvalidInput
from tinsmith.engines.layout import Layout

LLAMA = LlamaConfig(num_attention_heads=8, num_key_value_heads=2, intermediate_size=96)
MIXTURE = Qwen3MoeConfig(num_attention_heads=8, num_key_value_heads=4, num_experts=16)


def test_a_layout_reads_as_it_prints():
    for text in ("data=1", "shard=2", "data=2,shard=4,tensor=2", "data=2,shard=2,expert=4"):
        assert str(Layout.parse(text)) == text
    assert Layout.parse(" shard = 2 , tensor=2") == Layout(shard=2, tensor=2)


def test_experts_sit_on_the_ranks_that_are_there():
    layout = Layout(data=2, shard=2, tensor=2, expert=4)
    assert (layout.world, layout.parts) == (8, 4)
    assert Layout(shard=2, tensor=2, context=2).together == 4


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "must read like"),
        ("pipe=2", "of data, shard, tensor, expert, context, each once; got 'pipe=2'"),
        ("shard=two", "must read like"),
        ("shard=2,shard=2", "each once"),
        ("shard=0", "shard must be an integer from 1, got 0"),
        ("data=2,expert=4", "expert=4 must divide data x shard x context = 2"),
        ("tensor=2,expert=2", "tensor ranks share them out anyway: leave expert out"),
    ],
)
def test_what_is_no_layout_is_refused(text, match):
    with pytest.raises(InvalidInput, match=match):
        Layout.parse(text)


def test_a_layout_that_a_model_cannot_have_is_refused():
    Layout(shard=3, tensor=2).check(LLAMA)
    with pytest.raises(InvalidInput, match="tensor=4 does not divide the model's num_key_value"):
        Layout(tensor=4).check(LLAMA)
    with pytest.raises(InvalidInput, match=r"the model \(llama\) has no experts"):
        Layout(data=2, expert=2).check(LLAMA)
    Layout(data=2, shard=4, expert=4).check(MIXTURE)
    Layout(shard=2, context=2, tensor=4, expert=4).check(MIXTURE)
    for layout in (Layout(data=3, expert=3), Layout(shard=8, tensor=4, expert=8)):
        with pytest.raises(InvalidInput, match="does not divide the model's 16 experts"):
            layout.check(MIXTURE)
