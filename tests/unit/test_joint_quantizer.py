"""Properties of several quantizers side by side."""

import pytest
import torch

from speechbrain_bestrq.bestrq import BestRQ
from speechbrain_bestrq.centroids import CentroidQuantizer
from speechbrain_bestrq.joint_quantizer import JointQuantizer
from speechbrain_bestrq.masking import SpanMasking
from speechbrain_bestrq.quantizer import RandomProjectionQuantizer

DIM, CODES = 32, 16


def parts(seed=0):
    """One that sees normalised utterances, one that sees them as they are, and one of two codebooks."""
    return [
        CentroidQuantizer(DIM, 4, CODES, seed=seed, utterance_norm=True),
        CentroidQuantizer(DIM, 4, CODES, seed=seed, utterance_norm=False),
        RandomProjectionQuantizer(DIM, 8, CODES, num_codebooks=2, seed=seed),
    ]


def fitted(frames):
    joint = JointQuantizer(parts())
    joint.fit([joint.prepare(frames)])
    return joint


def test_each_labels_as_it_would_alone():
    frames = torch.randn(3, 400, DIM) + torch.randn(3, 1, DIM)
    lengths = torch.tensor([400, 100, 37])
    joint, alone = fitted(frames), parts()
    for one in alone[:2]:
        one.fit([one.prepare(frames)])
    assert joint.num_codebooks == 4 and joint.codebook_size == CODES and joint.measured
    together = joint(frames, lengths)
    for number, length in enumerate(lengths):  # what stands in the padding means nothing
        expected = torch.cat([one(frames[number : number + 1, :length]) for one in alone], -1)
        assert torch.equal(together[number : number + 1, :length], expected)


def test_frames_chosen_from_prepared_utterances_keep_their_labels():
    frames = torch.randn(2, 300, DIM)
    joint = fitted(frames)
    chosen = torch.tensor([5, 17, 299])
    assert joint.pointwise
    assert torch.equal(joint.label(joint.prepare(frames)[1, chosen]), joint(frames)[1, chosen])
    overtime = RandomProjectionQuantizer(DIM, 8, CODES, normalize="time")
    assert not JointQuantizer([overtime, RandomProjectionQuantizer(DIM, 8, CODES)]).pointwise


def test_a_state_dict_restores_the_labels_and_what_is_not_measured_refuses():
    frames = torch.randn(2, 300, DIM)
    joint, other = fitted(frames), JointQuantizer(parts())
    assert not other.measured
    with pytest.raises(RuntimeError, match="CentroidQuantizer has not been measured"):
        other(frames)
    other.load_state_dict(joint.state_dict())
    assert other.measured and torch.equal(other(frames), joint(frames))
    half = JointQuantizer(parts())
    half.quantizers[0].load_state_dict(joint.quantizers[0].state_dict())
    unmeasured = half.state_dict()
    again = JointQuantizer(parts())
    again.load_state_dict(unmeasured)
    assert not again.measured


def test_twins_are_refused_where_both_would_be_predicted_from_one_state(make_speech_encoder):
    def model(seed, states):
        quantizers = [RandomProjectionQuantizer(320, 8, CODES, num_codebooks=2, seed=one) for one in (0, seed)]
        masking = SpanMasking(0.5, 1)
        return BestRQ(make_speech_encoder(), JointQuantizer(quantizers), masking, codebook_states=states)

    with pytest.raises(ValueError, match="two quantizers are the same.*different seeds"):
        model(0, [2, 2, 2, 2])
    assert model(1, [2, 2, 2, 2]).quantizer.num_codebooks == model(0, [2, 2, 2, 1]).quantizer.num_codebooks == 4


def test_settings_tell_every_part():
    settings = JointQuantizer(parts()).settings()
    assert settings["quantizer"] == "JointQuantizer"
    assert settings["quantizers"] == [one.settings() for one in parts()]
    assert JointQuantizer(parts(1)).settings() != settings


def test_sizes_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"one input_dim and one codebook_size, not \(32, 8\), \(32, 16\)"):
        JointQuantizer([CentroidQuantizer(DIM, 4, 16), CentroidQuantizer(DIM, 4, 8)])
    with pytest.raises(ValueError, match="not none"):
        JointQuantizer([])


def test_a_model_measures_it_and_predicts_the_labels_of_each(make_speech_encoder, padded_with_junk):
    joint = JointQuantizer(
        [CentroidQuantizer(320, codebook_size=32), CentroidQuantizer(320, codebook_size=32, utterance_norm=False)]
    )
    model = BestRQ(make_speech_encoder(), joint, SpanMasking(0.6, 1, grid=True))
    assert not model.measured
    utterances, wavs, wav_lens = padded_with_junk([40000, 30000, 20000] * 3)
    model.measure([(wavs, wav_lens)])
    assert model.measured
    # labels do not depend on the padding
    frontend = model.speech_encoder.frontend
    features, lengths = frontend(wavs, wav_lens)
    stacked = features.unflatten(1, (-1, 4)).flatten(2)
    together = joint(stacked, lengths // 4)
    for number, one in enumerate(utterances):
        alone = joint(frontend(one[None])[0].unflatten(1, (-1, 4)).flatten(2))[0]
        agree = (alone == together[number, : len(alone)]).double().mean()
        assert agree > 0.999
    output = model(wavs, wav_lens, generator=torch.Generator().manual_seed(0))
    assert output.metrics["label_counts"].shape == (2, 32)
    assert (output.metrics["label_counts"].sum(1) == output.num_targets).all()
    assert output.loss.item() < 1.3 * torch.tensor(32.0).log().item()
    output.loss.backward()
    assert model.head.weight.grad.view(2, 32, -1).abs().sum((1, 2)).gt(0).all()
