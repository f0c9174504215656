"""A frozen encoder stays frozen through ``Brain.fit``, which calls ``modules.train()``."""

import pytest
import speechbrain as sb
import torch

from speechbrain_bestrq import PretrainedEncoder, WeightedEncoder, save_encoder


class RecordingBrain(sb.Brain):
    """Remembers the encoder's output and mode at each training step."""

    def compute_forward(self, batch, stage):
        """Encode; the head is one number for each channel."""
        encoded = self.modules.encoder(batch)
        if stage == sb.Stage.TRAIN:
            encoder = self.modules.encoder
            self.seen.append(encoded.detach().clone())
            self.modes |= {type(module).__name__ for module in encoder.modules() if module.training}
        return self.modules.head(encoded)

    def compute_objectives(self, predictions, batch, stage):
        """Drive the output to zero."""
        return predictions.square().mean()


@pytest.mark.parametrize("kind", [PretrainedEncoder, WeightedEncoder])
def test_fit_leaves_a_frozen_encoder_in_eval_mode(make_speech_encoder, tmp_path, kind):
    """Trap: ``Brain.fit`` puts a "frozen" lobe back into train mode, and its dropout and layer drop come back.

    Mutation: in pretrained.py, PretrainedEncoder.train, ``mode = False`` -> ``mode = True``.
    """
    speech_encoder = make_speech_encoder(dropout=0.5, layer_drop=0.5)
    encoder = kind(save_encoder(speech_encoder, tmp_path / "encoder", "# Card"), freeze=True)
    brain = RecordingBrain(
        {"encoder": encoder, "head": torch.nn.Linear(16, 1)},
        lambda parameters: torch.optim.SGD(parameters, 0.0),
        {},
        {"device": "cpu", "noprogressbar": True},
    )
    brain.seen, brain.modes = [], set()
    wavs = 0.1 * torch.randn(2, 8000, generator=torch.Generator().manual_seed(1))
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    brain.fit(range(1, 3), torch.utils.data.DataLoader([wavs, wavs], batch_size=None))
    assert all(torch.equal(brain.seen[0], one) for one in brain.seen)
    assert brain.modes <= {"WeightedEncoder", "LayerMix"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())


def test_what_is_partly_frozen_is_neither_dropped_nor_thawed_there(make_speech_encoder, tmp_path):
    """Trap: as above, for the lowest layers.

    Mutations: in pretrained.py, PretrainedEncoder.train, ``if _is_frozen(part):`` -> ``if False:``; in encoder.py,
    run_layers, ``if keep or not layer.training`` -> ``if keep``.
    """
    speech_encoder = make_speech_encoder(num_layers=3, dropout=0.5, layer_drop=0.5)
    folder = save_encoder(speech_encoder, tmp_path / "encoder", "# Card")
    encoder = PretrainedEncoder(folder, freeze_layers=2, output_all_hiddens=True).train()
    wavs = 0.1 * torch.randn(2, 8000, generator=torch.Generator().manual_seed(1))
    expected = PretrainedEncoder(folder, freeze=True, output_all_hiddens=True)(wavs)
    torch.manual_seed(1)
    for _ in range(5):
        states = encoder(wavs)
        assert torch.equal(states[:3], expected[:3])
        assert not torch.equal(states[3], expected[3])  # the layer above has its dropout
