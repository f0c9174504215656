"""Labels are computed in float32, whatever precision the encoder trains in."""

import torch

from speechbrain_bestrq.quantizer import RandomProjectionQuantizer


def test_labels_under_autocast_are_those_without(toy):
    """Trap: under autocast the projection runs in bf16 and about 1 % of the labels change.

    Mutations: in quantizer.py, FrameQuantizer.label, ``with full_precision(x.device.type):`` -> ``if True:``; in
    frontend.py, LogMel.forward, ``with full_precision(wavs.device.type):`` -> ``if True:``.
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


def test_the_models_labels_under_autocast_are_those_without(toy):
    """Trap: as above, where the model puts front end and quantizer together.

    Mutation: in bestrq.py, BestRQ.forward, before ``labels = self._label(`` add ``features =
    features.to(torch.get_autocast_dtype("cpu")).float() if torch.is_autocast_enabled("cpu") else features``.
    """
    model = toy.make_model(codebook_size=8192).eval()
    wavs = torch.randn(2, 256000, generator=torch.Generator().manual_seed(1))

    def label_counts():
        generator = torch.Generator().manual_seed(2)
        mask = model.masking(model.speech_encoder.num_frames(torch.tensor([256000, 256000])), 400, generator)
        return model(wavs, mask=mask, generator=generator).metrics["label_counts"]

    expected = label_counts()
    assert int(expected.sum()) > 50
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(label_counts(), expected)
