"""Properties of the Conformer and of the whole speech encoder."""

import subprocess
import sys
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from speechbrain_bestrq import attention as attention_module
from speechbrain_bestrq.convolution import FrameConvolution
from speechbrain_bestrq.encoder import ConformerEncoder, SpeechEncoder, run_layers
from speechbrain_bestrq.frontend import ConvSubsampling, LogMel

KINDS = pytest.mark.parametrize("attention", ["rotary", "relative"])


def made(attention="rotary", **settings):
    """A tiny Conformer with weights of every kind away from zero, in eval mode."""
    torch.manual_seed(0)
    sizes = dict(d_model=16, num_layers=3, num_heads=2, d_ffn=32, kernel_size=7, dropout=0.0)
    encoder = ConformerEncoder(**{**sizes, **settings}, attention=attention)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return encoder.eval()


class Shapes(TorchDispatchMode):
    """Records the shape of every tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        result = operation(*arguments, **(options or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.shapes.add(tuple(tensor.shape))
        return result


@KINDS
def test_no_hidden_state_depends_on_padding(attention, relative_difference):
    encoder = made(attention)
    lengths = torch.tensor([40, 39, 23, 5, 1])
    x = torch.randn(5, 40, 16)
    for row, length in zip(x, lengths, strict=True):
        row[length:] = 100.0 * torch.randn(40 - length, 16)
    together = encoder(x, lengths)
    for index, length in enumerate(lengths.tolist()):
        alone = encoder(x[index : index + 1, :length])
        assert len(alone) == len(together) == 4
        for expected, state in zip(alone, together, strict=True):
            assert relative_difference(expected[0], state[index, :length]) <= 1e-5


@KINDS
@pytest.mark.parametrize("normalize", ["global", "utterance"])
def test_speech_encoder_does_not_depend_on_padding(
    attention, normalize, make_speech_encoder, padded_with_junk, relative_difference
):
    speech_encoder = make_speech_encoder(attention, normalize)
    utterances, batch, wav_lens = padded_with_junk((16000, 15900, 9001, 700))
    together, lengths = speech_encoder(batch, wav_lens)
    for index, (utterance, length) in enumerate(zip(utterances, lengths.tolist(), strict=True)):
        alone, alone_lengths = speech_encoder(utterance[None])
        assert alone_lengths.tolist() == [length] == [speech_encoder.num_frames(len(utterance))]
        for expected, state in zip(alone, together, strict=True):
            assert relative_difference(expected[0], state[index, :length]) <= 1e-5
        assert not together[:, index, length:].any()


@pytest.mark.parametrize("padded", [True, False])
def test_the_last_state_alone_is_that_of_all_and_so_are_its_gradients(make_speech_encoder, padded):
    speech_encoder = make_speech_encoder()
    features, lengths = speech_encoder.frontend(
        0.1 * torch.randn(2, 8000), torch.tensor([1.0, 0.5]) if padded else None
    )
    gradients = []
    for all_states in (True, False):
        speech_encoder.zero_grad()
        hidden, frames = speech_encoder.encode(features, lengths, all_states)
        last = hidden[-1] if all_states else hidden
        last.square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in speech_encoder.parameters()])
        gradients[-1] += [last.detach(), frames]
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_the_last_state_alone_is_not_copied_with_the_others(make_speech_encoder):
    speech_encoder = make_speech_encoder()
    features, lengths = speech_encoder.frontend(0.1 * torch.randn(2, 8000), torch.tensor([1.0, 0.5]))
    for all_states in (True, False):
        with torch.no_grad(), Shapes() as seen:
            speech_encoder.encode(features, lengths, all_states)
        assert ((3, 2, 12, 16) in seen.shapes) == all_states


@KINDS
def test_an_utterance_without_frames_disturbs_nobody(attention, make_speech_encoder, relative_difference):
    speech_encoder = make_speech_encoder(attention)
    wavs = 0.1 * torch.randn(3, 8000)
    hidden, lengths = speech_encoder(wavs, torch.tensor([1.0, 0.0, 0.5]))
    assert lengths.tolist() == [12, 0, 6]
    assert hidden.isfinite().all()
    assert not hidden[:, 1].any()
    expected, _ = speech_encoder(wavs[::2], torch.tensor([1.0, 0.5]))
    assert relative_difference(expected, hidden[:, ::2]) <= 1e-5


@KINDS
def test_a_dropped_layer_is_the_identity_and_keeps_the_number_of_states(attention):
    encoder = made(attention, layer_drop=1.0).train()
    x = torch.randn(2, 10, 16)
    states = encoder(x, torch.tensor([10, 6]))
    assert len(states) == 4
    assert torch.equal(states[1], x) and torch.equal(states[2], x)
    assert torch.equal(states[3], encoder.norm(x))


@KINDS
@pytest.mark.parametrize("layer_drop", [0.5, 1.0])
def test_dropped_layers_stay_in_the_graph(attention, layer_drop):
    encoder = made(attention, layer_drop=layer_drop).train()
    for _ in range(4):
        encoder.zero_grad()
        x = torch.randn(2, 10, 16, requires_grad=True)
        states = encoder(x)
        assert len(states) == 4
        states[-1].square().sum().backward()
        assert x.grad.abs().max() > 0
        for name, parameter in encoder.named_parameters():
            assert parameter.grad is not None, name
            if layer_drop == 1.0 and name.startswith("layers"):
                assert not parameter.grad.any(), name


def test_layers_are_dropped_in_training_only():
    encoder = made(layer_drop=1.0)
    x = torch.randn(1, 10, 16)
    assert torch.equal(encoder(x)[-1], made(layer_drop=0.0)(x)[-1])


def test_layers_are_dropped_as_often_as_asked():
    encoder = made(layer_drop=0.25).train()
    x = torch.randn(1, 4, 16)
    dropped = sum(torch.equal(states[0], states[1]) for states in (encoder(x) for _ in range(200)))
    assert 25 <= dropped <= 75  # four standard deviations about 50


def test_a_layer_in_eval_mode_is_never_dropped_and_the_others_fare_as_without_it():
    encoder = made(num_layers=5, layer_drop=0.5).train()
    x = torch.randn(1, 4, 16)

    def dropped(seed):
        torch.manual_seed(seed)
        states = run_layers(encoder.layers, x, layer_drop=0.5)
        return [torch.equal(before, after) for before, after in zip(states, states[1:], strict=False)]

    expected = [dropped(seed) for seed in range(20)]
    for layer in encoder.layers[:2]:
        layer.eval()
    assert [dropped(seed) for seed in range(20)] == [[False, False, *row[2:]] for row in expected]
    assert any(any(row[:2]) for row in expected) and any(any(row[2:]) for row in expected)


def test_layers_that_are_all_in_eval_mode_draw_nothing():
    encoder = made(layer_drop=0.5)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    encoder(torch.randn(1, 4, 16, generator=torch.Generator()))
    assert torch.equal(torch.rand(3), expected)


def test_layer_drop_takes_one_number_for_each_layer_from_the_global_generator():
    """So a run goes on as before, whatever is refactored here: pre-training is reproducible across releases."""
    encoder = made(num_layers=5, layer_drop=0.5).train()
    torch.manual_seed(1)
    kept, after = torch.rand(5) >= 0.5, torch.rand(3)
    torch.manual_seed(1)
    states = encoder(torch.randn(1, 4, 16, generator=torch.Generator()))
    assert torch.equal(torch.rand(3), after)
    assert [torch.equal(one, other) for one, other in zip(states[:4], states[1:5], strict=True)] == [
        not keep for keep in kept.tolist()[:4]
    ]


@KINDS
def test_dropout_is_at_every_place_that_it_has(attention, make_speech_encoder, monkeypatch):
    called, attended = Counter(), []
    speech_encoder = make_speech_encoder(attention, dropout=0.25).train()
    for name, module in speech_encoder.named_modules():
        if isinstance(module, nn.Dropout):
            assert module.p == 0.25, name
            module.register_forward_hook(lambda *_, name=name: called.update([name]))
    attend = attention_module.attend
    monkeypatch.setattr(
        attention_module, "attend", lambda *all, **named: attended.append(named["dropout_p"]) or attend(*all, **named)
    )
    speech_encoder(torch.randn(1, 8000))
    assert called.pop("subsampling.dropout") == 3  # behind two convolutions and a projection
    layers = [f"encoder.layers.{layer}" for layer in range(2)]
    places = ["feed_forward1.3", "feed_forward1.5", "convolution.dropout", "feed_forward2.3", "feed_forward2.5"]
    assert called == {f"{layer}.{place}": 1 for layer in layers for place in places}
    assert attended == [0.25, 0.25]
    speech_encoder.eval()(torch.randn(1, 8000))
    assert attended[2:] == [0.0, 0.0]


@KINDS
def test_states_are_the_input_then_each_layer_the_last_one_after_the_final_norm(attention):
    encoder = made(attention)
    x = torch.randn(2, 10, 16)
    expected = [x]
    for layer in encoder.layers:
        expected.append(layer(expected[-1]))
    expected[-1] = nn.functional.layer_norm(expected[-1], (16,), encoder.norm.weight, encoder.norm.bias, eps=1e-6)
    states = encoder(x)
    assert all(torch.equal(a, b) for a, b in zip(states, expected, strict=True))


@pytest.mark.parametrize(("dtype", "accuracy"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize(("kernel_size", "groups"), [(5, 48), (8, 3)])
def test_the_convolution_of_frames_is_pytorchs_and_transposes_nothing(
    kernel_size, groups, dtype, accuracy, relative_difference
):
    torch.manual_seed(0)
    ours = FrameConvolution(48, kernel_size, groups).to(dtype)
    # in float64, and of the same rounded weights: PyTorch's own bfloat16 is rounded as well, on each CPU in its way
    theirs = nn.Conv1d(48, 48, kernel_size, padding=kernel_size // 2, groups=groups).double()
    theirs.load_state_dict({name: value.double() for name, value in ours.state_dict().items()})
    values = torch.randn(3, 11, 48).to(dtype)
    inputs = [values.clone().requires_grad_(), values.double().requires_grad_()]
    outputs = ours(inputs[0]), theirs(inputs[1].mT).mT
    assert outputs[0].is_contiguous()
    assert relative_difference(outputs[1], outputs[0]) < accuracy
    weights = torch.linspace(-1, 1, outputs[0].numel()).view_as(outputs[0]).to(dtype)
    for output in outputs:
        output.backward(weights.to(output.dtype))
    pairs = [
        (inputs[1].grad, inputs[0].grad),
        (theirs.weight.grad, ours.weight.grad),
        (theirs.bias.grad, ours.bias.grad),
    ]
    for expected, found in pairs:
        assert relative_difference(expected, found) < accuracy
    assert inputs[0].grad.is_contiguous()


@pytest.mark.parametrize(("channels", "groups", "as_image"), [(24, 24, False), (24, 3, True), (32, 32, True)])
def test_a_narrow_depthwise_convolution_keeps_off_the_layout_that_can_hang(channels, groups, as_image, monkeypatch):
    called, convolve_image = [], FrameConvolution.convolve_image

    def noting(convolution, x):
        called.append(x.shape)
        return convolve_image(convolution, x)

    monkeypatch.setattr(FrameConvolution, "convolve_image", noting)
    FrameConvolution(channels, 31, groups)(torch.randn(1, 20, channels))
    assert bool(called) == as_image


@pytest.mark.parametrize("channels", [8, 16, 24])
def test_a_narrow_depthwise_convolution_ends_in_bfloat16(channels):
    """With AVX512_BF16, oneDNN's never does when the channels lie innermost."""
    code = (
        "import torch; from speechbrain_bestrq.convolution import FrameConvolution;"
        f"convolution = FrameConvolution({channels}, 31, {channels}).bfloat16();"
        f"print(convolution(torch.randn(2, 149, {channels}).bfloat16()).shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == f"torch.Size([2, 149, {channels}])\n", done.stderr


def test_rotary_makes_no_tensor_of_frames_by_frames():
    encoder, frames = made(), 61
    with torch.no_grad(), Shapes() as seen:
        encoder(torch.randn(2, frames, 16))
    assert (2, frames, 16) in seen.shapes
    assert not [shape for shape in seen.shapes if shape[-2:] == (frames, frames)]


@KINDS
def test_every_matrix_is_a_linear_layers_or_a_convolutions(attention, make_speech_encoder):
    for name, module in make_speech_encoder(attention).named_modules():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim > 1 and not isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.LayerNorm):
                assert parameter_name in ("content_bias", "position_bias"), f"{name}.{parameter_name}"


@KINDS
@pytest.mark.parametrize("utterances, frames", [(1, 50), (3, 120)])
def test_counted_operations_are_pytorchs(attention, utterances, frames):
    encoder = made(attention, d_model=32, num_heads=4, d_ffn=64)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        encoder(torch.randn(utterances, frames, 32))
    assert encoder.flops(utterances, frames) == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_of_layers_that_training_skips_no_operations_are_counted():
    encoder = made(layer_drop=0.25)
    assert encoder.train().flops(2, 50) == 0.75 * encoder.eval().flops(2, 50)


def test_counted_operations_of_the_subsampling_are_pytorchs():
    subsampling = ConvSubsampling(d_model=16, channels=(8, 4)).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        subsampling(torch.randn(2, 100, 80))
    assert subsampling.flops(2 * 25) == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="'flash'"):
        made("flash")
    with pytest.raises(ValueError, match="odd"):
        made(kernel_size=8)
    with pytest.raises(ValueError, match="stack"):
        SpeechEncoder(LogMel(stack=2), ConvSubsampling(d_model=16), made())
