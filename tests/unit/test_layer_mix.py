"""A layer mix is a softmax-weighted sum, in fp32, that learns; its weights can be logged and drawn."""

import pytest
import torch
from torch.nn.functional import layer_norm

from speechbrain_bestrq import LayerMix, PretrainedEncoder, WeightedEncoder, save_encoder
from speechbrain_bestrq.downstream import draw_layer_weights


@pytest.fixture
def hidden():
    """Four hidden states of different scales, zero in the padding of the second utterance."""
    states = torch.randn(4, 2, 10, 8, generator=torch.Generator().manual_seed(1)) * 10.0 ** torch.arange(4).view(
        4, 1, 1, 1
    )
    states[:, 1, 6:] = 0.0
    return states


def test_it_starts_as_the_plain_mean(hidden):
    assert torch.allclose(LayerMix(4)(hidden), hidden.mean(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layernorm", [False, True])
def test_it_is_the_softmax_weighted_sum_of_the_states(hidden, layernorm):
    mix = LayerMix(4, layernorm)
    with torch.no_grad():
        mix.weights.copy_(torch.tensor([0.0, 1.0, -1.0, 2.0]))
    states = layer_norm(hidden, (8,)) if layernorm else hidden
    expected = sum(share * state for share, state in zip(mix.weights.softmax(0), states, strict=True))
    assert torch.allclose(mix(hidden), expected, rtol=1e-5, atol=1e-4)
    assert not mix(hidden)[1, 6:].any()


def test_with_layernorm_no_state_counts_more_by_its_scale(hidden):
    scaled = hidden * torch.tensor([1.0, 5.0, 0.2, 3.0]).view(4, 1, 1, 1)
    assert torch.allclose(LayerMix(4, True)(hidden), LayerMix(4, True)(scaled), atol=1e-3)


def test_with_utterance_norm_each_channel_is_standardised_over_its_own_frames(hidden):
    mixed = LayerMix(4, utterance_norm=True)(hidden, torch.tensor([10, 6]))
    for utterance, frames in ((0, 10), (1, 6)):
        states = hidden[:, utterance, :frames]
        expected = ((states - states.mean(1, keepdim=True)) / states.std(1, correction=0, keepdim=True)).mean(0)
        assert torch.allclose(mixed[utterance, :frames], expected, atol=1e-4)
    assert not mixed[1, 6:].any()
    alone = LayerMix(4, utterance_norm=True)(hidden[:, 1:, :6])
    assert torch.allclose(mixed[1:, :6], alone, atol=1e-5)


def test_with_utterance_norm_nothing_is_left_of_what_all_frames_have_in_common(hidden):
    lengths, mix = torch.tensor([10, 6]), LayerMix(4, utterance_norm=True)
    valid = torch.arange(10)[:, None] < torch.tensor([10, 6])[:, None, None]
    elsewhere = (hidden * 3.0 + 7.0 * torch.randn(4, 2, 1, 8)) * valid
    assert torch.allclose(mix(elsewhere, lengths), mix(hidden, lengths), atol=1e-3)


def test_the_two_norms_exclude_each_other():
    with pytest.raises(ValueError, match="choose one"):
        LayerMix(2, layernorm=True, utterance_norm=True)


def test_it_learns_which_state_tells(hidden):
    mix = LayerMix(4, layernorm=True)
    optimizer = torch.optim.Adam(mix.parameters(), 0.1)
    target = layer_norm(hidden, (8,))[2]
    for _ in range(100):
        optimizer.zero_grad()
        (mix(hidden) - target).square().mean().backward()
        optimizer.step()
    shares = mix.shares()
    assert shares[2] > 0.9 and sum(shares) == pytest.approx(1.0)


def test_bf16_does_not_round_the_weights(hidden):
    mix = LayerMix(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = mix(hidden)
    assert mixed.dtype == torch.float32 and torch.equal(mixed, mix(hidden))


def test_another_number_of_states_is_refused(hidden):
    with pytest.raises(ValueError, match="of 3 hidden states, not of 4"):
        LayerMix(3)(hidden)


def test_a_weighted_encoder_has_the_attributes_of_speechbrains(make_speech_encoder, tmp_path):
    folder = save_encoder(make_speech_encoder(), tmp_path / "encoder", "# Card")
    encoder = WeightedEncoder(hub=str(folder), save_path=str(tmp_path), layernorm=True, freeze=True, layer_drop=0.5)
    assert encoder.encoder.model.encoder.layer_drop == 0.5
    assert (encoder.num_layers, encoder.output_dim, encoder.freeze) == (3, 16, True)
    assert encoder.weights.shape == (3,) and encoder.weights.requires_grad and not encoder.weights.any()
    assert [name for name, parameter in encoder.named_parameters() if parameter.requires_grad] == ["mix.weights"]
    encoder.model.feature_extractor._freeze_parameters()  # as recipes of emotions and intents do
    wavs, wav_lens = 0.1 * torch.randn(2, 8000), torch.tensor([1.0, 0.5])
    states = PretrainedEncoder(folder, freeze=True, output_all_hiddens=True)(wavs, wav_lens)
    assert torch.equal(encoder(wavs, wav_lens), encoder.mix(states))


def test_the_utterance_norm_of_a_weighted_encoder_heeds_the_padding(make_speech_encoder, tmp_path):
    folder = save_encoder(make_speech_encoder(), tmp_path / "encoder", "# Encoder")
    encoder = WeightedEncoder(folder, freeze=True, utterance_norm=True, output_rate=50)
    wavs = torch.randn(2, 16000, generator=torch.Generator().manual_seed(0))
    padded, alone = encoder(wavs, torch.tensor([1.0, 0.5])), encoder(wavs[1:, :8000])
    assert torch.allclose(padded[1:, : alone.shape[1]], alone, atol=1e-4)
    assert not padded[1, alone.shape[1] :].any()
    assert padded[0].mean(0).abs().max() < 1e-5


def test_weights_are_described_in_a_line_and_drawn(tmp_path):
    mix = LayerMix(3)
    with torch.no_grad():
        mix.weights.copy_(torch.tensor([0.5, 0.25, 0.25]).log())
    assert mix.describe() == "layer weights, lowest first: 0.500 0.250 0.250"
    path = draw_layer_weights([[1 / 3] * 3, mix.shares()], tmp_path / "deep" / "layers.png")
    assert path.read_bytes().startswith(b"\x89PNG") and [one.name for one in path.parent.iterdir()] == ["layers.png"]
    with pytest.raises(ValueError, match="history is empty"):
        draw_layer_weights([], tmp_path / "none.png")
