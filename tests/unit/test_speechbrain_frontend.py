"""What an encoder with SpeechBrain's front end is made of, and how it is described. Its values: tests/oracle."""

import pytest
import torch

from speechbrain_bestrq.artefact import build_encoder, encoder_config, load_encoder, save_encoder
from speechbrain_bestrq.encoder import ConformerEncoder, SpeechEncoder
from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.frontend import ConvSubsampling, LogMel
from speechbrain_bestrq.speechbrain_frontend import SpeechBrainFbank, SpeechBrainSubsampling


def speech_encoder(normalize="utterance", activation="swish"):
    return SpeechEncoder(
        SpeechBrainFbank(normalize=normalize),
        SpeechBrainSubsampling(d_model=16, channels=(8, 4)),
        ConformerEncoder(16, num_layers=1, num_heads=2, d_ffn=32, kernel_size=3, activation=activation),
    )


@pytest.mark.parametrize("normalize", ["utterance", "global"])
def test_a_round_trip_changes_no_bit(normalize, tmp_path):
    encoder = speech_encoder(normalize).eval()
    if normalize == "global":
        encoder.frontend.measure([(torch.randn(1, 16000), None)])
    loaded = load_encoder(save_encoder(encoder, tmp_path / "encoder", "# Card"))
    assert encoder_config(loaded) == encoder_config(encoder)
    wavs, wav_lens = torch.randn(2, 8100), torch.tensor([1.0, 0.6])
    for expected, found in zip(encoder(wavs, wav_lens), loaded(wavs, wav_lens), strict=True):
        assert torch.equal(expected, found)


@pytest.mark.parametrize("section", ["frontend", "subsampling", "encoder"])
def test_an_unknown_type_of_a_section_is_named(section):
    config = encoder_config(speech_encoder())
    config[section]["type"] = "Elsewhere"
    with pytest.raises(InputError, match=f"unknown {section} type 'Elsewhere'"):
        build_encoder(config)


def test_front_ends_and_subsamplings_that_count_otherwise_are_not_mixed():
    encoder = ConformerEncoder(16, num_layers=1, num_heads=2, d_ffn=32)
    with pytest.raises(ValueError, match="stack must be the subsampling's 1, not 4"):
        SpeechEncoder(LogMel(), SpeechBrainSubsampling(d_model=16), encoder)
    with pytest.raises(ValueError, match="stack must be the subsampling's 4, not 1"):
        SpeechEncoder(SpeechBrainFbank(), ConvSubsampling(d_model=16), encoder)


@pytest.mark.parametrize("fft_points", [398, 401])
def test_a_transform_that_does_not_hold_the_window_is_refused(fft_points):
    with pytest.raises(ValueError, match="fft_points must be even and at least the window's 400"):
        SpeechBrainFbank(fft_points=fft_points)


def test_an_unknown_activation_is_named():
    with pytest.raises(ValueError, match="activation is one of gelu, swish, not 'relu'"):
        speech_encoder(activation="relu")


def test_whole_encoder_frames_can_be_encoded_by_their_number():
    encoder = speech_encoder().eval()
    features, lengths = torch.randn(2, 40, 80), torch.tensor([10, 7])
    expected, _ = encoder.encode(features, 4 * lengths)
    for found, states in zip(encoder.encode_features(features, lengths), expected, strict=True):
        assert torch.equal(found[1, :7], states[1, :7])


@pytest.mark.parametrize("samples", [1, 159, 160, 320])
def test_even_the_shortest_waveform_has_a_frame(samples):
    encoder = speech_encoder().eval()
    hidden, lengths = encoder(torch.randn(1, samples))
    assert hidden.shape[2] == 1 == encoder.num_frames(samples) and lengths.tolist() == [1]
    assert hidden.isfinite().all()
