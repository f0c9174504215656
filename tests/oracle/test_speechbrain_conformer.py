"""Our relative Conformer against SpeechBrain's, weight by weight."""

import pytest
import torch
from speechbrain.lobes.models.transformer.Conformer import ConformerEncoder as SpeechBrainConformer
from speechbrain.nnet.attention import RelPosEncXL

from speechbrain_bestrq.convert import conformer_from_speechbrain
from speechbrain_bestrq.encoder import ConformerEncoder


def both_encoders(d_model=64, num_heads=4, num_layers=3, d_ffn=128):
    """SpeechBrain's encoder with random weights of every kind, and ours with the same."""
    torch.manual_seed(0)
    theirs = SpeechBrainConformer(
        num_layers=num_layers, d_model=d_model, d_ffn=d_ffn, nhead=num_heads, activation=torch.nn.GELU
    )
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, 0.05, 0.2)
    ours = ConformerEncoder(d_model, num_layers, num_heads, d_ffn, dropout=0.0, attention="relative")
    ours.load_state_dict(conformer_from_speechbrain(theirs.state_dict(), num_heads))
    return theirs.eval(), ours.eval()


@pytest.mark.parametrize("frames", [1, 2, 37, 120])
def test_output_equals_speechbrains_on_unpadded_input(frames):
    theirs, ours = both_encoders()
    x = torch.randn(2, frames, 64)
    expected, _ = theirs(x, pos_embs=RelPosEncXL(64)(x))
    states = ours(x)
    assert (states[-1] - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert torch.equal(states[0], x)


def test_gradients_equal_speechbrains():
    theirs, ours = both_encoders(num_layers=2)
    x = torch.randn(2, 30, 64)
    target = torch.randn(2, 30, 64)
    (theirs(x, pos_embs=RelPosEncXL(64)(x))[0] * target).sum().backward()
    (ours(x)[-1] * target).sum().backward()
    expected = conformer_from_speechbrain({n: p.grad for n, p in theirs.named_parameters()}, 4)
    for name, parameter in ours.named_parameters():
        difference = (parameter.grad - expected[name]).abs().max()
        assert difference <= 1e-4 * expected[name].abs().max(), name


def test_the_position_table_grows_without_a_change():
    _, ours = both_encoders()
    x = torch.randn(1, 50, 64)
    expected = ours(x)[-1]
    for layer in ours.layers:
        layer.attention._tabulate(8)
    assert torch.allclose(ours(x)[-1], expected, atol=1e-6)


def test_a_foreign_weight_is_refused_by_name():
    with pytest.raises(KeyError, match=r"layers.0.mha_layer.in_proj_bias"):
        conformer_from_speechbrain({"layers.0.mha_layer.in_proj_bias": torch.ones(3)}, 2)
