"""Properties of the log-mel features and of their subsampling."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speechbrain_bestrq.frontend import ConvSubsampling, LogMel, absolute_lengths, valid_frames

LENGTHS = (16000, 11203, 9999, 700)


def unnormalised():
    """A front end whose normalisation changes nothing."""
    frontend = LogMel()
    frontend.load_state_dict({"mean": torch.zeros(80), "deviation": torch.ones(80)})
    return frontend


def made(normalize):
    """A front end, ready to run."""
    frontend = LogMel(normalize=normalize)
    if normalize == "global":
        frontend.measure([(0.1 * torch.randn(2, 16000, generator=torch.Generator().manual_seed(9)), None)])
    return frontend


def reference_log_mel(wav):
    """Log-mel features of one utterance in float64, with its own DFT matrix and filters, shape (T, 80)."""
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 399)
    count = (1 + len(wav) // 160) // 4 * 4
    padded = np.concatenate([np.zeros(200), wav.astype(np.float64), np.zeros(600)])
    frames = np.stack([padded[160 * t : 160 * t + 400] for t in range(count)]) * window
    spectrum = frames @ np.exp(-2j * np.pi * np.outer(np.arange(400), np.arange(257)) / 512)
    top = 2595 * math.log10(1 + 8000 / 700)
    edges = 700 * (10 ** (np.linspace(0, top, 82) / 2595) - 1)
    frequencies = np.arange(257) * 16000 / 512
    filters = np.stack(
        [
            np.interp(frequencies, [low, centre, high], [0.0, 1.0, 0.0])
            for low, centre, high in zip(edges[:-2], edges[1:-1], edges[2:], strict=True)
        ]
    )
    return np.log(np.maximum(np.abs(spectrum) ** 2 @ filters.T, 1e-6))


@pytest.mark.parametrize("samples", [480, 481, 639, 640, 1119, 1120, 4000, 15999, 16000, 16001, 20007])
@pytest.mark.parametrize("normalize", ["global", "utterance"])
def test_frame_count_is_one_and_a_hop_each_cut_to_a_multiple_of_four(samples, normalize):
    expected = (1 + samples // 160) // 4 * 4
    frontend = made(normalize)
    features, lengths = frontend(torch.randn(1, samples))
    assert features.shape == (1, expected, 80)
    assert lengths is None
    assert frontend.num_frames(samples) == expected
    _, lengths = frontend(torch.randn(2, samples), torch.ones(2))
    assert lengths.tolist() == [expected, expected]


@pytest.mark.parametrize("samples", [1, 160, 479])
def test_a_batch_without_a_frame_is_refused_but_a_short_neighbour_is_not(samples):
    frontend = made("global")
    assert frontend.num_frames(samples) == 0
    with pytest.raises(ValueError, match=f"{samples} samples are too short for a frame: give at least 480"):
        frontend(torch.randn(1, samples))
    _, lengths = frontend(torch.randn(2, 4000), torch.tensor([1.0, samples / 4000]))
    assert lengths.tolist() == [24, 0]


@pytest.mark.parametrize("samples", [480, 5000, 16000])
def test_features_equal_a_float64_computation(samples):
    time = torch.arange(samples) / 16000
    wav = 0.3 * torch.sin(2 * math.pi * 440 * time) + 0.05 * torch.randn(samples)
    features, _ = unnormalised()(wav[None])
    assert np.abs(features[0].numpy() - reference_log_mel(wav.numpy())).max() <= 1e-4


def test_silence_is_the_floor():
    features, _ = unnormalised()(torch.zeros(1, 1600))
    assert torch.allclose(features, torch.tensor(1e-6).log())


@pytest.mark.parametrize("normalize", ["global", "utterance"])
def test_features_do_not_depend_on_padding_or_neighbours(normalize, padded_with_junk, relative_difference):
    frontend = made(normalize)
    utterances, batch, wav_lens = padded_with_junk(LENGTHS)
    together, lengths = frontend(batch, wav_lens)
    for utterance, features, length in zip(utterances, together, lengths, strict=True):
        alone, _ = frontend(utterance[None])
        assert length == alone.shape[1] == frontend.num_frames(len(utterance))
        assert relative_difference(alone[0], features[:length]) <= 1e-5
        assert not features[length:].any()


@pytest.mark.parametrize("samples", range(16000, 16640, 80))
def test_the_last_tenth_of_a_second_counts(samples):
    frontend = unnormalised()
    wav = 0.1 * torch.randn(1, samples)
    changed = wav.clone()
    changed[:, -1600:] = 0.1 * torch.randn(1, 1600)
    difference = (frontend(wav)[0] - frontend(changed)[0]).abs().amax(dim=(0, 2))
    assert difference[-4:].min() > 0.1
    assert not difference[: (samples - 1600 - 200) // 160].any()


@pytest.mark.parametrize("normalize", ["global", "utterance"])
@pytest.mark.parametrize("wav_lens", [None, torch.tensor([1.0, 0.6])])
def test_autocast_changes_no_bit(normalize, wav_lens):
    frontend = made(normalize)
    wavs = 0.1 * torch.randn(2, 8000)
    expected, _ = frontend(wavs, wav_lens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features, _ = frontend(wavs, wav_lens)
    assert features.dtype == torch.float32
    assert torch.equal(features, expected)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 0.0), (torch.float16, 0.1)])
def test_features_are_float32_whatever_the_waveform(dtype, tolerance):
    frontend = made("utterance")
    wavs = 0.1 * torch.randn(1, 8000)
    features, _ = frontend(wavs.to(dtype))
    assert features.dtype == torch.float32
    assert (features - frontend(wavs)[0]).abs().max() <= tolerance


def test_utterance_normalisation_gives_mean_zero_and_variance_one():
    features, lengths = made("utterance")(0.1 * torch.randn(2, 16000), torch.tensor([1.0, 0.5]))
    for row, length in zip(features, lengths, strict=True):
        assert row[:length].mean(0).abs().max() <= 1e-5
        assert (row[:length].std(0, correction=0) - 1).abs().max() <= 1e-5


def test_a_bin_that_never_changes_is_not_blown_up():
    features, _ = made("utterance")(torch.zeros(1, 16000))
    assert features.abs().max() <= 1e-3


def test_measured_statistics_are_those_of_all_valid_frames(padded_with_junk):
    utterances, batch, wav_lens = padded_with_junk(LENGTHS)
    frontend = LogMel()
    more = 0.02 * torch.randn(1, 8000)
    frames = frontend.measure([(batch, wav_lens), (more, None)])
    every = np.concatenate([reference_log_mel(wav.numpy()) for wav in [*utterances, more[0]]])
    assert frames == len(every)
    assert np.abs(frontend.mean.numpy() - every.mean(0)).max() <= 1e-4
    assert np.abs(frontend.deviation.numpy() - every.std(0)).max() <= 1e-4


def test_statistics_of_what_is_no_number_are_refused():
    wavs = torch.randn(1, 8000)
    wavs[0, 4000] = float("nan")
    frontend = LogMel()
    with pytest.raises(ValueError, match="no numbers, or infinite"):
        frontend.measure([(wavs, None)])
    assert not frontend.measured


def test_statistics_travel_with_the_state_dict():
    wavs = 0.1 * torch.randn(1, 8000)
    measured = made("global")
    restored = LogMel()
    assert not restored.measured
    restored.load_state_dict(measured.state_dict())
    assert restored.measured
    assert torch.equal(restored(wavs)[0], measured(wavs)[0])


def test_an_unmeasured_front_end_refuses_to_run_even_after_a_round_trip():
    restored = LogMel()
    restored.load_state_dict(LogMel().state_dict())
    with pytest.raises(RuntimeError, match="no statistics"):
        restored(torch.randn(1, 8000))


def test_measuring_wants_global_normalisation_and_audio():
    with pytest.raises(ValueError, match="normalize='global'"):
        LogMel(normalize="utterance").measure([(torch.randn(1, 8000), None)])
    frontend = LogMel()
    with pytest.raises(ValueError, match="no audio"):
        frontend.measure([])
    assert not frontend.measured


@pytest.mark.parametrize("normalize", ["global", "utterance"])
def test_nothing_drifts_in_training(normalize):
    frontend = made(normalize).train()
    before = {name: buffer.clone() for name, buffer in frontend.named_buffers()}
    for loudness in (0.001, 1.0, 30.0):
        frontend(loudness * torch.randn(2, 8000), torch.tensor([1.0, 0.5]))
    after = dict(frontend.named_buffers())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_unknown_normalisation_is_refused():
    with pytest.raises(ValueError, match="'sentence'"):
        LogMel(normalize="sentence")


@given(st.integers(1, 40 * 16000).flatmap(lambda longest: st.tuples(st.integers(0, longest), st.just(longest))))
def test_relative_lengths_in_float32_give_the_integers_back(samples_and_longest):
    samples, longest = samples_and_longest
    relative = torch.tensor([samples]) / longest
    assert relative.dtype == torch.float32
    assert absolute_lengths(relative, longest).tolist() == [samples]


def test_lengths_of_the_other_kind_are_refused():
    """Of relative lengths one frame would be valid, of samples no padding be known: garbage without a word."""
    with pytest.raises(TypeError, match="whole numbers, not torch.float32"):
        valid_frames(torch.tensor([1.0, 0.5]), 10)
    with pytest.raises(TypeError, match="shares of the longest.*not torch.int64"):
        absolute_lengths(torch.tensor([16000, 8000]), 16000)


def test_valid_frames_are_the_first_ones():
    assert valid_frames(torch.tensor([0, 2, 3]), 3).tolist() == [[False] * 3, [True, True, False], [True] * 3]


@pytest.mark.parametrize("frames", [4, 8, 100])
@pytest.mark.parametrize("kernel_size", [3, 5])
def test_subsampling_makes_one_frame_of_four(frames, kernel_size):
    subsampling = ConvSubsampling(num_mels=80, d_model=16, channels=(8, 4), kernel_size=kernel_size)
    assert subsampling.factor == 4
    assert subsampling(torch.randn(2, frames, 80)).shape == (2, frames // 4, 16)


@pytest.mark.parametrize("kernel_size", [3, 5])
def test_subsampling_does_not_depend_on_padding(kernel_size, relative_difference):
    torch.manual_seed(0)
    subsampling = ConvSubsampling(num_mels=80, d_model=16, channels=(8, 4), kernel_size=kernel_size).eval()
    lengths = torch.tensor([25, 24, 13, 1])
    features = torch.randn(4, 100, 80).masked_fill(~valid_frames(4 * lengths, 100)[..., None], 0.0)
    together = subsampling(features, lengths)
    for row, subsampled, length in zip(features, together, lengths.tolist(), strict=True):
        alone = subsampling(row[None, : 4 * length])
        assert relative_difference(alone[0], subsampled[:length]) <= 1e-5


def test_subsampling_refuses_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="multiple of 4"):
        ConvSubsampling(num_mels=81)
    with pytest.raises(ValueError, match="odd"):
        ConvSubsampling(kernel_size=4)
