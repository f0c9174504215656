"""A run that is asked to end ends in order; what goes wrong on the way is skipped, tried again or said."""

import errno
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import speechbrain as sb
import torch
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from speechbrain_bestrq import checkpointing, encoder_folders, stopping, update_guard
from speechbrain_bestrq.accounting import JsonLines
from speechbrain_bestrq.checkpointing import AtomicCheckpointer, SaveError
from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.progress_log import ProgressLog
from speechbrain_bestrq.ranks import check_ranks_agree
from speechbrain_bestrq.stopping import Request, Requests, StoppedError


@pytest.fixture
def corpus(toy, tmp_path):
    """Ten utterances to train on and two to validate on."""
    seconds = np.random.default_rng(3).uniform(0.6, 2.0, size=10)
    return {
        "train_folder": toy.write_noise(tmp_path / "audio", seconds, seed=1),
        "valid_folder": toy.write_noise(tmp_path / "valid", [1.0, 0.7], seed=2),
    }


def signal_after(monkeypatch, toy, update, number):
    """Let a signal come in the middle of an update."""
    compute_objectives = toy.ToyBrain.compute_objectives

    def interrupted(self, predictions, batch, stage):
        if self.optimizer_step == update - 1 and self.modules["model"].training:
            os.kill(os.getpid(), number)
        return compute_objectives(self, predictions, batch, stage)

    monkeypatch.setattr(toy.ToyBrain, "compute_objectives", interrupted)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
@pytest.mark.parametrize("update", [3, 6])
def test_a_signal_ends_the_run_after_the_update_and_the_same_command_goes_on_as_if_unbroken(
    toy, tmp_path, corpus, monkeypatch, number, update
):
    unbroken = toy.train(tmp_path / "unbroken", **corpus, updates=8, model={"dropout": 0.1})
    assert len(unbroken.sampler) == 6  # so that the signals come amid an epoch and in its last update
    with monkeypatch.context() as patch:
        signal_after(patch, toy, update, number)
        with pytest.raises(StoppedError, match=f"by {number.name} after update {update}, with a checkpoint of it"):
            toy.train(tmp_path / "run", **corpus, updates=8, model={"dropout": 0.1})
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)
    resumed = toy.train(tmp_path / "run", **corpus, updates=8, model={"dropout": 0.1})
    assert toy.losses(tmp_path / "run") == toy.losses(tmp_path / "unbroken")
    ours, theirs = resumed.model.state_dict(), unbroken.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def signal_in_validation(monkeypatch, toy, validation, number):
    """Let a signal come when a validation begins, counted from 1."""
    begun = []
    on_stage_start = toy.ToyBrain.on_stage_start

    def counted(self, stage, epoch=None):
        on_stage_start(self, stage, epoch)
        if stage == sb.Stage.VALID:
            begun.append(epoch)
            if len(begun) == validation:
                os.kill(os.getpid(), number)

    monkeypatch.setattr(toy.ToyBrain, "on_stage_start", counted)


@pytest.mark.parametrize(("validation", "update"), [(1, 3), (2, 6), (3, 8)])
def test_a_signal_in_a_validation_ends_it_and_it_is_done_when_the_run_goes_on(
    toy, tmp_path, corpus, monkeypatch, validation, update
):
    """Amid an epoch, at its end, and at the end of the run."""
    settings = {**corpus, "updates": 8, "valid_interval": 3, "model": {"dropout": 0.1}}
    unbroken = toy.train(tmp_path / "unbroken", **settings)
    with monkeypatch.context() as patch:
        signal_in_validation(patch, toy, validation, signal.SIGTERM)
        with pytest.raises(StoppedError, match=f"by SIGTERM after update {update}, with a checkpoint of it"):
            toy.train(tmp_path / "run", **settings)
    assert not [line for line in toy.log_lines(tmp_path / "run", "valid") if line["step"] == update]
    resumed = toy.train(tmp_path / "run", **settings)
    assert toy.losses(tmp_path / "run") == toy.losses(tmp_path / "unbroken")
    ours, theirs = (
        [(line["step"], line["loss"]) for line in toy.log_lines(tmp_path / folder, "valid")]
        for folder in ("run", "unbroken")
    )
    assert ours == theirs and [step for step, _ in ours] == [3, 6, 8]
    state = unbroken.model.state_dict()
    assert all(torch.equal(one, state[name]) for name, one in resumed.model.state_dict().items())
    assert (tmp_path / "run" / "encoder").is_dir()


def test_a_signal_in_the_last_update_leaves_the_validation_to_the_next_start(toy, tmp_path, corpus, monkeypatch):
    with monkeypatch.context() as patch:
        signal_after(patch, toy, 4, signal.SIGTERM)
        with pytest.raises(StoppedError, match="after update 4"):
            toy.train(tmp_path, **corpus, updates=4)
    assert not toy.log_lines(tmp_path, "valid")
    toy.train(tmp_path, **corpus, updates=4)
    assert (tmp_path / "encoder").is_dir() and [line["step"] for line in toy.log_lines(tmp_path, "valid")] == [4]


def test_a_second_signal_of_a_kind_does_what_it_did_before_but_not_if_it_follows_at_once(monkeypatch):
    with Requests() as requests:
        for _ in range(3):  # a scheduler signals all, the launcher hands it on
            signal.raise_signal(signal.SIGINT)
        assert requests.agreed() == Request.STOP
        monkeypatch.setattr(stopping, "SAME_SIGNAL_SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_to_stop_goes_before_to_rewind():
    with Requests() as requests:
        requests.ask(Request.REWIND)
        assert requests.agreed() == Request.REWIND and requests.agreed() == Request.GO_ON
        requests.ask(Request.STOP)
        requests.ask(Request.REWIND)
        assert requests.agreed() == Request.STOP


# ---------------------------------------------------------------- the disk


@pytest.fixture
def checkpointer(tmp_path):
    """A checkpointer of a layer, with a checkpoint "first"."""
    checkpointer = AtomicCheckpointer(checkpoints_dir=tmp_path / "save", recoverables={"model": torch.nn.Linear(9, 9)})
    checkpointer.save_checkpoint(name="first", meta={"step": 1})
    return checkpointer


def fill_disk(patch, number=errno.ENOSPC):
    """Let files be synced no more."""

    def refuse(path):
        raise OSError(number, os.strerror(number))

    patch.setattr(checkpointing, "sync_tree", refuse)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_a_disk_that_takes_no_checkpoint_is_named_with_what_is_needed_and_the_earlier_one_stays(
    checkpointer, monkeypatch, number
):
    with monkeypatch.context() as patch:
        fill_disk(patch, number)
        with pytest.raises(SaveError, match=rf"save \({os.strerror(number)}\): a checkpoint needs 0.0 MB"):
            checkpointer.save_checkpoint(name="second")
    assert [path.name for path in checkpointer.checkpoints_dir.iterdir()] == ["CKPT+first"]
    assert checkpointer.save_checkpoint(name="second") is not None


def test_what_is_not_the_disks_fault_is_no_save_error(checkpointer):
    def broken(_instance, _path):
        raise RuntimeError("a bug")

    checkpointer.add_recoverable("broken", object(), custom_save_hook=broken)
    with pytest.raises(RuntimeError, match="a bug"):
        checkpointer.save_checkpoint(name="second")


def test_training_goes_on_while_nothing_can_be_saved_and_tries_again(toy, tmp_path, corpus, monkeypatch, caplog):
    unbroken = toy.train(tmp_path / "unbroken", **corpus, updates=8)
    saved = []
    save = AtomicCheckpointer.save_checkpoint

    def full_at_first(self, *arguments, **options):
        with monkeypatch.context() as patch:
            if len(saved) < 3:
                fill_disk(patch)
            saved.append(options["meta"]["step"])
            return save(self, *arguments, **options)

    monkeypatch.setattr(AtomicCheckpointer, "save_checkpoint", full_at_first)
    result = toy.train(tmp_path / "run", **corpus, updates=8, checkpoint_every=2)
    assert saved[:4] == [2, 3, 4, 5] and saved[-1] == 8
    assert sum("Training goes on" in message for message in caplog.messages) == 3
    assert toy.losses(tmp_path / "run") == toy.losses(tmp_path / "unbroken")
    assert all(
        torch.equal(one, other)
        for one, other in zip(result.model.state_dict().values(), unbroken.model.state_dict().values(), strict=True)
    )


def test_what_was_saved_late_is_no_part_of_an_update(toy, tmp_path, corpus, monkeypatch):
    """Two micro-batches an update: the first retry would come after the first of them."""
    settings = {**corpus, "updates": 6, "accumulation": 2, "max_batch_seconds": 2.0}
    toy.train(tmp_path / "unbroken", **settings)
    save, refused = AtomicCheckpointer.save_checkpoint, []

    def full_once(self, *arguments, **options):
        with monkeypatch.context() as patch:
            if not refused:
                refused.append(options["meta"]["step"])
                fill_disk(patch)
            return save(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(AtomicCheckpointer, "save_checkpoint", full_once)
        toy.train(tmp_path / "run", **settings, checkpoint_every=1, stop_after=3)
    assert refused == [1]
    toy.train(tmp_path / "run", **settings)
    assert toy.losses(tmp_path / "run") == toy.losses(tmp_path / "unbroken")


def test_a_run_whose_end_could_not_be_saved_says_so_and_goes_on_when_there_is_room(toy, tmp_path, corpus, monkeypatch):
    with monkeypatch.context() as patch:
        fill_disk(patch)
        with pytest.raises(InputError, match="ended after update 5, but its last updates could not be saved") as error:
            toy.train(tmp_path / "run", **corpus, updates=5)
    assert "\n" not in str(error.value)
    toy.train(tmp_path / "run", **corpus, updates=5)
    toy.train(tmp_path / "unbroken", **corpus, updates=5)
    assert toy.losses(tmp_path / "run") == toy.losses(tmp_path / "unbroken")


def test_ranks_go_on_together_while_the_disk_of_the_main_one_is_full(toy, tmp_path, corpus):
    call = {"output": str(tmp_path / "run"), **{name: str(path) for name, path in corpus.items()}}
    call |= {"updates": 8, "checkpoint_every": 2}
    ranks = toy.train_ranks(tmp_path / "ranks", ("rank_train_on_a_full_disk", call))
    assert [rank["steps"] for rank in ranks] == [8, 8]
    assert all(torch.equal(ranks[1]["state"][name], tensor) for name, tensor in ranks[0]["state"].items())
    assert sorted(checkpoint["step"] for checkpoint in ranks[0]["saved"])[-1] == 8
    assert [rank["refused"] for rank in ranks] == [2, 0]


def test_the_best_encoder_that_could_not_be_written_is_written_before_the_checkpoint(
    toy, tmp_path, corpus, monkeypatch
):
    write, refused = encoder_folders.save_encoder, []

    def full_once(*arguments, **facts):
        if not refused:
            refused.append(facts["step"])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(*arguments, **facts)

    monkeypatch.setattr(encoder_folders, "save_encoder", full_once)
    toy.train(tmp_path, **corpus, updates=4, valid_interval=2, stop_after=2)
    assert refused == [2] and (tmp_path / "encoder").is_dir()
    assert json.loads((tmp_path / "encoder" / "config.json").read_text())["training"]["step"] == 2


def test_lines_that_the_disk_did_not_take_are_in_the_log_before_a_checkpoint_is(toy, tmp_path, corpus, monkeypatch):
    append, refused = JsonLines.append, []

    def full_at_three(self, entry):
        if entry["step"] == 3 and len(refused) < 2:
            refused.append(entry)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        append(self, entry)

    with monkeypatch.context() as patch:
        patch.setattr(JsonLines, "append", full_at_three)
        toy.train(tmp_path, **corpus, updates=6, checkpoint_every=3, stop_after=4)
    assert len(refused) == 2
    toy.train(tmp_path, **corpus, updates=6)
    assert [step for step, _ in toy.losses(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_a_disk_that_stays_full_ends_the_run_when_the_yaml_says_so(toy, tmp_path, corpus, monkeypatch):
    fill_disk(monkeypatch)
    with pytest.raises(InputError, match="Nothing could be saved for 0 hours"):
        toy.train(tmp_path, **corpus, updates=8, checkpoint_every=2, max_unsaved_hours=0.0)


def test_a_log_line_is_written_whole_or_later(tmp_path, monkeypatch):
    log = JsonLines(tmp_path / "log.jsonl")
    log.append({"step": 1})
    write = type(open(tmp_path / "x", "wb", buffering=0)).write

    class Full:
        """A file that takes three bytes."""

        def __init__(self, *arguments, **options):
            self.file = open(*arguments, **options)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def write(self, data):
            return write(self.file, data[:3])

        def __getattr__(self, name):
            return getattr(self.file, name)

    with monkeypatch.context() as patch:
        patch.setattr("speechbrain_bestrq.accounting.open", Full, raising=False)
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            log.append({"step": 2})
    log.append({"step": 3})
    assert log.read() == [{"step": 1}, {"step": 3}]


@contextmanager
def files_of(size):
    """Let no file grow beyond so many bytes."""
    before, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, most))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_tensorboard_goes_on_after_a_disk_that_was_full(tmp_path, caplog):
    """Its writer has a thread, which fails once and then at each call, to close it too."""
    log = ProgressLog(tmp_path)
    log.open(0, None, show_bar=False)

    def write(step):
        log.write({"event": "train", "step": step, "loss": 1.0 + step})

    write(1)
    log._tensorboard.flush()
    with files_of(1):
        write(2)
        log._tensorboard.file_writer.event_writer._async_writer._worker.join(10)
        write(3)  # where the failure of the thread is found
        assert sum("TensorBoard" in message for message in caplog.messages) == 2
    write(4)
    log.close()
    log.open(4, None, show_bar=False)
    with files_of(1):  # and where there is nothing to write to from the first line to the end
        write(5)
        log.close()
    write(6)
    assert [line["step"] for line in log.lines.read()] == [1, 2, 3, 4, 5, 6]
    log.close()
    files = sorted((tmp_path / "tensorboard").iterdir(), key=lambda path: int(path.name.rsplit(".", 1)[1]))
    drawn = [event.step for file in files for event in EventFileLoader(str(file)).Load() if event.summary.value]
    assert drawn[0] == 1 and drawn[-2:] == [4, 6]


# ---------------------------------------------------------------- damaged checkpoints


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(toy, tmp_path, corpus, caplog, damage):
    toy.train(tmp_path / "unbroken", **corpus, updates=9)
    toy.train(tmp_path / "run", **corpus, updates=9, checkpoint_every=2, stop_after=6)
    checkpoints = AtomicCheckpointer(checkpoints_dir=tmp_path / "run" / "save").list_checkpoints()
    newest = max(checkpoints, key=lambda checkpoint: checkpoint.meta["step"])
    file = newest.path / "model.ckpt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes(content if damage == "flip" else content[:-7])
    toy.train(tmp_path / "run", **corpus, updates=9)
    assert any(str(newest.path) in message and "model.ckpt" in message for message in caplog.messages)
    assert toy.losses(tmp_path / "run") == toy.losses(tmp_path / "unbroken")
    assert newest.path.is_dir(), "it is the user's to delete"


@pytest.mark.parametrize("name", ["CKPT.yaml", "checksums.json"])
@pytest.mark.parametrize("damage", [b"", b"\xff\xfe: [", None])
def test_what_tells_of_a_checkpoint_may_be_damaged_too(checkpointer, caplog, name, damage):
    folder = checkpointer.save_checkpoint(name="second", meta={"step": 2}).path
    if damage is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(damage)
    found = AtomicCheckpointer(checkpoints_dir=folder.parent).find_checkpoint()
    assert found.path.name == "CKPT+first"
    # one without its CKPT.yaml is none to SpeechBrain either
    assert (damage is None and name == "CKPT.yaml") or f"{folder} is damaged" in caplog.text


def test_when_none_is_whole_nothing_is_begun_anew(toy, tmp_path, corpus):
    toy.train(tmp_path, **corpus, updates=3)
    for file in (tmp_path / "save").glob("*/model.ckpt"):
        file.write_bytes(b"")
    before = toy.losses(tmp_path)
    with pytest.raises(
        InputError, match=r"none of the 2 checkpoints in .*save is whole: delete them to start"
    ) as error:
        toy.train(tmp_path, **corpus, updates=5)
    assert "\n" not in str(error.value) and toy.losses(tmp_path) == before


# ---------------------------------------------------------------- updates that go wrong


def waves(good, bad, total):
    """An utterance for each update; the bad ones are not finite."""
    generator = np.random.default_rng(0)
    one = lambda number: 0.1 * generator.standard_normal(3200).astype(np.float32)  # noqa: E731
    return [np.full(3200, np.nan, np.float32) if number in bad else one(number) for number in range(total)]


def test_too_many_skipped_updates_go_back_to_the_checkpoint_with_half_the_rate(toy, tmp_path, corpus, caplog):
    class Diverging(toy.ToyBrain):
        """Its gradients are not finite from update 5 on, while the rate is the first."""

        def optimizers_step(self):
            if self.optimizer_step >= 4 and self.rate_scale == 1.0:
                next(iter(self.model.parameters())).grad.fill_(float("nan"))
            super().optimizers_step()

    options = {"updates": 12, "checkpoint_every": 2, "max_skipped_updates": 3, "on_nonfinite": "rewind"}
    original, toy.ToyBrain = toy.ToyBrain, Diverging
    try:
        result = toy.train(tmp_path, **corpus, **options)
    finally:
        toy.ToyBrain = original
    assert result.brain.optimizer_step == 12 and result.brain.rewinds == 1 and result.brain.rate_scale == 0.5
    steps = [step for step, _ in toy.losses(tmp_path)]
    assert steps == list(range(1, 13))
    assert all(math.isfinite(loss) for _, loss in toy.losses(tmp_path))
    assert [line["rewinds"] for line in toy.log_lines(tmp_path)][::11] == [0, 1]
    rates = {line["step"]: line["learning_rate"] for line in toy.log_lines(tmp_path)}
    schedule = result.brain.hparams.lr_schedule
    assert rates[4] == schedule(4) and rates[12] == pytest.approx(schedule(12) / 2)
    assert sum("Going back to the last checkpoint" in message for message in caplog.messages) == 1
    # a process started later keeps the lower rate
    again = toy.train(tmp_path, **corpus, **options | {"updates": 14})
    assert again.brain.rate_scale == 0.5


def test_what_was_saved_because_a_run_stopped_amid_skipped_updates_is_not_gone_back_to(
    toy, tmp_path, corpus, monkeypatch
):
    optimizers_step, stopped = toy.ToyBrain.optimizers_step, tmp_path / "stopped"

    def spoilt(self):
        if self.optimizer_step >= 4 and self.rate_scale == 1.0:
            next(iter(self.model.parameters())).grad.fill_(float("nan"))
        optimizers_step(self)
        if self.optimizer_step == 6 and not stopped.exists():
            stopped.touch()
            signal.raise_signal(signal.SIGUSR1)

    monkeypatch.setattr(toy.ToyBrain, "optimizers_step", spoilt)
    options = {"updates": 12, "checkpoint_every": 2, "max_skipped_updates": 4, "on_nonfinite": "rewind"}
    with pytest.raises(StoppedError, match="after update 6"):
        toy.train(tmp_path, **corpus, **options)
    result = toy.train(tmp_path, **corpus, **options)
    assert result.brain.rewinds == 1 and result.brain.optimizer_step == 12
    # of the updates after the fourth, each was done again at half the rate
    losses = toy.losses(tmp_path)
    assert [step for step, _ in losses] == list(range(1, 13)) and all(math.isfinite(loss) for _, loss in losses)


def test_a_run_that_diverges_at_any_rate_is_given_up(toy, tmp_path, corpus, caplog, monkeypatch):
    optimizers_step = toy.ToyBrain.optimizers_step

    def spoilt(self):
        if self.optimizer_step >= 4:
            next(iter(self.model.parameters())).grad.fill_(float("nan"))
        optimizers_step(self)

    monkeypatch.setattr(toy.ToyBrain, "optimizers_step", spoilt)
    options = {"updates": 12, "checkpoint_every": 2, "max_skipped_updates": 3, "on_nonfinite": "rewind"}
    with pytest.raises(InputError, match="3 updates in a row"):
        toy.train(tmp_path, **corpus, **options)
    assert toy.log_lines(tmp_path)[-1]["step"] == 7, "the line that shows why is missing"
    found = [message for message in caplog.messages if "Going back to the last checkpoint" in message]
    assert [float(re.search(r"with ([\d.]+) of", message)[1]) for message in found] == [0.5, 0.25, 0.125, 0.0625]


def test_ranks_go_back_together(toy, tmp_path, corpus):
    """One of them has a loss that is not finite."""
    options = {"updates": 10, "checkpoint_every": 2, "max_skipped_updates": 3, "on_nonfinite": "rewind"}
    call = {"output": str(tmp_path / "run"), **{name: str(path) for name, path in corpus.items()}, **options}
    ranks = toy.train_ranks(tmp_path / "ranks", ("rank_train_diverging", call))
    assert [rank["steps"] for rank in ranks] == [10, 10]
    assert all(torch.equal(ranks[1]["state"][name], tensor) for name, tensor in ranks[0]["state"].items())
    assert [step for step, _ in toy.losses(tmp_path / "run")] == list(range(1, 11))


def test_another_objective_is_refused(toy, tmp_path, corpus):
    toy.train(tmp_path, **corpus, updates=3)
    with pytest.raises(InputError, match=r"objective.masking.prob: 0.3 there, 0.9 here\): give another"):
        toy.train(tmp_path, **corpus, updates=5, model={"prob": 0.9})


@pytest.mark.parametrize(("most", "ends"), [(7, False), (6, True)])
def test_updates_skipped_in_a_row_are_counted_across_log_lines(toy, tmp_path, corpus, monkeypatch, most, ends):
    """Updates 4 to 9 are skipped; no line has skipped ones alone."""
    optimizers_step = toy.ToyBrain.optimizers_step

    def spoilt(self):
        if 3 <= self.optimizer_step < 9:
            next(iter(self.model.parameters())).grad.fill_(float("nan"))
        optimizers_step(self)

    monkeypatch.setattr(toy.ToyBrain, "optimizers_step", spoilt)
    settings = {**corpus, "updates": 12, "log_interval": 6, "max_skipped_updates": most}
    if ends:
        with pytest.raises(InputError, match="6 updates in a row, of those up to 12"):
            toy.train(tmp_path, **settings)
    else:
        assert int(toy.train(tmp_path, **settings).brain.account.totals[1]) == 6


def test_a_spike_is_skipped_and_counted(toy, tmp_path):

    model = toy.make_model()
    batches = [toy.make_batch(model, [wave], number=number) for number, wave in enumerate(waves(0, (), 12))]

    class Spiking(toy.ToyBrain):
        """One gradient is a thousand times the others."""

        def optimizers_step(self):
            if self.optimizer_step == 8:
                self.before = {name: value.clone() for name, value in self.model.state_dict().items()}
                for parameter in self.model.parameters():
                    parameter.grad.mul_(1000)
            super().optimizers_step()
            if self.optimizer_step == 9:
                after = self.model.state_dict()
                self.untouched = all(torch.equal(after[name], value) for name, value in self.before.items())

    original, toy.ToyBrain = toy.ToyBrain, Spiking
    patch = pytest.MonkeyPatch()
    patch.setattr(update_guard, "SPIKES_FROM", 5)
    try:
        brain = toy.fit_batches(tmp_path, model, batches, spike_ratio=20.0)
    finally:
        toy.ToyBrain = original
        patch.undo()
    assert int(brain.account.totals[1]) == 1 and brain.untouched


@pytest.mark.parametrize("ratio", [20.0, 5.0])
def test_a_spike_is_what_is_above_the_ratio_from_update_101_on(ratio):
    made = {}
    for update in (100, 101):
        for times in (0.995 * ratio, 1.005 * ratio):
            guard = update_guard.UpdateGuard("cpu", ratio)
            guard.judge(torch.tensor(3.0), 1)  # the usual norm
            made[update, times > ratio] = bool(guard.judge(torch.tensor(3.0 * times), update))
    assert made == {(100, False): True, (100, True): True, (101, False): True, (101, True): False}


def test_codebook_use_that_has_halved_is_warned_of_each_time(tmp_path, caplog):
    log = ProgressLog(tmp_path)
    log.open(0, None, show_bar=False)
    for step, perplexity in enumerate((100.0, 200.0, 150.0, 90.0, 80.0, 40.0)):
        log.write({"event": "train", "step": step, "code_perplexity": perplexity})
    found = [message for message in caplog.messages if "perplexity of the codes" in message]
    assert len(found) == 2 and "from 200.0 to 90.0" in found[0] and "from 90.0 to 40.0" in found[1]


# ---------------------------------------------------------------- ranks


def test_ranks_wait_as_long_for_one_that_writes_as_all_else_waits(monkeypatch):
    made = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "new_group", lambda **options: made.append(options))
    with Requests():
        assert made == [{"backend": "gloo", "timeout": timedelta(hours=2)}]


def test_one_process_agrees_with_itself():
    check_ranks_agree(model="a")


def test_ranks_that_were_given_other_data_or_models_find_out_at_the_start(toy, tmp_path):
    settings = {"updates": 2, "checkpoints": False}
    folders = [toy.write_noise(tmp_path / f"audio{rank}", [1.0 + 0.1 * rank] * 4, seed=1) for rank in (0, 1)]
    calls = [
        ("rank_train", {"output": str(tmp_path / "run"), "train_folder": str(folder), **settings}) for folder in folders
    ]
    with pytest.raises(AssertionError, match=r"rank 1 was given other things than rank 0 \(training.utterances: 4"):
        toy.train_ranks(tmp_path / "data", calls)
    calls = [
        ("rank_train", {"output": str(tmp_path / "run"), "train_folder": str(folders[0]), "model": model, **settings})
        for model in ({}, {"quantizer_seed": 1})
    ]
    with pytest.raises(
        AssertionError, match=r"rank 1 was given other things than rank 0 \(model.quantizer.seed: 1 there, 0"
    ):
        toy.train_ranks(tmp_path / "codebook", calls)


def test_ranks_that_were_given_other_options_find_out_before_anything_is_built(toy, tmp_path):
    path = tmp_path / "some.yaml"
    path.write_text("log_interval: 10\nmodel: !new:torch.nn.Linear [1, 1]\n")
    calls = [("rank_load_recipe", {"yaml": str(path), "more": [f"--log_interval={count}"]}) for count in (10, 20)]
    with pytest.raises(AssertionError, match=r"rank 1 was given other things than rank 0 \(options: log_interval: 20"):
        toy.train_ranks(tmp_path / "options", calls)
    other = tmp_path / "other.yaml"
    other.write_text("log_interval: 20\n")
    calls = [("rank_load_recipe", {"yaml": str(one), "more": []}) for one in (path, other)]
    with pytest.raises(AssertionError, match=r"rank 1 was given other things than rank 0 \(yaml: "):
        toy.train_ranks(tmp_path / "yaml", calls)


def test_a_signal_to_one_rank_ends_all_after_the_same_update(toy, tmp_path, corpus):
    call = {"output": str(tmp_path / "run"), **{name: str(path) for name, path in corpus.items()}, "updates": 20}
    with pytest.raises(AssertionError) as error:
        toy.train_ranks(tmp_path / "ranks", [("rank_train", {**call, "signal_at": at}) for at in (0, 3)])
    text = str(error.value)
    assert "by a signal to another rank after update" in text and "by SIGUSR1 after update" in text
    ended = {json.loads(line)["step"] for line in (tmp_path / "run" / "train_log.jsonl").read_text().splitlines()}
    assert max(ended) == 5  # the request is on its way for an update


WORKER = """
import os, signal, subprocess, sys, time, torch
from speechbrain_bestrq.stopping import leave_stopping_to_parent
torch.set_num_threads(1)
loader = torch.utils.data.DataLoader(range(9), num_workers=1, worker_init_fn=leave_stopping_to_parent)
batches = iter(loader)
next(batches)
worker = batches._workers[0].pid
for name in ("TERM", "INT", "USR1"):
    subprocess.run(["kill", f"-{name}", str(worker)], check=True)  # by another process than the parent
time.sleep(0.5)
assert [int(batch) for batch in batches] == list(range(1, 9))
batches = iter(loader)
print(batches._workers[0].pid, flush=True)
os.kill(batches._workers[0].pid, signal.SIGTERM) if "kill" in sys.argv else next(batches)
batches._workers[0].join() if "kill" in sys.argv else None
"""


@pytest.mark.parametrize("how", ["leave", "kill"])
def test_workers_outlive_signals_from_outside_and_end_with_the_run(how):
    """Also with an iterator still open, where ``multiprocessing`` sends SIGTERM and waits without end."""
    done = subprocess.run([sys.executable, "-c", WORKER, how], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not Path(f"/proc/{done.stdout.strip()}").exists()
