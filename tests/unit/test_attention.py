"""Properties of the two kinds of attention, and both against naive float64 computations."""

import math

import pytest
import torch

from speechbrain_bestrq import attention
from speechbrain_bestrq.attention import RelativeAttention, RotaryAttention
from speechbrain_bestrq.frontend import valid_frames

D_MODEL, HEADS, D_HEAD = 16, 2, 8
KINDS = (RotaryAttention, RelativeAttention)


def made(kind, **settings):
    """An attention layer with random weights of every kind, in eval mode."""
    torch.manual_seed(0)
    layer = kind(D_MODEL, HEADS, **settings)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer.eval()


def attend(scores, value, valid, layer):
    """Softmax over valid keys, weighted sum and output projection, in float64, shape (B, T, d_model)."""
    if valid is not None:
        scores = scores.masked_fill(~valid[:, None, None], -math.inf)
    attended = torch.einsum("bhts,bshd->bthd", scores.softmax(-1), value).flatten(2)
    return attended @ layer.out.weight.double().t() + layer.out.bias.double()


def naive_rotary(layer, x, valid):
    """Rotation of complex numbers, one position at a time."""
    query, key, value = (x.double() @ layer.qkv.weight.double().t()).unflatten(-1, (3, HEADS, D_HEAD)).unbind(2)
    half = D_HEAD // 2
    frequencies = torch.tensor([10000.0 ** (-2 * pair / D_HEAD) for pair in range(half)], dtype=torch.float64)
    angles = torch.arange(x.shape[1]).double()[:, None, None] * frequencies
    turn = torch.polar(torch.ones_like(angles), angles)
    query, key = (torch.complex(part[..., :half], part[..., half:]) * turn for part in (query, key))
    scores = torch.einsum("bthd,bshd->bhts", query, key.conj()).real / math.sqrt(D_HEAD)
    return attend(scores, value, valid, layer)


def naive_relative(layer, x, valid):
    """Transformer-XL's four terms, with a position vector for every pair of frames."""
    query, key, value = (x.double() @ layer.qkv.weight.double().t()).unflatten(-1, (3, HEADS, D_HEAD)).unbind(2)
    frames = torch.arange(x.shape[1])
    distance = (frames[:, None] - frames).abs().double()
    rates = 10000.0 ** (-torch.arange(0, D_MODEL, 2).double() / D_MODEL)
    angles = distance[..., None] * rates
    sinusoids = torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(2)
    position = (sinusoids @ layer.position.weight.double().t()).unflatten(-1, (HEADS, D_HEAD))
    scores = torch.einsum("bthd,bshd->bhts", query + layer.content_bias.double(), key)
    scores = scores + torch.einsum("bthd,tshd->bhts", query + layer.position_bias.double(), position)
    return attend(scores / math.sqrt(D_MODEL), value, valid, layer)


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_that_grew_in_inference_is_of_use_in_training(kind):
    layer = kind(16, 2, table_frames=8)
    with torch.inference_mode():
        layer(torch.randn(1, 20, 16))
    layer(torch.randn(1, 20, 16, requires_grad=True)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_tables_have_values_where_a_model_is_built_without_weights(kind):
    there = kind(16, 2)
    with torch.device("meta"):
        built = kind(16, 2)
    built.load_state_dict(there.state_dict(), assign=True)
    x = torch.randn(1, 10, 16)
    assert torch.equal(built(x), there(x))


@pytest.mark.parametrize("kind, naive", [(RotaryAttention, naive_rotary), (RelativeAttention, naive_relative)])
@pytest.mark.parametrize("lengths", [None, torch.tensor([30, 11])])
def test_equals_a_naive_float64_implementation(kind, naive, lengths, relative_difference):
    layer = made(kind)
    x = torch.randn(2, 30, D_MODEL)
    valid = None if lengths is None else valid_frames(lengths, 30)
    assert relative_difference(naive(layer, x, valid), layer(x, valid)) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_only_distances_count(kind, relative_difference):
    layer = made(kind)
    content, start = torch.randn(1, 12, D_MODEL), 17
    moved = torch.randn(1, 40, D_MODEL)
    moved[:, start : start + 12] = content
    frames = torch.arange(40)[None]
    valid = (frames >= start) & (frames < start + 12)
    assert relative_difference(layer(content), layer(moved, valid)[:, start : start + 12]) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_distances_do_count(kind, relative_difference):
    layer = made(kind)
    x = torch.randn(1, 12, D_MODEL)
    order = torch.randperm(12)
    assert relative_difference(layer(x)[:, order], layer(x[:, order])) > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_a_longer_input_than_tabulated_changes_nothing(kind, relative_difference):
    small, large = made(kind, table_frames=4), made(kind, table_frames=100)
    x = torch.randn(1, 50, D_MODEL)
    assert relative_difference(large(x), small(x)) <= 1e-6
    assert relative_difference(large(x[:, :20]), small(x[:, :20])) <= 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_frames_that_are_not_valid_are_not_attended_to(kind):
    layer = made(kind)
    x = torch.randn(1, 20, D_MODEL)
    valid = valid_frames(torch.tensor([13]), 20)
    changed = x.clone()
    changed[:, 13:] += 100.0
    assert torch.equal(layer(x, valid)[:, :13], layer(changed, valid)[:, :13])


def test_rotary_gives_no_mask_when_nothing_is_padded_and_keeps_the_scale(monkeypatch):
    calls = []
    fused = attention.scaled_dot_product_attention

    def spy(*tensors, attn_mask=None, scale=None, **settings):
        calls.append((attn_mask, scale))
        return fused(*tensors, attn_mask=attn_mask, scale=scale, **settings)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", spy)
    layer, x = made(RotaryAttention), torch.randn(3, 20, D_MODEL)
    layer(x)
    mask, scale = calls.pop()
    assert mask is None
    assert scale is None or scale == D_HEAD**-0.5  # None is 1 / sqrt(d_head) in PyTorch
    layer(x, valid_frames(torch.tensor([20, 20, 5]), 20))
    mask, _ = calls.pop()
    assert mask.shape == (3, 1, 1, 20)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_the_dtype_of_the_input_is_kept(kind, dtype):
    layer = made(kind).to(dtype)
    assert layer(torch.randn(1, 5, D_MODEL, dtype=dtype)).dtype == dtype


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="12 / 4"):
        RotaryAttention(12, 4)
    with pytest.raises(ValueError, match="15 and 4"):
        RelativeAttention(15, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask", [None, "boolean", "added"])
def test_plain_products_and_the_fused_kernel_are_equally_near_to_float64(dtype, mask, monkeypatch, relative_difference):
    torch.manual_seed(0)
    parts = [torch.randn(2, 3, 40, 8, dtype=torch.float64) for _ in range(3)]
    masks = {
        None: None,
        "boolean": valid_frames(torch.tensor([40, 23]), 40)[:, None, None],
        "added": torch.randn(2, 3, 40, 40, dtype=torch.float64).to(dtype).double(),
    }
    scale = 0.3
    rounded = [part.to(dtype).requires_grad_() for part in parts]
    exact = [part.detach().double().requires_grad_() for part in rounded]
    expected = torch.nn.functional.scaled_dot_product_attention(*exact, masks[mask], scale=scale)
    expected.square().sum().backward()
    given = masks[mask].to(dtype) if mask == "added" else masks[mask]
    for longest in (attention.LONGEST_PLAIN, 0):
        monkeypatch.setattr(attention, "LONGEST_PLAIN", longest)
        for part in rounded:
            part.grad = None
        attended = attention.attend(*rounded, given, scale=scale)
        assert attended.dtype == dtype
        attended.float().square().sum().backward()
        assert relative_difference(expected, attended.double()) < 0.02
        for part, true in zip(rounded, exact, strict=True):
            assert relative_difference(true.grad, part.grad.double()) < 0.03


def test_float32_and_long_sequences_take_the_fused_kernel(monkeypatch):
    taken = []
    fused = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(attention, "scaled_dot_product_attention", lambda *a, **k: taken.append(1) or fused(*a, **k))
    short = torch.randn(3, 1, 2, 5, 8)
    attention.attend(*short)
    assert len(taken) == 1
    attention.attend(*short.bfloat16())
    assert len(taken) == 1
    attention.attend(*torch.randn(3, 1, 1, attention.LONGEST_PLAIN + 1, 8).bfloat16())
    assert len(taken) == 2


def test_weights_are_dropped_in_plain_products_too():
    torch.manual_seed(0)
    query, key = torch.zeros(1, 1, 400, 8).bfloat16(), torch.zeros(1, 1, 400, 8).bfloat16()
    attended = attention.attend(query, key, torch.ones(1, 1, 400, 8).bfloat16(), dropout_p=0.5)
    assert attended.float().std() > 0.02  # of equal weights, half dropped and half doubled
    assert abs(float(attended.float().mean()) - 1) < 0.03
