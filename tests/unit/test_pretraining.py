"""Properties of the pre-training Brain, on a model of a few thousand parameters."""

import json
import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import speechbrain as sb
import torch
from speechbrain.utils.run_opts import RunOptions

from speechbrain_bestrq import pretraining
from speechbrain_bestrq.artefact import load_encoder
from speechbrain_bestrq.checkpointing import AtomicCheckpointer
from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.pretraining_model import PretrainingModel
from speechbrain_bestrq.report import summarise
from speechbrain_bestrq.resuming import load_state, save_state
from speechbrain_bestrq.run_log import read_run
from speechbrain_bestrq.run_options import OF_PRETRAINING, check_counts, check_run_options

RATE = 16000

#: What a training line and a validation line of the log hold.
TRAIN_FIELDS = set(
    "event step epoch loss accuracy gain unigram_entropy commonest_share codes_used code_perplexity mask_ratio "
    "gradient_norm learning_rate audio_seconds_per_second audio_hours device_hours gflops_per_second utilisation "
    "peak_memory_gb data_wait_share saving_seconds eta_hours skipped_updates rewinds".split()
)
VALID_FIELDS = set(
    "event step epoch loss accuracy gain unigram_entropy commonest_share codes_used code_perplexity mask_ratio "
    "audio_hours device_hours seconds".split()
)


def waves(*seconds, seed=0):
    """White noise of so many seconds each."""
    generator = np.random.default_rng(seed)
    return [0.1 * generator.standard_normal(round(duration * RATE)).astype(np.float32) for duration in seconds]


def difference(state, other):
    """The largest difference between two models' parameters, relative to the largest of each."""
    assert state.keys() == other.keys()
    return max(
        float((tensor - other[name]).abs().max() / tensor.abs().max().clamp(min=1e-3))
        for name, tensor in state.items()
        if tensor.is_floating_point()
    )


@pytest.fixture(scope="module")
def corpus(toy, tmp_path_factory):
    """Folders of 16 utterances to train on (5 batches in one process, 6 in two) and 5 to validate on."""
    folder = tmp_path_factory.mktemp("corpus")
    seconds = [1.0] * 9 + [1.6] * 7
    return {
        "train_folder": str(toy.write_noise(folder / "train", seconds, seed=1)),
        "valid_folder": str(toy.write_noise(folder / "valid", [1.9, 1.5, 1.2, 1.0, 0.7], seed=2)),
        "max_batch_seconds": 5.0,
    }


# ---------------------------------------------------------------- the update


@pytest.mark.parametrize("max_grad_norm", [0.05, 0.0])
def test_ranks_equal_one_process_that_accumulates_their_batches(toy, tmp_path, max_grad_norm):
    """With clipping, which hides a wrong scale, and without; the ranks' masked counts differ fourfold."""
    per_rank = [
        [waves(1.6, 1.3, 1.1, seed=1), waves(0.8, seed=2), waves(1.0, 0.7, seed=3)],
        [waves(0.9, seed=4), waves(1.5, 1.4, 1.2, seed=5), waves(0.6, seed=6)],
    ]
    settings = {"optimizer": "SGD", "peak": 0.5, "warmup": 1, "max_grad_norm": max_grad_norm}
    calls = [("rank_fit_waves", {"output": str(tmp_path / "two"), "waves": mine, **settings}) for mine in per_rank]
    first, second = toy.train_ranks(tmp_path / "ranks", calls)
    model = toy.make_model()
    order = [(number, rank) for number in range(3) for rank in (0, 1)]
    batches = [toy.make_batch(model, per_rank[rank][number], rank=rank, number=number) for number, rank in order]
    counts = [batch.masked.count for batch in batches]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    toy.fit_batches(tmp_path / "one", model, batches, accumulation=2, **settings)

    assert max(counts[0] / counts[1], counts[3] / counts[2]) > 2.5
    assert not torch.equal(first["masks"][0][:1, :15], second["masks"][0][:, :15])
    assert all(torch.equal(first["state"][name], second["state"][name]) for name in first["state"])
    assert difference(model.state_dict(), first["state"]) < 1e-5
    assert difference(model.state_dict(), before) > 1e-3
    ours, theirs = toy.log_lines(tmp_path / "one"), toy.log_lines(tmp_path / "two")
    for name in ("loss", "gradient_norm", "accuracy", "mask_ratio", "audio_hours"):
        np.testing.assert_allclose([line[name] for line in theirs], [line[name] for line in ours], rtol=2e-5)
    if max_grad_norm:
        assert all(line["gradient_norm"] > max_grad_norm for line in ours)


def test_micro_batches_make_the_update_of_their_union(toy, tmp_path):
    """Three utterances at once, and as micro-batches of a long one and two short ones: masked counts differ much."""
    lengths = (3.2, 0.4, 0.3)
    one, two = toy.make_model(), toy.make_model()
    whole = toy.make_batch(one, waves(*lengths))
    noise = torch.randn(3, 4 * whole.masked.mask.shape[1], 80) * 0.1
    pieces = []
    for rows in (slice(0, 1), slice(1, 3)):
        piece = toy.make_batch(two, waves(*lengths)[rows])
        mask = whole.masked.mask[rows, : piece.masked.mask.shape[1]]
        pieces.append(replace(piece, masked=type(whole.masked).from_mask(mask)))
    assert pieces[0].masked.count > 2 * pieces[1].masked.count

    given = {id(one): [noise], id(two): [noise[:1], noise[1:, : 4 * pieces[1].masked.mask.shape[1]]]}
    for model in (one, two):
        forward, fillers = model.forward, iter(given[id(model)])
        model.forward = lambda *x, forward=forward, fillers=fillers, **named: forward(*x, noise=next(fillers), **named)
    settings = {"optimizer": "SGD", "peak": 0.5, "warmup": 1}
    toy.fit_batches(tmp_path / "whole", one, [whole], **settings)
    toy.fit_batches(tmp_path / "pieces", two, pieces, accumulation=2, **settings)
    assert difference(one.state_dict(), two.state_dict()) < 1e-5
    assert difference(one.state_dict(), toy.make_model().state_dict()) > 1e-3


def test_left_over_micro_batches_make_an_update(toy, tmp_path):
    """Five micro-batches, two an update: the fifth makes the third update, which equals one of its own."""
    model = toy.make_model()
    batches = [toy.make_batch(model, waves(0.6, 0.8, seed=number), number=number) for number in range(5)]
    settings = {"optimizer": "SGD", "peak": 0.5, "warmup": 1}
    brain = toy.fit_batches(tmp_path / "five", model, batches, accumulation=2, **settings)
    four = toy.make_model()
    toy.fit_batches(tmp_path / "four", four, batches[:4], accumulation=2, **settings)
    toy.fit_batches(tmp_path / "fifth", four, batches[4:], **settings, lr_schedule=lambda _: settings["peak"] / 3**0.5)
    assert brain.optimizer_step == 3
    assert difference(model.state_dict(), four.state_dict()) < 1e-5


def test_the_first_update_has_the_schedules_first_rate(toy, tmp_path):
    model = toy.make_model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    batch = toy.make_batch(model, waves(1.0))
    brain = toy.fit_batches(tmp_path, model, [batch], peak=1e-2, warmup=1000, weight_decay=0.0)
    # Adam's first update moves a parameter by the learning rate at most
    moved = max(float((parameter.detach() - before[name]).abs().max()) for name, parameter in model.named_parameters())
    assert moved == pytest.approx(1e-5, rel=0.05)
    assert brain.optimizer.param_groups[0]["lr"] == pytest.approx(1e-5)
    assert toy.log_lines(tmp_path)[0]["learning_rate"] == pytest.approx(1e-5)


def test_clipping_covers_all_groups_and_vectors_do_not_decay(toy, tmp_path):
    model = toy.make_model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    batch = toy.make_batch(model, waves(1.0))
    settings = {"optimizer": "SGD", "warmup": 1, "vector_decay": False}
    brain = toy.fit_batches(
        tmp_path / "clip", model, [batch], peak=1.0, max_grad_norm=0.01, weight_decay=0.0, **settings
    )
    moved = {name: (parameter.detach() - before[name]).norm() for name, parameter in model.named_parameters()}
    assert len(brain.optimizer.param_groups) == 2
    assert float(torch.stack(list(moved.values())).norm()) == pytest.approx(0.01, rel=1e-3)
    assert min(max(norm for name, norm in moved.items() if before[name].ndim == n) for n in (1, 2)) > 1e-4

    # without a gradient only the decay moves anything
    silent = toy.make_batch(model, waves(1.0))
    none = type(silent.masked).from_mask(torch.zeros_like(silent.masked.mask))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    toy.fit_batches(tmp_path / "decay", model, [replace(silent, masked=none)], peak=0.1, weight_decay=0.5, **settings)
    for name, parameter in model.named_parameters():
        expected = before[name] * (1.0 if parameter.ndim == 1 else 0.95)
        torch.testing.assert_close(parameter.detach(), expected)


# ---------------------------------------------------------------- gradients that are not finite


def test_an_update_that_is_not_finite_is_skipped_and_counted(toy, tmp_path):
    """Two good updates with a NaN between them equal the two good ones."""
    good = [waves(0.8, 0.6, seed=1), waves(0.7, 0.9, seed=2)]
    bad = [np.full_like(good[0][0], np.nan), good[0][1]]
    rate = {"lr_schedule": lambda _: 1e-3}
    model, other = toy.make_model(), toy.make_model()
    batches = [toy.make_batch(model, one, number=n) for n, one in enumerate((good[0], bad, good[1]))]
    batches[2] = toy.make_batch(model, good[1], number=1)
    brain = toy.fit_batches(tmp_path / "bad", model, batches, **rate)
    expected = toy.fit_batches(
        tmp_path / "good", other, [toy.make_batch(model, one, number=n) for n, one in enumerate(good)], **rate
    )
    for name, tensor in other.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert brain.optimizer.state_dict()["state"].keys() == expected.optimizer.state_dict()["state"].keys()
    for index, state in expected.optimizer.state_dict()["state"].items():
        for name, value in state.items():
            assert torch.equal(brain.optimizer.state_dict()["state"][index][name], value), name
    lines = toy.log_lines(tmp_path / "bad")
    assert [line["skipped_updates"] for line in lines] == [0, 1, 1]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[1]["loss"] is None and math.isfinite(lines[2]["loss"])


def test_nothing_but_skipped_updates_stops_the_run(toy, tmp_path):
    model = toy.make_model()
    batches = [toy.make_batch(model, [np.full(3200, np.nan, dtype=np.float32)])] * 100
    with pytest.raises(InputError, match="50 updates in a row, .* had no finite, ordinary gradients"):
        toy.fit_batches(tmp_path, model, batches, log_interval=50)


def test_ranks_skip_together(toy, tmp_path):
    """The second update is not finite on the second rank alone."""
    bad = [np.full(8000, np.nan, dtype=np.float32)]
    per_rank = [[waves(0.8, seed=1), waves(0.7, seed=2)], [waves(0.9, seed=3), bad]]
    calls = [("rank_fit_waves", {"output": str(tmp_path / "two"), "waves": mine}) for mine in per_rank]
    first, second = toy.train_ranks(tmp_path / "ranks", calls)
    calls = [("rank_fit_waves", {"output": str(tmp_path / "one"), "waves": mine[:1]}) for mine in per_rank]
    only, _ = toy.train_ranks(tmp_path / "only", calls)
    assert (first["skipped"], second["skipped"]) == (1, 1)
    for name, tensor in only["state"].items():
        assert torch.equal(first["state"][name], tensor) and torch.equal(second["state"][name], tensor), name
    assert all(int(state["step"]) == 1 for state in second["optimizer"]["state"].values())


# ---------------------------------------------------------------- stopping and resuming

STOCHASTIC = {"model": {"dropout": 0.1, "layer_drop": 0.2}, "accumulation": 2, "updates": 8, "checkpoint_every": 2}


def same_run(toy, unbroken, resumed):
    """The log of a resumed run is that of an unbroken one."""
    assert toy.losses(resumed) == toy.losses(unbroken)
    for event, names in {"train": ("audio_hours", "learning_rate", "epoch"), "valid": ("step", "loss", "gain")}.items():
        ours, theirs = toy.log_lines(resumed, event), toy.log_lines(unbroken, event)
        assert [[line[name] for name in names] for line in ours] == [[line[name] for name in names] for line in theirs]
    return True


@pytest.mark.parametrize(
    ("workers", "stop_after", "log_interval"),
    [(0, 5, 1), (2, 5, 1), (0, 3, 3), (0, 4, 1)],
    ids=["amid an epoch", "with workers", "amid a log line's window", "before a checkpoint within an epoch"],
)
def test_a_resumed_run_goes_on_as_if_unbroken(toy, tmp_path, corpus, workers, stop_after, log_interval):
    """Three updates an epoch, the last of a left-over micro-batch; dropout and layer drop are on."""
    settings = {**corpus, **STOCHASTIC, "workers": workers, "log_interval": log_interval}
    whole = toy.train(tmp_path / "unbroken", **settings)
    assert len(whole.sampler) == 5 and whole.brain.optimizer_step == 8
    stopped = toy.train(tmp_path / "resumed", stop_after=stop_after, **settings)
    torch.manual_seed(99)  # nothing hangs on the global generator's state
    resumed = toy.train(tmp_path / "resumed", **settings)
    assert stopped.stopped and not resumed.stopped
    assert same_run(toy, tmp_path / "unbroken", tmp_path / "resumed")
    assert len(toy.losses(tmp_path / "resumed")) == 8 // log_interval
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name


def test_a_run_stopped_at_the_end_of_an_epoch_goes_on(toy, tmp_path, corpus):
    settings = {**corpus, **STOCHASTIC}
    toy.train(tmp_path / "unbroken", **settings)
    toy.train(tmp_path / "resumed", **settings, epochs=1)
    assert toy.losses(tmp_path / "resumed")[-1][0] == 3
    toy.train(tmp_path / "resumed", **settings)
    assert same_run(toy, tmp_path / "unbroken", tmp_path / "resumed")


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_it_trains_and_validates_in_the_precision_that_is_asked_for(toy, tmp_path, corpus, after_forward, precision):
    lowered = set()
    after_forward(
        pretraining.PretrainingBrain,
        lambda _, stage, __: lowered.add((stage, torch.is_autocast_enabled("cpu"))),
    )
    toy.train(tmp_path, **corpus, updates=2, precision=precision, eval_precision=precision)
    assert lowered == {(stage, precision == "bf16") for stage in ("TRAIN", "VALID")}


def test_a_run_that_goes_on_in_another_precision_says_so(toy, tmp_path, corpus, caplog):
    settings = {**corpus, "updates": 4, "checkpoint_every": 1}
    toy.train(tmp_path, **settings, precision="bf16", stop_after=2)
    toy.train(tmp_path, **settings, precision="bf16", stop_after=3)
    assert "trained in" not in caplog.text
    toy.train(tmp_path, **settings, precision="fp32")
    assert "was trained in bf16 before and goes on in fp32: give --precision bf16" in caplog.text
    assert "was to end at update" not in caplog.text
    toy.train(tmp_path, **corpus, updates=6)
    assert "was to end at update 4 and now is to at 6" in caplog.text
    (tmp_path / "run.json").write_text("no JSON")  # is written anew, and hinders nothing
    toy.train(tmp_path, **{**settings, "updates": 7}, precision="fp32")
    assert toy.losses(tmp_path)[-1][0] == 7


@pytest.mark.parametrize(("workers", "accumulation"), [(0, 1), (1, 2)])
def test_two_ranks_resume_in_new_processes(toy, tmp_path, corpus, workers, accumulation):
    settings = {**corpus, **STOCHASTIC, "accumulation": accumulation, "updates": 5, "workers": workers}
    states = []
    for output, extra in (("unbroken", {}), ("resumed", {"stop_after": 3}), ("resumed", {})):
        number = len(list(tmp_path.glob("ranks*")))
        call = ("rank_train", {**settings, **extra, "output": str(tmp_path / output)})
        ranks = toy.train_ranks(tmp_path / f"ranks{number}", call)
        states.append(ranks[0]["state"])
    for name, tensor in states[0].items():
        assert torch.equal(ranks[0]["state"][name], tensor) and torch.equal(ranks[1]["state"][name], tensor), name
    assert toy.losses(tmp_path / "resumed") == toy.losses(tmp_path / "unbroken")
    assert [step for step, _ in toy.losses(tmp_path / "resumed")] == [1, 2, 3, 4, 5]
    assert [rank["steps"] for rank in ranks] == [5, 5]
    hours = [[line["audio_hours"] for line in toy.log_lines(tmp_path / name)] for name in ("resumed", "unbroken")]
    assert hours[0] == hours[1]


def test_a_rank_that_does_not_see_the_newest_checkpoint_is_told_and_one_that_is_done_ends_on_all(toy, tmp_path, corpus):
    settings = {**corpus, "updates": 4, "checkpoint_every": 1, "output": str(tmp_path / "run")}
    toy.train_ranks(tmp_path / "first", ("rank_train", {**settings, "stop_after": 3}))
    with pytest.raises(AssertionError, match=r"\(resumed_after_update: 0 there, 2 on rank 0\)"):
        toy.train_ranks(tmp_path / "second", ("rank_train_unseen", settings))
    toy.train_ranks(tmp_path / "third", ("rank_train", settings))
    done = toy.train_ranks(tmp_path / "fourth", ("rank_train_unseen", settings))
    assert [rank["trained"] for rank in done] == [[], []]


def test_on_another_number_of_ranks_it_goes_on_after_an_epoch_and_says_so(toy, tmp_path, corpus, caplog):
    settings = {**corpus, "updates": 6}
    toy.train_ranks(tmp_path / "ranks", ("rank_train", {**settings, "epochs": 1, "output": str(tmp_path / "run")}))
    done = toy.losses(tmp_path / "run")
    caplog.set_level("INFO")
    result = toy.train(tmp_path / "run", **settings)
    assert "Going on after epoch 1 with other world_size (2 then, 1 now)." in caplog.text
    steps = [step for step, _ in toy.losses(tmp_path / "run")]
    assert steps == [1, 2, 3, 4, 5, 6] and toy.losses(tmp_path / "run")[: len(done)] == done and len(done) < 6
    assert {epoch for epoch, _ in result.seen} == {2}
    heard = sorted(index for _, indices in result.seen for index in indices)
    assert len(heard) == len(set(heard))


def test_what_a_run_has_learned_of_itself_outlives_it(toy, tmp_path, corpus):
    settings = {**corpus, "updates": 6, "checkpoint_every": 2}
    first = toy.train(tmp_path, **settings, stop_after=4).brain
    first.guard.usual_norm, first.rewinds, first.rate_scale = torch.tensor(3.5), 2, 0.25
    first.guard.skipped_row, first.log.best_perplexity, first.best_error = torch.tensor(7), 12.5, 0.75
    hours = first.account.device_hours
    first.checkpointer.save_checkpoint(meta={"step": 4, "signature": json.dumps(first.model.signature())})
    again = toy.make_brain(tmp_path, toy.make_model(), updates=6)
    again.sampler = first.sampler
    again.checkpointer.add_recoverable("sampler", first.sampler, load_state, save_state)
    again.init_optimizers()
    again.checkpointer.recover_if_possible()
    assert (float(again.guard.usual_norm), again.rewinds, again.rate_scale) == (3.5, 2, 0.25)
    assert (int(again.guard.skipped_row), again.log.best_perplexity, again.best_error) == (7, 12.5, 0.75)
    assert again.account.device_hours >= hours and torch.equal(again.account.totals, first.account.totals)


def test_the_scale_of_fp16_has_a_lower_end(toy, tmp_path):
    """It is halved with each update that is not finite; at zero none ever were again."""
    model = toy.make_model()
    bad = toy.make_batch(model, [np.full(8000, np.nan, dtype=np.float32)])
    batches = [bad] * 8 + [toy.make_batch(model, waves(0.8, seed=1), number=number) for number in range(3)]
    brain = toy.make_brain(tmp_path, model, epochs=1, updates=None, checkpoints=False)
    brain.scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    brain.fit(brain.counter, toy.ready_loader(batches), toy.ready_loader([]))
    assert brain.scaler.get_scale() == 1.0 and int(brain.account.totals[1]) == 8
    assert any(not torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_run_that_is_done_trains_no_more_and_can_be_prolonged_amid_its_epoch(toy, tmp_path, corpus, caplog):
    settings = {**corpus, **STOCHASTIC}
    toy.train(tmp_path / "unbroken", **settings)
    toy.train(tmp_path / "prolonged", **{**settings, "updates": 4})
    before = (tmp_path / "prolonged" / "train_log.jsonl").read_bytes()
    with caplog.at_level("INFO"):
        again = toy.train(tmp_path / "prolonged", **{**settings, "updates": 4})
    assert "This run is done" in caplog.text and not again.seen
    assert (tmp_path / "prolonged" / "train_log.jsonl").read_bytes() == before
    toy.train(tmp_path / "prolonged", **settings)
    assert toy.losses(tmp_path / "prolonged") == toy.losses(tmp_path / "unbroken")


def test_another_models_checkpoint_is_refused(toy, tmp_path, corpus):
    settings = {**corpus, "updates": 1}
    toy.train(tmp_path, **settings, model={"quantizer_seed": 0})
    log = (tmp_path / "train_log.jsonl").read_bytes()
    with pytest.raises(InputError, match=r"quantizer.seed: 0 there, 5 here") as error:
        toy.train(tmp_path, **{**settings, "updates": 2}, model={"quantizer_seed": 5})
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"encoder.d_model: 16 there, 32 here"):
        toy.train(tmp_path, **{**settings, "updates": 2}, model={"d_model": 32})
    assert (tmp_path / "train_log.jsonl").read_bytes() == log


# ---------------------------------------------------------------- the codebook at the start


@pytest.fixture(scope="module")
def tones(toy, tmp_path_factory):
    """Audio of 48 s whose frames are all alike: whatever the codebook, one code is on most of them."""
    wave = 0.1 * np.sin(2 * np.pi * 440 * np.arange(4 * RATE) / RATE)
    return str(toy.write_waves(tmp_path_factory.mktemp("tones") / "train", [wave] * 12))


def test_a_new_run_is_told_of_a_collapsed_codebook_and_goes_on_and_a_resumed_one_is_not(toy, tmp_path, tones, caplog):
    settings = {"train_folder": tones, "max_batch_seconds": 20.0}
    with caplog.at_level("INFO"):
        result = toy.train(tmp_path, **settings, updates=2, checkpoint_every=1)
    assert result.brain.optimizer_step == 2
    told = [record for record in caplog.records if "Codebook 1 of 1" in record.message]
    warned = [record for record in caplog.records if record.message.startswith("Little to learn from these labels")]
    assert len(told) == len(warned) == 1 and warned[0].levelname == "WARNING"
    assert "commonest code labels" in warned[0].message and "set whiten: 16" in warned[0].message
    caplog.clear()
    with caplog.at_level("INFO"):
        toy.train(tmp_path, **settings, updates=3)
    assert not [record for record in caplog.records if "Codebook" in record.message]


def test_the_look_at_the_codebook_changes_nothing_in_training(toy, tmp_path, corpus, monkeypatch):
    """With dropout and noise on: losses are equal to the last bit, and so is the global generator before training."""
    states = {}

    def noted(brain):
        states[brain.folder.name] = torch.random.get_rng_state()

    on_fit_start = toy.ToyBrain.on_fit_start
    monkeypatch.setattr(toy.ToyBrain, "on_fit_start", lambda brain: (noted(brain), on_fit_start(brain)))
    settings = {**corpus, **STOCHASTIC, "updates": 4, "model": {"dropout": 0.1, "normalize": "global"}}
    toy.train(tmp_path / "with", **settings)
    monkeypatch.setattr(pretraining, "log_codebook_use", lambda model, audio: None)
    toy.train(tmp_path / "without", **settings)
    assert len(toy.losses(tmp_path / "with")) == 4
    assert toy.losses(tmp_path / "with") == toy.losses(tmp_path / "without")
    assert torch.equal(states["with"], states["without"])


# ---------------------------------------------------------------- ranks and data


def test_uneven_data_ends_on_both_ranks_and_every_utterance_is_heard_once(toy, tmp_path, corpus):
    """An odd number of batches for two ranks."""
    ranks = toy.train_ranks(
        tmp_path / "ranks",
        ("rank_train", {**corpus, "output": str(tmp_path / "run"), "epochs": 2, "updates": None}),
    )
    assert ranks[0]["batches"] == ranks[1]["batches"] and ranks[0]["steps"] == ranks[1]["steps"] > 2
    for epoch in (1, 2):
        heard = [index for rank in ranks for number, indices in rank["seen"] if number == epoch for index in indices]
        assert sorted(heard) == list(range(16))
    for name, tensor in ranks[0]["state"].items():
        assert torch.equal(ranks[1]["state"][name], tensor), name


def test_validation_shared_by_ranks_equals_that_of_one(toy, tmp_path, corpus):
    """The first validation of a model that has not moved: learning rate 0."""
    settings = {**corpus, "max_batch_seconds": 2.2, "epochs": 2, "updates": None, "peak": 0.0}
    toy.train(tmp_path / "one", **settings)
    toy.train_ranks(tmp_path / "ranks", ("rank_train", {**settings, "output": str(tmp_path / "two")}))
    one, two = toy.log_lines(tmp_path / "one", "valid"), toy.log_lines(tmp_path / "two", "valid")
    assert len(one) == len(two) == 2
    names = sorted(VALID_FIELDS - {"event", "step", "epoch", "audio_hours", "device_hours", "seconds"})
    for name in names:
        assert two[0][name] == pytest.approx(one[0][name], rel=1e-6), name
        # the model stood still, and so did masks and noise
        assert one[1][name] == one[0][name], name


# ---------------------------------------------------------------- what a run leaves


def test_log_lines(toy, tmp_path, corpus):
    toy.train(tmp_path, **corpus, updates=5, epochs=1, log_interval=2)
    lines = [json.loads(line) for line in (tmp_path / "train_log.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["event"] == "train"]
    valid = [line for line in lines if line["event"] == "valid"]
    assert [line["step"] for line in train] == [2, 4] and [line["step"] for line in valid] == [5]
    for line in train + valid:
        assert set(line) == (TRAIN_FIELDS if line["event"] == "train" else VALID_FIELDS)
        assert line["gain"] == pytest.approx(line["unigram_entropy"] - line["loss"], abs=1e-12)
        assert 0 <= line["accuracy"] <= 1 and 0 < line["commonest_share"] <= 1 and 1 <= line["codes_used"] <= 32
        assert line["mask_ratio"] == pytest.approx(0.51, abs=0.15)
    assert train[1]["audio_hours"] > train[0]["audio_hours"] > 0
    assert 0 <= train[0]["data_wait_share"] <= 1 and train[0]["peak_memory_gb"] > 0 and train[0]["eta_hours"] > 0
    assert train[0]["utilisation"] is None  # of a CPU
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["corpus"] == "Toy" and run["parameters"] > 1000 and run["updates_planned"] == 5


@pytest.mark.parametrize("spoilt", ["nan", "-inf"])
def test_a_validation_without_a_finite_loss_is_never_the_best(toy, tmp_path, corpus, monkeypatch, spoilt):
    settings = {**corpus, "updates": 6, "valid_interval": 2, "checkpoint_every": 1}
    compute_forward = toy.PretrainingBrain.compute_forward

    def spoil(self, batch, stage):
        output = compute_forward(self, batch, stage)
        if stage == sb.Stage.VALID and self.optimizer_step in (4, 6):
            output.loss = output.loss * float(spoilt)
        return output

    monkeypatch.setattr(toy.ToyBrain, "compute_forward", spoil)
    result = toy.train(tmp_path, **settings)
    metas = {one.meta["step"]: one.meta for one in result.brain.checkpointer.list_checkpoints()}
    assert "valid_loss" not in metas[6]
    assert result.brain.checkpointer.find_checkpoint(min_key="valid_loss").meta["step"] in (2, 5)


def test_a_model_may_name_what_its_best_validation_has(toy, tmp_path, corpus, monkeypatch):
    """As wav2vec 2.0 does, whose loss is lowest when its codes are all the same, and nothing is told from anything."""
    settings = {**corpus, "updates": 6, "valid_interval": 2, "checkpoint_every": 1}
    compute_forward = toy.PretrainingBrain.compute_forward
    losses, accuracies = {2: 3.0, 4: 2.0, 6: 1.0, 7: 4.0}, {2: 0.0, 4: 1.0, 6: 0.5, 7: 0.5}

    def collapse(self, batch, stage):
        output = compute_forward(self, batch, stage)
        if stage == sb.Stage.VALID:
            output.loss = torch.full_like(output.loss, losses[self.optimizer_step])
            output.metrics["correct"] = torch.tensor(float(output.num_targets * accuracies[self.optimizer_step]))
        return output

    monkeypatch.setattr(toy.ToyBrain, "compute_forward", collapse)
    for chosen_by, key, best in (("loss", "valid_loss", 6), ("accuracy", "valid_error", 4)):
        monkeypatch.setattr(PretrainingModel, "chosen_by", chosen_by)
        folder = tmp_path / chosen_by
        result = toy.train(folder, **settings)
        assert result.brain.checkpointer.find_checkpoint(min_key=key).meta["step"] == best
        assert json.loads((folder / "encoder" / "config.json").read_text())["training"]["step"] == best
        assert summarise(read_run(folder))["best_valid"]["step"] == best
        # one that goes on remembers
        assert toy.train(folder, **{**settings, "updates": 7}).brain.best_error == result.brain.best_error


def test_the_usual_norm_begins_with_the_first_update_that_is_made(toy, tmp_path, monkeypatch):
    optimizers_step, norms = toy.ToyBrain.optimizers_step, []

    def spoilt(self):
        if self.optimizer_step == 0:
            next(iter(self.model.parameters())).grad.fill_(float("nan"))
        optimizers_step(self)
        norms.append((float(self.account.gradient_norm), float(self.guard.usual_norm)))

    monkeypatch.setattr(toy.ToyBrain, "optimizers_step", spoilt)
    model = toy.make_model()
    batches = [toy.make_batch(model, waves(0.5, seed=number), number=number) for number in range(3)]
    toy.fit_batches(tmp_path, model, batches)
    (_, first), (second, usual), (third, later) = norms
    assert first == 0.0 and usual == second and later == pytest.approx(0.99 * second + 0.01 * third)


@pytest.mark.parametrize(
    ("option", "instead"),
    [("skip_nonfinite_grads", "skipped in any case"), ("jit", "--compile"), ("test_only", "--evidence")],
)
def test_run_options_without_effect_are_refused(option, instead):
    check_run_options(RunOptions.from_dictionary({"device": "cpu", "compile": True}), OF_PRETRAINING)
    with pytest.raises(InputError, match=f"--{option} has no effect here: .*{instead}"):
        check_run_options(RunOptions.from_dictionary({"device": "cpu", option: True}), OF_PRETRAINING)


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_graphs_that_the_next_micro_batch_writes_over_are_refused(mode):
    with pytest.raises(InputError, match=f"--compile_mode {mode} .*: give max-autotune-no-cudagraphs"):
        check_run_options(RunOptions.from_dictionary({"device": "cpu", "compile_mode": mode}), OF_PRETRAINING)


def test_figures_of_the_log_are_those_of_the_clock(toy, tmp_path, corpus, monkeypatch):
    """Each of three micro-batches takes half a second and 3 GFLOP; two updates of the six planned are a line."""
    now = [100.0]
    monkeypatch.setattr(pretraining.time, "perf_counter", lambda: now[0])
    fit_batch = toy.PretrainingBrain.fit_batch

    def timed(brain, batch):
        now[0] += 0.5
        return fit_batch(brain, batch)

    monkeypatch.setattr(toy.ToyBrain, "fit_batch", timed)
    model = toy.make_model()
    monkeypatch.setattr(model, "flops", lambda *shape: 3e9)
    batches = [toy.make_batch(model, waves(0.5, seed=number), number=number) for number in range(12)]
    toy.fit_batches(tmp_path, model, batches, accumulation=3, updates=6, log_interval=2)
    first, second = toy.log_lines(tmp_path)
    for line in (first, second):
        assert line["gflops_per_second"] == pytest.approx(6.0)
        assert line["audio_seconds_per_second"] == pytest.approx(1.0)
        assert line["data_wait_share"] == pytest.approx(1.0)  # before a micro-batch is there
    assert first["eta_hours"] == pytest.approx(4 * 1.5 / 3600) and second["eta_hours"] == pytest.approx(2 * 1.5 / 3600)
    assert second["device_hours"] - first["device_hours"] == pytest.approx(3.0 / 3600)
    assert second["audio_hours"] == pytest.approx(6.0 / 3600)


def test_a_log_line_has_the_hours_of_all_devices_and_the_utilisation_of_one(toy, tmp_path, monkeypatch):
    """Each of four has done in four seconds what an H200 can do in one."""
    now = [100.0]
    monkeypatch.setattr(pretraining.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda _: None)  # the others are not there
    model = toy.make_model()
    brain = toy.fit_batches(tmp_path, model, [toy.make_batch(model, waves(0.5))], log_interval=2)
    brain.account.world_size, brain.precision, brain.run_facts["device"] = 4, "bf16", "NVIDIA H200"
    now[0] += 4.0
    brain.clock.flops, brain.clock.updates = 989e12, 1
    brain._submit_log_line()
    (line,) = brain.account.reader.ready()
    assert line["utilisation"] == pytest.approx(0.25)
    assert line["device_hours"] == pytest.approx(4 * 4 / 3600)


@pytest.fixture
def saved(monkeypatch):
    """The updates of the checkpoints, as they are saved."""
    steps, save = [], AtomicCheckpointer.save_checkpoint

    def noted(self, *arguments, **options):
        steps.append(options["meta"]["step"])
        return save(self, *arguments, **options)

    monkeypatch.setattr(AtomicCheckpointer, "save_checkpoint", noted)
    return steps


@pytest.fixture
def forty_seconds(toy, monkeypatch):
    """An update takes so long by SpeechBrain's clock."""
    now, on_fit_batch_end = [0.0], toy.ToyBrain.on_fit_batch_end

    def later(*arguments):
        now[0] += 40.0
        on_fit_batch_end(*arguments)

    monkeypatch.setattr("speechbrain.core.time", SimpleNamespace(time=lambda: now[0]))
    monkeypatch.setattr(toy.ToyBrain, "on_fit_batch_end", later)


def test_epochs_that_are_over_soon_are_not_each_validated_and_saved(toy, tmp_path, corpus, saved):
    """Of five updates each: validated is after the sixth, the twelfth, and the last."""
    settings = {**corpus, "valid_interval": 6, "updates": 17}
    result = toy.train(tmp_path / "one", **settings)
    assert len(result.sampler) == 5
    assert [line["step"] for line in toy.log_lines(tmp_path / "one", "valid")] == [6, 12, 17]
    assert saved == [6, 6, 12, 17]  # for the first time before it, too
    # and goes on at the end of an epoch that was not validated
    stopped = toy.train(tmp_path / "two", **settings, checkpoint_every=5, stop_after=10)
    assert stopped.stopped
    again = toy.train(tmp_path / "two", **settings, checkpoint_every=5)
    assert [line["step"] for line in toy.log_lines(tmp_path / "two", "valid")] == [6, 12, 17]
    assert toy.losses(tmp_path / "two") == toy.losses(tmp_path / "one")
    assert difference(again.model.state_dict(), result.model.state_dict()) == 0.0


def test_a_run_that_ends_by_its_epochs_is_validated_and_saved_at_its_end(toy, tmp_path, corpus):
    settings = {**corpus, "valid_interval": 100, "updates": None, "epochs": 2}
    result = toy.train(tmp_path, **settings)
    assert [line["step"] for line in toy.log_lines(tmp_path, "valid")] == [10]
    assert result.brain.checkpointer.find_checkpoint(min_key="valid_loss").meta["step"] == 10
    assert (tmp_path / "encoder").is_dir()
    assert toy.train(tmp_path, **settings).seen == []


def test_minutes_between_checkpoints_go_on_over_the_ends_of_epochs(toy, tmp_path, corpus, saved, forty_seconds):
    """An epoch has five updates of 40 s, and more than four minutes have to be over."""
    toy.train(tmp_path, **corpus, updates=22, valid_interval=22, ckpt_interval_minutes=4)
    assert saved == [7, 14, 21, 22, 22]


def test_a_first_validation_that_fails_costs_no_update(toy, tmp_path, corpus, monkeypatch):
    def fail(*_, **__):
        raise InputError("a file of the validation is damaged")

    settings = {**corpus, "valid_interval": 4, "updates": 6}
    whole = toy.train(tmp_path / "whole", **settings)
    with monkeypatch.context() as patch, pytest.raises(InputError, match="is damaged"):
        patch.setattr(toy.ToyBrain, "evaluate_batch", fail)
        toy.train(tmp_path / "run", **settings)
    again = toy.train(tmp_path / "run", **settings)
    assert [entry[1] for entry in again.seen] == [entry[1] for entry in whole.seen[4:]]
    assert [line["step"] for line in toy.log_lines(tmp_path / "run", "valid")] == [4, 6]
    assert difference(again.model.state_dict(), whole.model.state_dict()) == 0.0


@pytest.mark.parametrize(
    ("name", "value"), [("log_interval", 0), ("valid_interval", 2.5), ("optimizer_step_limit", "many")]
)
def test_counts_that_are_none_are_refused_before_any_work(name, value):
    hparams = {"optimizer_step_limit": 2e5, "log_interval": 20, "valid_interval": None, "encoder_at_steps": []}
    with pytest.raises(InputError, match=f"--{name} {value}: give a whole number"):
        check_counts({**hparams, name: value})
    with pytest.raises(InputError, match="--encoder_at_steps 1000: give a list"):
        check_counts({**hparams, "encoder_at_steps": 1000})


def test_a_limit_may_be_given_as_people_write_it(toy, tmp_path):
    assert toy.make_brain(tmp_path, toy.make_model(), updates="2e5").optimizer_step_limit == 200_000


def test_checkpoints_are_saved_by_minutes(toy, tmp_path, saved, forty_seconds):
    """An update takes 40 s, and more than a minute has to be over."""
    model = toy.make_model()
    batches = [toy.make_batch(model, waves(0.5, seed=number), number=number) for number in range(8)]
    toy.fit_batches(tmp_path, model, batches, updates=8, checkpoints=True, ckpt_interval_minutes=1)
    assert saved == [2, 4, 6, 8, 8]  # before the validation, and with what it says


def test_audio_hours_are_those_of_the_batches(toy, tmp_path, corpus):
    result = toy.train(tmp_path, **corpus, updates=None, epochs=2)
    hours = toy.log_lines(tmp_path)[-1]["audio_hours"]
    cut = result.sampler.cut_share
    assert hours == pytest.approx(2 * (1 - cut) * float(result.sampler.lengths.sum()) / RATE / 3600, rel=1e-6)


def test_the_encoder_is_written_at_the_best_validation_and_at_the_steps_named(toy, tmp_path, corpus):
    result = toy.train(tmp_path, **corpus, updates=6, encoder_at_steps=[2, 6], train_hours=12.5)
    valid = toy.log_lines(tmp_path, "valid")
    best = min(valid, key=lambda line: line["loss"])
    config = json.loads((tmp_path / "encoder" / "config.json").read_text())
    assert config["training"]["step"] == best["step"]
    assert config["training"]["validation"]["loss"] == best["loss"]
    assert json.loads((tmp_path / "encoder@2" / "config.json").read_text())["training"]["step"] == 2
    card = (tmp_path / "encoder@6" / "README.md").read_text()
    assert "Toy: 12.5 h" in card and "| updates | 6 |" in card and f"| {valid[0]['step']} |" in card

    result.model.eval()
    wavs, wav_lens = torch.randn(2, 16000) * 0.1, torch.tensor([1.0, 0.6])
    with torch.no_grad():
        ours, lengths = result.model.encode(wavs, wav_lens)
        theirs, their_lengths = load_encoder(tmp_path / "encoder@6")(wavs, wav_lens)
        earlier, _ = load_encoder(tmp_path / "encoder@2")(wavs, wav_lens)
    assert torch.equal(ours, theirs) and torch.equal(lengths, their_lengths)
    assert not torch.allclose(ours, earlier, atol=1e-4)


def test_the_best_encoder_survives_a_kill_between_checkpoint_and_encoder(toy, tmp_path, corpus, monkeypatch):
    """Killed after the validation's checkpoint, before its encoder: the checkpoint must not count it as written."""
    settings = {**corpus, "updates": 5, "epochs": 1}

    def killed(brain, name, entry=None):
        raise toy.Stopped

    with monkeypatch.context() as patch:
        patch.setattr(toy.PretrainingBrain, "_save_encoder", killed)
        assert toy.train(tmp_path, **settings).stopped
    assert not (tmp_path / "encoder").exists()
    toy.train(tmp_path, **settings)
    assert (tmp_path / "encoder" / "model.safetensors").exists()


def test_losses_of_another_validation_set_are_not_compared(toy, tmp_path, corpus, caplog):
    """A run that diverges goes on with another validation set: none of its losses is as low as the first one."""
    settings = {**corpus, "valid_interval": 1, "checkpoint_every": 1, "peak": 3.0, "warmup": 9, "max_grad_norm": 0.0}
    toy.train(tmp_path / "run", **settings, updates=3)
    path = max((tmp_path / "run" / "save").glob("CKPT*"), key=lambda folder: folder.stat().st_mtime) / "progress.ckpt"
    before = torch.load(path, weights_only=True)["best_error"]
    other = toy.write_noise(tmp_path / "other", [1.3] * 3, seed=9)
    done = toy.train(tmp_path / "run", **{**settings, "valid_folder": other}, updates=6)
    assert "The validation set is another than before" in caplog.text
    later = [line for line in toy.log_lines(tmp_path / "run", "valid") if line["step"] > 3]
    best = min(later, key=lambda line: line["loss"])
    assert done.brain.best_error == best["loss"] > before
    config = json.loads((tmp_path / "run" / "encoder" / "config.json").read_text())
    assert config["training"]["step"] == best["step"]


def test_the_two_newest_and_the_best_checkpoint_are_kept(toy, tmp_path, corpus):
    """The first validation is the best of a model that diverges."""
    result = toy.train(tmp_path, **corpus, updates=9, checkpoint_every=2, peak=3.0, warmup=9, max_grad_norm=0.0)
    checkpoints = result.brain.checkpointer.list_checkpoints()
    valid = toy.log_lines(tmp_path, "valid")
    best = min(valid, key=lambda line: line["loss"])
    assert sorted(checkpoint.meta["step"] for checkpoint in checkpoints) == [best["step"], 8, 9]


# ---------------------------------------------------------------- learning


def test_white_noise_teaches_nothing(toy, tmp_path):
    """No leak: the labels of noise cannot be told from its neighbours."""
    train = toy.write_noise(tmp_path / "train", [1.0] * 40, seed=1)
    valid = toy.write_noise(tmp_path / "valid", [2.0] * 16, seed=2)
    toy.train(
        tmp_path / "run", train, valid, max_batch_seconds=10, updates=60, peak=1e-2, warmup=10, max_grad_norm=1.0,
        log_interval=20, epochs=15, checkpoints=False,
    )  # fmt: skip
    line = toy.log_lines(tmp_path / "run", "valid")[-1]
    targets = line["mask_ratio"] * 16 * 50
    deviation = math.sqrt(line["commonest_share"] * (1 - line["commonest_share"]) / targets)
    assert line["step"] == 60
    assert line["accuracy"] <= line["commonest_share"] + 3 * deviation
    assert line["gain"] <= 0.05


def test_loudness_is_learnt(toy, tmp_path):
    """The same model and updates, on audio whose masked frames follow from the others."""
    train = toy.write_levels(tmp_path / "train", 40, seed=1)
    valid = toy.write_levels(tmp_path / "valid", 16, seed=2)
    toy.train(
        tmp_path / "run", train, valid, max_batch_seconds=10, updates=60, peak=1e-2, warmup=10, max_grad_norm=1.0,
        log_interval=20, epochs=15, checkpoints=False, model={"normalize": "global"},
    )  # fmt: skip
    line = toy.log_lines(tmp_path / "run", "valid")[-1]
    assert line["gain"] > 0.3 and line["accuracy"] > line["commonest_share"] + 0.1


def test_labels_of_a_quantizer_that_measures_nothing_hang_on_its_seed_alone(toy, tmp_path, corpus):
    """Other weights, masks and order of the data: the same labels of the same audio."""
    audio = torch.randn(2, 16000)

    def labels(seed, **settings):
        result = toy.train(tmp_path / f"run{seed}", **corpus, seed=seed, updates=2, model=settings)
        features, _ = result.model.speech_encoder.frontend(audio)
        return result.model.quantizer(features.unflatten(1, (-1, 4)).flatten(2))

    first = labels(1, model_seed=1)
    assert torch.equal(first, labels(2, model_seed=2))
    assert not torch.equal(first, labels(3, model_seed=1, quantizer_seed=1))


def test_losses_do_not_hang_on_the_global_generator(toy, tmp_path, corpus):
    """Another state of the global generator before training changes no loss, with dropout on."""
    for name, seed in (("first", 5), ("second", 6)):
        model = toy.make_model(dropout=0.1, layer_drop=0.2)
        torch.manual_seed(seed)
        batches = [toy.make_batch(model, waves(0.8, 0.7, seed=number), number=number) for number in range(3)]
        toy.fit_batches(tmp_path / name, model, batches)
    assert toy.losses(tmp_path / "first") == toy.losses(tmp_path / "second")
    shutil.rmtree(tmp_path / "second")
