"""The weights of a layer mix are kept and drawn under their own epochs, by one process, also after a resumption."""

import json

import pytest
import torch

from speechbrain_bestrq import LayerMix, downstream
from speechbrain_bestrq.downstream import record_layer_weights


def make_mix(first):
    """A mix of two states whose first has this weight."""
    mix = LayerMix(2)
    with torch.no_grad():
        mix.weights.copy_(torch.tensor([first, 1 - first]).log())
    return mix


@pytest.fixture
def drawn(monkeypatch):
    """The histories that were drawn."""
    histories, draw = [], downstream.draw_layer_weights
    monkeypatch.setattr(
        downstream, "draw_layer_weights", lambda history, path: histories.append(history) or draw(history, path)
    )
    return histories


def kept(folder):
    """The first state's weight after each epoch."""
    history = json.loads((folder / "layer_weights.json").read_text())
    return [shares and pytest.approx(shares[0], abs=1e-6) for shares in history]


def test_each_epoch_adds_its_weights_and_one_that_is_done_again_takes_the_place_of_what_followed(tmp_path, drawn):
    for epoch, first in ((1, 0.5), (2, 0.6), (3, 0.7), (2, 0.8)):
        line = record_layer_weights(make_mix(first), epoch, tmp_path)
        assert line == f"layer weights, lowest first: {first:.3f} {1 - first:.3f}"
    assert kept(tmp_path) == [0.5, 0.8]
    assert [len(history) for history in drawn] == [1, 2, 3, 2] and drawn[-1][1] == pytest.approx([0.8, 0.2])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["layer_weights.json", "layer_weights.png"]


def test_epochs_that_nobody_recorded_stay_empty(tmp_path, drawn):
    record_layer_weights(make_mix(0.25), 3, tmp_path / "run")
    assert kept(tmp_path / "run") == [None, None, 0.25]
    assert all(share != share for shares in drawn[0][:2] for share in shares)  # not a number: not drawn


def test_other_ranks_write_nothing_and_say_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(downstream, "if_main_process", lambda: False)
    assert record_layer_weights(make_mix(0.5), 1, tmp_path) == "layer weights, lowest first: 0.500 0.500"
    assert not list(tmp_path.iterdir())
