"""Ranks draw different masks and noise, and hold the same quantizer."""

from pathlib import Path

import torch

from speechbrain_bestrq.batching import BatchPlan
from speechbrain_bestrq.quantizer import RandomProjectionQuantizer

RECIPE = Path(__file__).parents[2] / "recipes" / "LibriSpeech" / "pretrain" / "train.py"


def test_ranks_have_different_masks_and_noise(toy, tmp_path):
    """Trap: every rank has the same seed, hence equal masks and noise.

    Mutation: in pretraining_data.py, WaveformDataset.__getitems__, ``step = (self.seed, self.rank,`` -> ``step =
    (self.seed, 0,``.
    """
    table = toy.make_table(toy.write_noise(tmp_path / "audio", [2.0, 2.0]))
    model = toy.make_model()
    plan = BatchPlan(1, 0, 32000, torch.tensor([0, 1]).numpy(), torch.tensor([0, 0]).numpy())
    first, second, again = (toy.make_dataset(table, model, rank=rank).__getitems__(plan) for rank in (0, 1, 0))
    assert not torch.equal(first.masked.mask, second.masked.mask)
    assert first.noise_seed != second.noise_seed and first.dropout_seed != second.dropout_seed
    assert torch.equal(first.masked.mask, again.masked.mask) and first.noise_seed == again.noise_seed


def test_the_recipe_tells_the_training_data_its_rank(toy, load_script, tmp_path):
    """Trap: as above, where the recipe puts the parts together; validation masks are those of any number of ranks.

    Mutation: in recipes/LibriSpeech/pretrain/train.py, dataio_prepare, ``make_loader(training_waveforms(rank),`` ->
    ``make_loader(training_waveforms(0),``.
    """
    recipe = load_script(RECIPE)
    folder = toy.write_noise(tmp_path / "audio", [0.8] * 12)
    hparams = {
        "data_folder": folder, "output_folder": tmp_path / "run", "corpus": "folder", "extra_folders": [], "seed": 3,
        "sample_rate": 16000, "resample": True, "max_unreadable": 0, "min_seconds": 0.5, "max_seconds": 30.0,
        "max_batch_seconds": 5, "num_workers": 0, "cache": None, "statistics_hours": 1.0, "model": toy.make_model(),
    }  # fmt: skip
    manifests = recipe.prepare_corpus(hparams)
    loaders = [recipe.dataio_prepare(hparams, manifests, rank, 2)[:2] for rank in (0, 1)]
    assert [train.dataset.rank for train, _ in loaders] == [0, 1]
    assert [train.batch_sampler.rank for train, _ in loaders] == [0, 1]
    assert [(valid.dataset.rank, valid.dataset.seed) for _, valid in loaders] == [(0, 0), (0, 0)]
    assert [valid.batch_sampler.rank for _, valid in loaders] == [0, 1]
    # what statistics and centres are measured on is the same audio for any number of ranks, and so are the labels
    hparams["statistics_hours"] = 5 / 3600
    places = ((0, 1), (0, 2), (1, 2))
    one, *others = [[wavs for wavs, _ in recipe.dataio_prepare(hparams, manifests, *place)[2]()] for place in places]
    assert 0 < len(one) < 3
    for other in others:
        assert len(other) == len(one) and all(map(torch.equal, one, other))


def test_dropout_of_a_step_is_drawn_by_the_batchs_own_seed(toy, tmp_path, monkeypatch):
    """Trap: dropout and layer drop are the same in each step and on each rank.

    Mutation: in pretraining.py, PretrainingBrain.fit_batch, ``torch.manual_seed(batch.dropout_seed)`` ->
    ``torch.manual_seed(self.hparams.seed)``.
    """
    model = toy.make_model(dropout=0.1)
    waves = [0.1 * torch.randn(9600) for _ in range(4)]
    batches = [toy.make_batch(model, [wave], rank=number % 2, number=number // 2) for number, wave in enumerate(waves)]
    used = []
    forward = toy.PretrainingBrain.compute_forward

    def noting(brain, batch, stage):
        used.append(torch.initial_seed())
        return forward(brain, batch, stage)

    monkeypatch.setattr(toy.PretrainingBrain, "compute_forward", noting)
    toy.fit_batches(tmp_path, model, batches)
    assert used == [batch.dropout_seed for batch in batches] and len(set(used)) == 4


def test_the_quantizer_is_the_same_on_all_ranks():
    """Trap: a quantizer drawn from the global generator, which no DDP broadcasts, is another one on each rank.

    Mutation: in quantizer.py, RandomProjectionQuantizer._draw, ``torch.Generator(device="cpu").manual_seed(self.seed)``
    -> ``None``.
    """
    torch.manual_seed(1)
    first = RandomProjectionQuantizer(320, codebook_size=64, seed=5)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    second = RandomProjectionQuantizer(320, codebook_size=64, seed=5)
    assert torch.equal(first.codebooks, second.codebooks) and torch.equal(first.projection, second.projection)
    # and building it takes nothing from the global generator
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)
