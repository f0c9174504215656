"""A step never waits for the device."""

import numpy as np
import pytest
import torch

from speechbrain_bestrq import encoder
from speechbrain_bestrq.accounting import LateReader


@pytest.mark.parametrize("method", ["bestrq", "wav2vec2"])
def test_a_step_off_the_log_line_reads_nothing_back(method, toy, tmp_path, monkeypatch, readings):
    """Trap: the finite check before the backward pass and ``loss.cpu()`` make the host wait twice a micro-batch.

    Mutations: in pretraining.py, PretrainingBrain.fit_batch, ``return self.shown_loss`` -> ``return
    torch.tensor(loss.tolist())``; in bestrq.py, BestRQ.forward, before ``labels = self._label(`` add ``mask =
    MaskedFrames.from_mask(mask.mask)``; in contrastive.py, contrastive_loss, before ``drawn = negatives.clamp(min=0)``
    add ``masked.mask.nonzero()``.
    """
    model = toy.make_model(method, dropout=0.1, layer_drop=0.2)
    waves = np.random.default_rng(1).standard_normal((6, 2, 9600))
    batches = [toy.make_batch(model, list(pair), number=number) for number, pair in enumerate(waves)]
    # one batch is padded
    batches[3] = toy.make_batch(model, [waves[3, 0], waves[3, 1, :6400]], number=3)
    steps = []
    fit_batch = toy.PretrainingBrain.fit_batch

    def watched(brain, batch):
        readings.clear()
        with toy.Waits() as waits:
            loss = fit_batch(brain, batch)
        waits.found += readings
        steps.append((brain.step, waits))
        return loss

    monkeypatch.setattr(toy.ToyBrain, "fit_batch", watched)
    # the layers to drop are drawn on the host, and read there: no wait
    monkeypatch.setattr(encoder, "draw_kept", lambda layers, layer_drop: [number % 2 == 0 for number in range(layers)])
    toy.fit_batches(tmp_path, model, batches, accumulation=2, log_interval=5, max_grad_norm=1.0)
    assert len(steps) == 6
    assert all(waits.operations > 100 for _, waits in steps)
    assert {number: waits.found for number, waits in steps if waits.found} == {}


def test_a_step_with_a_log_line_only_starts_to_read_back(toy, tmp_path, monkeypatch, readings):
    """Trap: as above; the log's values are read when they have arrived, and the filters of the front end are made once.

    Mutations: in pretraining.py, PretrainingBrain.on_fit_batch_end, ``_write_log_lines(wait=False)`` ->
    ``_write_log_lines(wait=True)``; in pretraining.py, PretrainingBrain._submit_log_line, ``"learning_rate":`` ->
    ``"norm": self.account.gradient_norm.tolist(), "learning_rate":``.
    """
    model = toy.make_model()
    monkeypatch.setattr("torchaudio.functional.melscale_fbanks", None)
    waves = np.random.default_rng(1).standard_normal((6, 1, 9600))
    batches = [toy.make_batch(model, list(wave), number=number) for number, wave in enumerate(waves)]
    asked, within = [], []
    fit_batch, submit = toy.PretrainingBrain.fit_batch, LateReader.submit
    submitted = []

    def watched(brain, batch):
        asked.clear()
        readings.clear()
        with toy.Waits() as waits:
            loss = fit_batch(brain, batch)
        within.append((list(asked), waits.found + readings))
        return loss

    monkeypatch.setattr(toy.ToyBrain, "fit_batch", watched)
    monkeypatch.setattr(LateReader, "submit", lambda *all: submitted.append(1) or submit(*all))
    monkeypatch.setattr(LateReader, "ready", lambda reader, wait=False: asked.append(wait) or iter(()))
    toy.fit_batches(tmp_path, model, batches, log_interval=1)
    assert len(submitted) == 6
    assert within == [([False], [])] * 6
    assert asked[-1]  # at the end of the epoch it does wait


def test_a_batch_is_copied_without_waiting(toy, monkeypatch):
    """Trap: blocking copies: the host waits until a batch has reached the device.

    Mutation: in pretraining_data.py, PretrainingBatch.to, ``non_blocking: bool = True`` -> ``non_blocking: bool =
    False``.
    """
    batch, waited, to = toy.make_batch(toy.make_model(), [np.zeros(9600)]), [], torch.Tensor.to

    def noted(tensor, *arguments, **named):
        waited.append(not named.get("non_blocking"))
        return to(tensor, *arguments, **named)

    monkeypatch.setattr(torch.Tensor, "to", noted)
    batch.to("cpu")
    assert len(waited) >= 3 and not any(waited)


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.tolist(),
        torch.Tensor.item,
        lambda x: x[x > 1],
        lambda x: bool(x.sum()),
        lambda x: x.to("cpu"),
        lambda x: x.to(device="cpu", dtype=torch.float64),
    ],
)
def test_what_reads_back_is_noted(read, readings, toy):
    with toy.Waits() as waits:
        read(torch.ones(1))
    assert waits.found or readings


@pytest.fixture
def readings(monkeypatch):
    """Calls that bring values to the host and that PyTorch does not dispatch on a CPU, as they come."""
    found = []

    def noting(name, method):
        def noted(*arguments, **named):
            found.append(name)
            return method(*arguments, **named)

        return noted

    for name in ("tolist", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, noting(name, getattr(torch.Tensor, name)))
    to = torch.Tensor.to

    def noted_to(tensor, *arguments, **named):
        # a device that is no text may be the tensor's own, which here is the CPU
        if "cpu" in (*arguments[:1], named.get("device")) and not named.get("non_blocking"):
            found.append("to")
        return to(tensor, *arguments, **named)

    monkeypatch.setattr(torch.Tensor, "to", noted_to)
    return found
