"""Labels of a frame depend on that frame: they are normalised over features, not over time."""

import torch

from speechbrain_bestrq.quantizer import RandomProjectionQuantizer


def test_a_frames_label_does_not_change_with_the_frames_beside_it():
    """Trap: projected frames are normalised over the time axis, so that labels change with the utterance's length.

    Mutation: in quantizer.py, RandomProjectionQuantizer._label, ``if self.normalize == "time":`` -> ``if True:``.
    """
    quantizer = RandomProjectionQuantizer(320, codebook_size=512)
    frames = torch.randn(2, 60, 320, generator=torch.Generator().manual_seed(1))
    labels = quantizer(frames)
    assert torch.equal(quantizer(frames[:, :30]), labels[:, :30])
    assert torch.equal(quantizer(torch.nn.functional.pad(frames, (0, 0, 0, 40)))[:, :60], labels)
    # the paper's runs can still be redone
    over_time = RandomProjectionQuantizer(320, codebook_size=512, normalize="time")
    assert not torch.equal(over_time(frames[:, :30]), over_time(frames)[:, :30])
