"""The frames of an utterance begin at its first sample, whatever the batch."""

import torch


def test_the_labels_of_an_utterance_are_the_same_in_another_batch(toy):
    """Trap: features are padded on the left by the batch's length modulo 4: 77-92 % other labels.

    Mutation: in frontend.py, LogMel._log_mel, ``[:, :num_frames]`` -> ``[:, -num_frames:]``.
    """
    model = toy.make_model(normalize="global", codebook_size=8192)
    generator = torch.Generator().manual_seed(1)
    wavs = 0.1 * torch.randn(2, 16000 + 480, generator=generator)
    model.measure([(wavs, None)])

    def labels(wavs, lengths=None):
        features, _ = model.speech_encoder.frontend(wavs, lengths)
        return model.quantizer(features.unflatten(1, (-1, 4)).flatten(2))[0, :, 0]

    # 97 feature frames alone, cut to 96; 98, 99, 100 and 101 in other company
    alone = labels(wavs[:1, :15360])
    for samples in (15520, 15680, 15840, 16000):
        beside = labels(wavs[:, :samples], torch.tensor([15360 / samples, 1.0]))
        assert (beside[: len(alone)] == alone).float().mean() > 0.99
