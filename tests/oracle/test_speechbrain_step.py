"""Our step against SpeechBrain's BEST-RQ step: the same features, mask, noise and weights give the same labels, loss
and gradients."""

import importlib.util
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
D_MODEL, HEADS, CODES = 64, 4, 256


@pytest.fixture(scope="module", autouse=True)
def benchmarks_are_found():
    """They import one another, as scripts of one folder do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield


def load(name):
    """A module of the benchmarks."""
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def opponent():
    """What puts SpeechBrain's step together."""
    return load("speechbrain_step")


@pytest.fixture(scope="module")
def equivalence():
    """What compares both."""
    return load("equivalence")


def test_loss_labels_and_gradients_equal_speechbrains(equivalence):
    found = equivalence.compare(*equivalence.make_pair())
    assert found.labels_equal and found.loss_difference <= 1e-6
    assert found.least_cosine > 0.9999 and found.norm_difference <= 1e-4 and found.holds
    assert found.labels_used > 10, "labels that are all alike would prove nothing"


def test_another_weight_label_or_mask_is_noticed(equivalence):
    theirs, ours, batch = equivalence.make_pair()
    with torch.no_grad():
        ours.head.weight[0] += 0.1
    assert not equivalence.compare(theirs, ours, batch).holds
    theirs, ours, batch = equivalence.make_pair()
    ours.quantizer.codebooks.copy_(ours.quantizer.codebooks.flip(1))
    assert not equivalence.compare(theirs, ours, batch).labels_equal


def test_their_brain_takes_a_step(opponent, tmp_path):
    torch.manual_seed(0)
    model = opponent.SpeechBrainBestRQ(D_MODEL, 1, HEADS, 128, CODES, channels=(8, 4))
    brain = opponent.SpeechBrainBestRQBrain(
        {"model": model}, lambda parameters: torch.optim.AdamW(parameters, lr=1e-3), run_opts={"device": "cpu"}
    )
    brain.on_fit_start()
    brain.step = 0
    before = model.linear.w.weight.detach().clone()
    loss = brain.fit_batch(opponent.make_batch(0.1 * torch.randn(2, 16000)))
    assert loss.isfinite()
    assert not torch.equal(model.linear.w.weight, before)
