"""Properties of labels that are the nearest centre of k-means."""

import pytest
import torch

from speechbrain_bestrq import centroids as module
from speechbrain_bestrq.bestrq import BestRQ
from speechbrain_bestrq.centroids import CentroidQuantizer, nearest_centres
from speechbrain_bestrq.masking import SpanMasking

DIM = 32


def clusters(count=3000, number=6, seed=0):
    """Frames in so many tight clusters of a few directions, with noise in the others; and which each belongs to."""
    generator = torch.Generator().manual_seed(seed)
    centres = 10 * torch.randn(number, 4, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(number, (count,), generator=generator)
    frames = torch.cat([centres[labels], torch.zeros(count, DIM - 4)], 1)
    return frames + 0.1 * torch.randn(count, DIM, generator=generator) + 5.0, labels


def agreement(labels, truth):
    """The share of frames whose label's commonest class is theirs, and of classes whose commonest label is theirs."""
    table = torch.zeros(int(labels.max()) + 1, int(truth.max()) + 1)
    table.index_put_((labels, truth), torch.ones(len(labels)), accumulate=True)
    return float(table.amax(1).sum() / len(labels))


def test_labels_are_the_nearest_centres_of_a_brute_force():
    frames, _ = clusters()
    quantizer = CentroidQuantizer(DIM, 4, codebook_size=16, utterance_norm=False, seed=3)
    quantizer.fit([frames])
    projected = (frames.double() - frames.double().mean(0)) @ quantizer.projection[0].double()
    expected = torch.cdist(projected, quantizer.codebooks[0].double()).argmin(1)
    assert (quantizer(frames)[:, 0] == expected).double().mean() > 0.9999


def test_what_lies_together_is_labelled_alike():
    frames, truth = clusters()
    quantizer = CentroidQuantizer(DIM, 4, codebook_size=24, utterance_norm=False)
    quantizer.fit([frames])
    others, their_truth = clusters(seed=5)
    assert agreement(quantizer(others)[:, 0], their_truth) > 0.99


def test_centres_lie_in_the_middle_of_their_frames():
    frames, _ = clusters()
    quantizer = CentroidQuantizer(DIM, 4, codebook_size=12, utterance_norm=False, iterations=100)
    quantizer.fit([frames])
    labels = quantizer(frames)[:, 0]
    projected = (frames - frames.mean(0)) @ quantizer.projection[0]
    for label in labels.unique():
        middle = projected[labels == label].mean(0)
        torch.testing.assert_close(quantizer.codebooks[0, label], middle, atol=2e-3, rtol=1e-3)


def test_chunks_of_frames_change_no_label(monkeypatch):
    frames, centres = clusters()[0], clusters(20, seed=1)[0]
    whole = nearest_centres(frames, centres)
    monkeypatch.setattr(module, "CHUNK_SCORES", 7 * 20)
    assert torch.equal(nearest_centres(frames, centres), whole)


def test_fitting_is_a_function_of_the_seed_alone_and_leaves_the_global_generator_alone():
    frames, _ = clusters()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    labels = {}
    for name, seed, parts in (("first", 1, 3000), ("again", 1, 100), ("other", 2, 3000)):
        quantizer = CentroidQuantizer(DIM, 4, codebook_size=16, seed=seed, utterance_norm=False)
        quantizer.fit(frames.split(parts))
        labels[name] = quantizer(frames)
    assert torch.equal(labels["first"], labels["again"]) and not torch.equal(labels["first"], labels["other"])
    assert torch.equal(torch.get_rng_state(), before)


def test_autocast_changes_no_label():
    frames, _ = clusters()
    quantizer = CentroidQuantizer(DIM, 4, codebook_size=64, utterance_norm=False)
    quantizer.fit([frames])
    with torch.autocast("cpu", torch.bfloat16):
        labels = quantizer(frames.bfloat16().float())
    assert torch.equal(labels, quantizer(frames.bfloat16().float()))


def test_a_state_dict_restores_the_labels_and_what_is_not_measured_refuses():
    frames, _ = clusters()
    quantizer = CentroidQuantizer(DIM, 4, codebook_size=16)
    quantizer.fit([frames])
    other = CentroidQuantizer(DIM, 4, codebook_size=16, seed=9)
    unmeasured = {name: buffer.clone() for name, buffer in other.state_dict().items()}
    with pytest.raises(RuntimeError, match="CentroidQuantizer has not been measured"):
        other(frames[None])
    other.load_state_dict(quantizer.state_dict())
    assert torch.equal(other(frames[None]), quantizer(frames[None]))
    assert not list(quantizer.parameters())
    again = CentroidQuantizer(DIM, 4, codebook_size=16)
    again.load_state_dict(unmeasured)
    assert not again.measured


def test_many_frames_are_thinned_out_over_all_the_audio(monkeypatch):
    frames, _ = clusters()
    monkeypatch.setattr(module, "MOST_FRAMES", 1000)
    thinned = CentroidQuantizer(DIM, 4, codebook_size=16, utterance_norm=False)
    thinned.fit([frames])
    expected = CentroidQuantizer(DIM, 4, codebook_size=16, utterance_norm=False)
    expected.fit([frames[::3]])
    assert torch.equal(thinned.codebooks, expected.codebooks)


def test_bad_sizes_are_refused():
    for number in (33, 0):
        with pytest.raises(ValueError, match="num_components is 1 to 32"):
            CentroidQuantizer(DIM, number)
    with pytest.raises(ValueError, match="10 frames are too few to find 16 centres"):
        CentroidQuantizer(DIM, 4, codebook_size=16).fit([clusters(10)[0]])


def test_a_model_measures_it_and_predicts_its_labels(make_speech_encoder, padded_with_junk):
    model = BestRQ(make_speech_encoder(), CentroidQuantizer(320, codebook_size=32), SpanMasking(0.6, 1, grid=True))
    assert not model.measured
    utterances, wavs, wav_lens = padded_with_junk([40000, 30000, 20000] * 3)
    model.measure([(wavs, wav_lens)])
    assert model.measured
    frontend = model.speech_encoder.frontend
    alone = [model.quantizer.prepare(frontend(one[None])[0].reshape(1, -1, 320))[0] for one in utterances]
    expected = CentroidQuantizer(320, codebook_size=32)
    expected.fit([torch.cat(alone)])
    torch.testing.assert_close(model.quantizer.projection.abs(), expected.projection.abs(), atol=1e-3, rtol=1e-2)
    output = model(wavs, wav_lens, generator=torch.Generator().manual_seed(0))
    assert output.loss.item() < 1.3 * torch.tensor(32.0).log().item()
    assert model.signature()["quantizer"]["quantizer"] == "CentroidQuantizer"
