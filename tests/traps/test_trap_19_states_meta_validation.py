"""The number of hidden states, the plainness of a checkpoint's meta, the shares of a validation, compilation."""

import numpy as np
import pytest
import torch
import yaml

from speechbrain_bestrq.batching import PaddedBatchSampler


def test_hidden_states_are_as_many_in_training_and_end_with_the_norm(toy):
    """Trap: with layer drop the hidden states vary in number, and they leave out the final norm.

    Mutations: in encoder.py, run_layers, ``states.append(layer(states[-1], valid) if keep or not layer.training else
    _skip(states[-1], layer))`` -> ``states += [layer(states[-1], valid)] if keep or not layer.training else []``; in
    encoder.py, ConformerEncoder.forward, ``states[-1] = self.norm(states[-1])`` -> ``states[-1] = states[-1]``.
    """
    encoder = toy.make_model(layer_drop=0.5).speech_encoder.encoder.train()
    torch.nn.init.constant_(encoder.norm.bias, 3.0)
    torch.manual_seed(1)
    for _ in range(8):
        states = encoder(torch.randn(2, 9, 16))
        assert len(states) == 3
        torch.testing.assert_close(states[-1].mean(-1), torch.full((2, 9), 3.0))
    # a dropped layer's parameters are in the graph all the same
    states[-1].sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


def test_a_checkpoints_meta_holds_plain_types(toy, tmp_path):
    """Trap: a tensor or a NumPy number in the meta cannot be read back.

    Mutation: in pretraining.py, PretrainingBrain.on_stage_end, ``{self._error_name: error}`` -> ``{self._error_name:
    torch.tensor(error)}``.
    """
    folder = toy.write_noise(tmp_path / "audio", [0.6, 0.7])
    toy.train(tmp_path / "run", folder, folder, epochs=1)
    texts = [path.read_text(encoding="utf-8") for path in (tmp_path / "run" / "save").glob("CKPT*/CKPT.yaml")]
    assert not any("!!" in text for text in texts)
    metas = [yaml.safe_load(text) for text in texts]
    assert len(metas) == 2 and all(type(meta["step"]) is int and type(meta["signature"]) is str for meta in metas)
    # the other was saved before the validation
    assert [type(meta["valid_loss"]) for meta in metas if "valid_loss" in meta] == [float]


def test_ranks_share_a_validation():
    """Trap: validation runs whole on every rank.

    Mutation: in batching.py, PaddedBatchSampler.__iter__, ``range(self.rank, len(self._bounds) - 1,
    self.world_size)`` -> ``range(len(self._bounds) - 1)``.
    """
    lengths = np.random.default_rng(1).integers(16000, 64000, 41)
    shares = [list(PaddedBatchSampler(lengths, 160000, rank=rank, world_size=3)) for rank in range(3)]
    heard = [index for share in shares for plan in share for index in plan.indices.tolist()]
    assert sorted(heard) == list(range(41))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("option", [False, True])
def test_compilation_goes_on_after_eight_shapes(toy, tmp_path, monkeypatch, option):
    """Trap: the option's default, False, compiles anew for each shape, and PyTorch silently stops after eight.

    Mutations: in pretraining.py, allow_many_shapes, ``max(torch._dynamo.config.recompile_limit, 1024)`` ->
    ``torch._dynamo.config.recompile_limit``; in pretraining.py, allow_many_shapes,
    ``max(torch._dynamo.config.accumulated_recompile_limit, 4096)`` ->
    ``torch._dynamo.config.accumulated_recompile_limit``.
    """
    given = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **named: given.append(named["dynamic"]))
    brain = toy.make_brain(
        tmp_path, toy.make_model(), checkpoints=False, compile=True, compile_using_dynamic_shape_tracing=option
    )
    with torch._dynamo.config.patch(recompile_limit=8, accumulated_recompile_limit=256):
        brain._compile()
        limit = min(torch._dynamo.config.recompile_limit, torch._dynamo.config.accumulated_recompile_limit // 2)
    assert given == [option, option]
    assert limit >= 100 * len(given), "fewer than a ladder's shapes for each layer"
