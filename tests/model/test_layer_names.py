"""Block and projection of a layer, read from its name."""

from __future__ import annotations

from nullspace.model.layer_names import is_attention, locations


def test_block_and_projection_are_read_from_names() -> None:
    names = ["model.layers.0.self_attn.q_proj", "model.layers.10.mlp.up_proj", "score"]
    assert list(locations(names).values()) == [(0, "q_proj"), (10, "up_proj"), (None, "score")]
    assert locations(["h.0.attn.c_proj", "h.1.mlp.c_proj"])["h.1.mlp.c_proj"] == (1, "mlp.c_proj")
    experts = locations(["layers.2.experts.7.w1", "layers.2.experts.3.w1"])
    assert experts["layers.2.experts.7.w1"] == (2, "w1")
    two = locations(["encoder.block.0.fc", "decoder.block.0.fc"])
    assert [each.block for each in two.values()] == ["encoder.block.0", "decoder.block.0"]
    assert is_attention("h.0.attn.c_proj")
    assert is_attention("encoder.layer.0.attention.self.query")
    assert not is_attention("h.0.mlp.c_proj")
