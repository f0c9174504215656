"""Labels are computed in float32, whatever precision the encoder trains in."""

import torch

from speechbrain_bestrq.quantizer import RandomProjectionQuantizer


def test_labels_under_autocast_are_those_without(toy):
    """Trap: under autocast the projection runs in bf16 and about 1 % of the labels change.

    Mutation: in quantizer.py, RandomProjectionQuantizer.forward, ``with full_precision(x.device.type):`` ->
    ``if True:``; or in frontend.py, LogMel.forward, the same line in the same way.
    """
    quantizer = RandomProjectionQuantizer(320)
    frontend = toy.make_model().speech_encoder.frontend
    wavs = torch.randn(2, 64000, generator=torch.Generator().manual_seed(1))

    def labels():
        features, _ = frontend(wavs)
        return quantizer(features.unflatten(1, (-1, 4)).flatten(2))

    expected = labels()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(labels(), expected)
