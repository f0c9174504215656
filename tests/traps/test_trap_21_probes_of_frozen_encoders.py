"""A probe's frozen encoder gets its padding mask, and no gradient is computed for it."""

import torch

from speechbrain_bestrq import WeightedEncoder, save_encoder


def test_a_frozen_encoder_sees_no_padding(make_speech_encoder, padded_with_junk, relative_difference, tmp_path):
    """Trap: the encoder is called without lengths, and what stands in the padding changes the result.

    Mutation: in downstream.py, WeightedEncoder.forward, ``self.encoder(wav, wav_lens)`` -> ``self.encoder(wav)``.
    """
    encoder = WeightedEncoder(save_encoder(make_speech_encoder(), tmp_path / "encoder", "# Card"), freeze=True)
    utterances, batch, wav_lens = padded_with_junk([16000, 9000])
    together = encoder(batch, wav_lens)
    alone = encoder(utterances[1][None])
    assert relative_difference(alone[0], together[1, : alone.shape[1]]) < 1e-5
    assert not together[1, alone.shape[1] :].any()


def test_a_frozen_encoder_costs_no_backward_pass(make_speech_encoder, tmp_path):
    """Trap: the gradients of a frozen encoder are computed, and what they need is kept.

    Mutation: in pretrained.py, PretrainedEncoder, ``self.freeze = freeze`` -> ``self.freeze = freeze = False``.
    """
    encoder = WeightedEncoder(save_encoder(make_speech_encoder(), tmp_path / "encoder", "# Card"), freeze=True).train()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda x: x):
        encoded = encoder(0.1 * torch.randn(2, 8000))
    assert len(kept) <= 3  # the mix's softmax, its weights and the hidden states
    encoded.square().mean().backward()
    trained = [name for name, parameter in encoder.named_parameters() if parameter.grad is not None]
    assert trained == ["mix.weights"] and encoder.weights.grad.any()
