"""Attention without a (B, H, T, T) mask, rightly scaled, out of linear layers."""

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from speechbrain_bestrq import attention
from speechbrain_bestrq.attention import RotaryAttention
from speechbrain_bestrq.transformer import SelfAttention


def masks_given(monkeypatch, layer, valid):
    """The shapes of masks that the fused attention gets, and its scale."""
    masks = []

    def spy(query, key, value, attn_mask=None, **named):
        masks.append((None if attn_mask is None else tuple(attn_mask.shape), named.get("scale")))
        return scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, **named)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", spy)
    layer(16, 2)(torch.randn(3, 10, 16), valid)
    return masks


@pytest.mark.parametrize("layer", [RotaryAttention, SelfAttention])
def test_no_mask_where_nothing_is_padded_and_a_small_one_where_something_is(monkeypatch, layer):
    """Trap: a mask of (B, H, T, T) is always built, so that no flash kernel is taken.

    Mutations: in attention.py, RotaryAttention.forward, ``None if valid is None else valid[:, None, None]`` -> ``(valid
    if valid is not None else torch.ones(x.shape[:2], dtype=torch.bool))[:, None, None]``; in attention.py,
    RotaryAttention.forward, ``valid[:, None, None]`` -> ``valid[:, None, None].expand(-1, self.num_heads, x.shape[1],
    -1)``; in transformer.py, SelfAttention.forward, ``valid[:, None, None]`` -> ``valid[:, None, None].expand(-1,
    self.num_heads, x.shape[1], -1)``.
    """
    assert masks_given(monkeypatch, layer, None) == [(None, None)]
    assert masks_given(monkeypatch, layer, torch.ones(3, 10, dtype=torch.bool)) == [((3, 1, 1, 10), None)]


def test_the_encoder_masks_nothing_in_a_batch_without_padding(toy, monkeypatch):
    """Trap: as above, where the encoder makes its mask.

    Mutation: in encoder.py, ConformerEncoder.forward, ``None if lengths is None else valid_frames(lengths.clamp(min=1),
    x.shape[1])`` -> ``torch.ones(x.shape[:2], dtype=torch.bool)``.
    """
    seen = []
    model = toy.make_model().eval()
    for layer in model.speech_encoder.encoder.layers:
        layer.attention.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    model(torch.randn(2, 16000))
    assert seen == [None, None]


def test_scores_are_scaled_by_the_size_of_a_head():
    """Trap: scores are scaled by 1/sqrt(d_model).

    Mutation: in attention.py, RotaryAttention.forward, after ``value.transpose(1, 2),`` add
    ``scale=query.shape[2] ** -0.5 * query.shape[3] ** -0.5,``.
    """
    torch.manual_seed(1)
    layer = RotaryAttention(16, 4).double()
    # of one frame, and frame 0 is not rotated: two copies of frame 0 far apart would be; so one query, by hand
    x = torch.randn(1, 6, 16).double()
    query, key, value = layer.qkv(x).unflatten(-1, (3, 4, 4)).unbind(2)
    angles = torch.arange(6)[:, None] * 10000.0 ** -(torch.arange(0, 4, 2) / 4.0)
    turn = torch.polar(torch.ones_like(angles), angles).to(torch.complex128)[:, None]

    def rotate(y):
        turned = torch.complex(y[..., :2], y[..., 2:]) * turn
        return torch.cat((turned.real, turned.imag), dim=-1)

    scores = torch.einsum("bthd,bshd->bhts", rotate(query), rotate(key)) / math.sqrt(4)
    expected = layer.out(torch.einsum("bhts,bshd->bthd", scores.softmax(-1), value).flatten(2))
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)


def test_every_matrix_of_the_encoder_is_a_linear_layer(toy):
    """Trap: ``in_proj_weight`` is a raw parameter, which LoRA cannot reach.

    Mutation: in attention.py, RotaryAttention.__init__, before ``self.out = `` add ``self.in_proj_weight =
    nn.Parameter(torch.zeros(d_model, d_model))``.
    """
    for kind in ("rotary", "relative"):
        encoder = toy.make_model(attention=kind).speech_encoder.encoder
        linear = {id(module.weight) for module in encoder.modules() if isinstance(module, torch.nn.Linear)}
        biases = {"content_bias", "position_bias"}
        matrices = {
            name: parameter
            for name, parameter in encoder.named_parameters()
            if parameter.ndim == 2 and name.rsplit(".", 1)[-1] not in biases
        }
        assert len(matrices) >= 10
        assert [name for name, parameter in matrices.items() if id(parameter) not in linear] == []
