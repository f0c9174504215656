"""Properties of the Transformer encoder of wav2vec 2.0."""

import math
from collections import Counter

import pytest
import torch
from speechbrain.lobes.models.transformer.Transformer import PositionalEncoding
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from speechbrain_bestrq import transformer
from speechbrain_bestrq.transformer import ConvolutionalPositions, SinusoidalPositions, TransformerEncoder

KINDS = pytest.mark.parametrize(
    "norm, positions", [("post", "convolution"), ("pre", "convolution"), ("pre", "sinusoidal")]
)


def made(norm="post", positions="convolution", position_kernel_size=8, **settings):
    """A small encoder in eval mode, with weights of every kind away from their initial values."""
    torch.manual_seed(0)
    sizes = {"d_model": 16, "num_layers": 3, "num_heads": 2, "d_ffn": 32, **settings}
    encoder = TransformerEncoder(
        norm=norm, positions=positions, position_kernel_size=position_kernel_size, position_groups=4, **sizes
    )
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return encoder.eval()


@KINDS
def test_no_hidden_state_depends_on_padding(norm, positions, relative_difference):
    encoder = made(norm, positions)
    lengths = [12, 30, 1]
    utterances = [torch.randn(1, length, 16) for length in lengths]
    batch = 50.0 * torch.randn(3, 30, 16)
    for row, utterance in zip(batch, utterances, strict=True):
        row[: utterance.shape[1]] = utterance[0]
    states = encoder(batch, torch.tensor(lengths))
    for row, utterance in enumerate(utterances):
        for state, alone in zip(states, encoder(utterance), strict=True):
            assert relative_difference(alone[0], state[row, : lengths[row]]) <= 1e-5


@KINDS
def test_an_utterance_without_frames_disturbs_nobody(norm, positions, relative_difference):
    encoder = made(norm, positions)
    x = torch.randn(2, 10, 16)
    states = encoder(x, torch.tensor([10, 0]))
    assert all(state.isfinite().all() for state in states)
    assert relative_difference(encoder(x[:1])[-1], states[-1][:1]) <= 1e-5


@KINDS
def test_states_are_the_input_of_the_first_layer_then_each_layers_output(norm, positions):
    encoder = made(norm, positions)
    x = torch.randn(2, 10, 16)
    first = x + encoder.positions(x)
    expected = [first if norm == "pre" else encoder.norm(first)]
    for layer in encoder.layers:
        expected.append(layer(expected[-1]))
    if norm == "pre":
        expected[-1] = encoder.norm(expected[-1])
    states = encoder(x)
    assert len(states) == 4
    assert all(torch.equal(a, b) for a, b in zip(states, expected, strict=True))


@KINDS
@pytest.mark.parametrize("layer_drop", [0.5, 1.0])
def test_dropped_layers_are_the_identity_and_stay_in_the_graph(norm, positions, layer_drop):
    encoder = made(norm, positions, layer_drop=layer_drop, dropout=0.0).train()
    for _ in range(4):
        encoder.zero_grad()
        x = torch.randn(2, 10, 16, requires_grad=True)
        states = encoder(x)
        assert len(states) == 4
        if layer_drop == 1.0:
            assert torch.equal(states[0], states[2])
        states[-1].square().sum().backward()
        assert x.grad.abs().max() > 0
        for name, parameter in encoder.named_parameters():
            assert parameter.grad is not None, name
            if layer_drop == 1.0 and name.startswith("layers"):
                assert not parameter.grad.any(), name


def test_layers_are_dropped_in_training_only():
    x = torch.randn(1, 10, 16)
    assert torch.equal(made(layer_drop=1.0)(x)[-1], made(layer_drop=0.0)(x)[-1])


@KINDS
def test_each_dropout_is_at_every_place_that_it_has(norm, positions, monkeypatch):
    called, attended = Counter(), []
    encoder = made(norm, positions, dropout=0.25, attention_dropout=0.5, activation_dropout=0.75).train()
    for name, module in encoder.named_modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(lambda module, *_, name=name: called.update([(name, module.p)]))
    attend = transformer.attend
    monkeypatch.setattr(
        transformer, "attend", lambda *all, **named: attended.append(named["dropout_p"]) or attend(*all, **named)
    )
    encoder(torch.randn(1, 10, 16))
    expected = {("dropout", 0.25): 1}
    for layer in range(3):
        for place, share in (("dropout", 0.25), ("feed_forward.2", 0.75), ("feed_forward.4", 0.25)):
            expected[f"layers.{layer}.{place}", share] = 1
    assert called == expected
    assert attended == [0.5, 0.5, 0.5]
    encoder.eval()(torch.randn(1, 10, 16))
    assert attended[3:] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("kernel_size", [7, 8])
def test_a_frames_convolutional_position_looks_as_far_ahead_as_the_kernel_says(kernel_size):
    positions = ConvolutionalPositions(8, kernel_size, groups=2)
    x = torch.zeros(1, 40, 8)
    still = positions(x)
    x[0, 20] = 1.0
    moved = (positions(x) - still).abs().sum(-1)[0].nonzero().flatten().tolist()
    assert still.shape == x.shape
    # an even kernel sees one frame more behind than ahead
    assert (moved[0], moved[-1]) == (20 - (kernel_size - 1) // 2, 20 + kernel_size // 2)


def test_the_positional_convolution_has_its_weight_in_lengths_and_directions():
    convolution = ConvolutionalPositions(8, 8, groups=2).convolution
    names = dict(convolution.named_parameters())
    assert names["parametrizations.weight.original0"].shape == (1, 1, 8)
    assert torch.allclose(convolution.weight.norm(dim=(0, 1)), names["parametrizations.weight.original0"].flatten())


def test_the_positional_convolution_begins_as_small_as_fairseqs():
    """That of transformers does not: it draws the product of lengths and directions, which keep their own values."""
    torch.manual_seed(0)
    convolution = ConvolutionalPositions(256, 32, groups=4).convolution
    assert float(convolution.weight.detach().std()) == pytest.approx(2 / math.sqrt(32 * 256), rel=0.05)
    assert not convolution.bias.any()


def test_sinusoidal_positions_are_speechbrains_and_their_table_grows():
    x = torch.randn(1, 50, 16)
    positions = SinusoidalPositions(16, table_frames=8)
    assert torch.allclose(positions(x), PositionalEncoding(16)(x), atol=1e-6)
    assert len(positions.table) == 100


@pytest.mark.parametrize("utterances, frames", [(1, 50), (3, 120)])
@KINDS
def test_counted_operations_are_pytorchs(norm, positions, utterances, frames):
    encoder = made(norm, positions, d_model=32, num_heads=4, d_ffn=64, position_kernel_size=7)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        encoder(torch.randn(utterances, frames, 32))
    assert encoder.flops(utterances, frames) == pytest.approx(counter.get_total_flops(), rel=1e-6)


def test_of_layers_that_training_skips_no_operations_are_counted():
    encoder = made(layer_drop=0.25)
    whole, positions = encoder.eval().flops(2, 50), encoder.positions.flops(100)
    assert encoder.train().flops(2, 50) - positions == pytest.approx(0.75 * (whole - positions))


def test_every_matrix_of_a_layer_is_that_of_a_linear_layer():
    for module in made().layers.modules():
        for _, parameter in module.named_parameters(recurse=False):
            assert parameter.ndim == 1 or isinstance(module, nn.Linear)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"norm": "before"}, "norm is 'pre' or 'post'"),
        ({"positions": "rotary"}, "positions is 'convolution' or 'sinusoidal'"),
        ({"d_model": 15, "num_heads": 2}, "multiple of num_heads"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TransformerEncoder(**{"d_model": 15, "num_heads": 3, "num_layers": 1, "position_groups": 3, **settings})
