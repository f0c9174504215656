"""Features are normalised before they are quantized."""

import numpy as np
import torch


def test_normalised_features_use_the_codebook(toy):
    """Trap: without mean and variance normalisation the codebook collapses (7 codes for 1600 frames).

    Mutation: in frontend.py, LogMel.forward, ``features = (features - self.mean) / self.deviation`` -> ``pass``.
    """
    # bursts of noise of changing colour, quiet as speech is
    generator = np.random.default_rng(1)
    pieces = []
    for _ in range(160):
        wave = np.fft.rfft(generator.standard_normal(3200))
        places = np.linspace(0, len(wave), 8)
        colour = np.exp(0.5 * np.interp(np.arange(len(wave)), places, generator.standard_normal(8)))
        pieces.append(0.005 * np.exp(0.3 * generator.standard_normal()) * np.fft.irfft(wave * colour))
    wavs = torch.from_numpy(np.concatenate(pieces)).float().clamp(-1, 1).view(4, -1)
    model = toy.make_model(normalize="global", codebook_size=8192)
    model.measure([(wavs, None)])
    features, _ = model.speech_encoder.frontend(wavs)
    labels = model.quantizer(features.unflatten(1, (-1, 4)).flatten(2))
    assert labels.numel() == 800
    assert len(labels.unique()) > 300
