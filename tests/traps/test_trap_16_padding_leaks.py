"""What an utterance becomes does not depend on its padding."""

import pytest
import torch

from speechbrain_bestrq.frontend import ConvSubsampling


@pytest.mark.parametrize("attention", ["rotary", "relative"])
def test_hidden_states_in_a_padded_batch_are_those_alone(toy, attention):
    """Trap: padded frames become -3...-4 by normalisation and reach the convolutions; 17 % change in the last frames.

    Mutations: in encoder.py, ConvolutionModule.forward, ``if valid is not None:`` -> ``if False:``; in attention.py,
    RotaryAttention.forward, ``attn_mask=None if valid is None else valid[:, None, None]`` -> ``attn_mask=None``.
    """
    model = toy.make_model(normalize="global", attention=attention).eval()
    wavs = 0.1 * torch.randn(2, 24000, generator=torch.Generator().manual_seed(1))
    model.measure([(wavs, None)])
    # biases are zero in a new model, and hide what padding does
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.05, 0.3)
    wavs[0, 15000:] = 7.0  # what stands in the padding does not matter
    with torch.no_grad():
        together, lengths = model.encode(wavs, torch.tensor([15000 / 24000, 1.0]))
        alone, _ = model.encode(wavs[:1, :15000])
    assert lengths.tolist() == [23, 37]
    for ours, theirs in zip(alone[:, 0], together[:, 0, :23], strict=True):
        assert float((ours - theirs).abs().max() / ours.abs().max()) < 1e-5


def test_features_of_padding_are_zero(toy):
    """Trap: as above; what is padded is normalised like speech.

    Mutation: in frontend.py, LogMel.forward, ``if lengths is not None:`` -> ``if False:``.
    """
    for normalize in ("global", "utterance"):
        frontend = toy.make_model(normalize=normalize).speech_encoder.frontend
        wavs = 0.1 * torch.randn(2, 24000, generator=torch.Generator().manual_seed(1))
        if normalize == "global":
            frontend.measure([(wavs, None)])
        features, lengths = frontend(wavs, torch.tensor([0.6, 1.0]))
        assert not features[0, int(lengths[0]) :].any() and features[0, : int(lengths[0])].any()


def test_wide_convolutions_see_zeros_in_the_padding():
    """Trap: as above; a first convolution makes its bias of the padding, and a second one sees it.

    Mutation: in frontend.py, ConvSubsampling._block, ``if lengths is not None:`` -> ``if False:``.
    """
    torch.manual_seed(1)
    subsampling = ConvSubsampling(d_model=16, channels=(4, 4), kernel_size=5, dropout=0.0).eval()
    for parameter in subsampling.parameters():
        torch.nn.init.normal_(parameter, 0.05, 0.3)
    features = torch.randn(1, 40, 80)
    with torch.no_grad():
        alone = subsampling(features)
        padded = subsampling(torch.nn.functional.pad(features, (0, 0, 0, 12)), torch.tensor([10]))
    assert float((padded[:, :10] - alone).abs().max() / alone.abs().max()) < 1e-5
