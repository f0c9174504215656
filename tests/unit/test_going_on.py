"""What a pre-training run that was stopped, or could not save, takes up again."""

import errno
import os
import re
import shutil
import signal

import pytest
import speechbrain as sb

from speechbrain_bestrq import encoder_folders
from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.stopping import StoppedError


@pytest.fixture
def corpus(toy, tmp_path):
    """Ten utterances, of which an epoch has five batches, and two to validate on."""
    return {
        "train_folder": toy.write_noise(tmp_path / "audio", [1.0] * 10, seed=1),
        "valid_folder": toy.write_noise(tmp_path / "valid", [1.0, 0.7], seed=2),
        "max_batch_seconds": 2.0,
    }


def stop_in_validation(patch, toy, update):
    """Let a signal come in the validation after an update."""
    on_stage_start = toy.ToyBrain.on_stage_start

    def interrupted(self, stage, epoch=None):
        on_stage_start(self, stage, epoch)
        if stage == sb.Stage.VALID and self.optimizer_step == update:
            signal.raise_signal(signal.SIGTERM)

    patch.setattr(toy.ToyBrain, "on_stage_start", interrupted)


@pytest.mark.parametrize(("update", "interval"), [(3, 3), (5, None)])
def test_a_validation_that_was_broken_off_has_the_temperature_of_its_update(
    toy, tmp_path, corpus, monkeypatch, update, interval
):
    """wav2vec 2.0's, which falls with each update; amid an epoch and at its end, where no update comes before."""
    settings = {**corpus, "updates": 7, "valid_interval": interval, "model": {"method": "wav2vec2"}}
    toy.train(tmp_path / "unbroken", **settings)
    with monkeypatch.context() as patch:
        stop_in_validation(patch, toy, update)
        with pytest.raises(StoppedError, match=f"after update {update}"):
            toy.train(tmp_path / "run", **settings)
    toy.train(tmp_path / "run", **settings)
    ours, theirs = (
        [(line["step"], line["temperature"], line["loss"]) for line in toy.log_lines(tmp_path / folder, "valid")]
        for folder in ("run", "unbroken")
    )
    assert ours == theirs and ours[0][:2] == (update, pytest.approx(2.0 * 0.9 ** (update - 1)))


def spoil(monkeypatch, toy, updates):
    """Let the gradients of these updates not be finite."""
    optimizers_step = toy.ToyBrain.optimizers_step

    def spoilt(self):
        if self.optimizer_step + 1 in updates:
            next(iter(self.model.parameters())).grad.fill_(float("nan"))
        optimizers_step(self)

    monkeypatch.setattr(toy.ToyBrain, "optimizers_step", spoilt)


def test_a_checkpoint_is_withheld_in_a_row_of_skipped_updates_alone_and_saved_when_it_is_over(
    toy, tmp_path, corpus, monkeypatch
):
    """Update 6 is that of the last log line before the checkpoint of 8; update 16 is that of a checkpoint."""
    spoil(monkeypatch, toy, {6, 16})
    saved = []
    save = toy.AtomicCheckpointer.save_checkpoint

    def noted(self, *arguments, **options):
        if not options["end_of_epoch"]:
            saved.append(options["meta"]["step"])
        return save(self, *arguments, **options)

    monkeypatch.setattr(toy.AtomicCheckpointer, "save_checkpoint", noted)
    toy.train(tmp_path, **corpus, updates=19, log_interval=3, checkpoint_every=4, stop_after=19)
    assert saved == [4, 5, 8, 12, 18]  # 5: before the first validation, at the end of the epoch


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weight_decay": 0.1}, "(weight_decay: 0.01 there, 0.1 here)"),
        ({"betas": (0.9, 0.999), "eps": 1e-8}, "(betas: (0.9, 0.98) there, (0.9, 0.999) here, eps: 1e-09 there, 1e-08"),
        ({"optimizer": "Adam"}, "(decoupled_weight_decay: True there, False here)"),
        ({"vector_decay": False}, "remove_vector_weight_decay makes two: 1 there, 2 here)"),
    ],
)
def test_a_run_does_not_go_on_with_other_settings_of_the_optimizer(toy, tmp_path, corpus, changed, message):
    toy.train(tmp_path, **corpus, updates=2)
    kept = (tmp_path / "train_log.jsonl").read_bytes(), (tmp_path / "run.json").read_bytes()
    with pytest.raises(InputError, match=re.escape(message)) as error:
        toy.train(tmp_path, **corpus, updates=4, **changed)
    assert "\n" not in str(error.value) and str(tmp_path / "save" / "CKPT") in str(error.value)
    assert ((tmp_path / "train_log.jsonl").read_bytes(), (tmp_path / "run.json").read_bytes()) == kept


def test_the_learning_rate_is_the_schedules(toy, tmp_path, corpus):
    toy.train(tmp_path, **corpus, updates=2)
    again = toy.train(tmp_path, **corpus, updates=3, peak=2e-3)
    assert toy.log_lines(tmp_path)[-1]["learning_rate"] == again.brain.hparams.lr_schedule(3)


# ---------------------------------------------------------------- encoders that the disk did not take


def refuse_encoders(patch, times=None, step=2):
    """Let the encoders of an update not be written, so many times or ever."""
    write, refused = encoder_folders.save_encoder, []

    def full(*arguments, **facts):
        if facts["step"] == step and (times is None or len(refused) < times):
            refused.append(facts["folder"])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(*arguments, **facts)

    patch.setattr(encoder_folders, "save_encoder", full)


def weights(folder):
    """The file of an encoder."""
    return (folder / "model.safetensors").read_bytes()


def test_an_encoder_that_could_not_be_written_is_written_later_as_it_was(toy, tmp_path, corpus, monkeypatch, caplog):
    """No checkpoint is saved before; the second attempt, with update 3, fails as well."""
    settings = {**corpus, "updates": 8, "checkpoint_every": 3, "encoder_at_steps": [2]}
    toy.train(tmp_path / "unbroken", **settings)
    refuse_encoders(monkeypatch, times=2)
    toy.train(tmp_path / "run", **settings)
    assert weights(tmp_path / "run" / "encoder@2") == weights(tmp_path / "unbroken" / "encoder@2")
    assert sum("no checkpoint is saved before" in message for message in caplog.messages) == 1
    assert toy.losses(tmp_path / "run") == toy.losses(tmp_path / "unbroken")


@pytest.mark.parametrize("killed", [True, False])
def test_an_encoder_that_was_not_written_to_the_end_is_written_by_the_same_command(
    toy, tmp_path, corpus, monkeypatch, killed
):
    settings = {**corpus, "updates": 8, "checkpoint_every": 1, "encoder_at_steps": [2]}
    toy.train(tmp_path / "unbroken", **settings)
    with monkeypatch.context() as patch:
        refuse_encoders(patch)
        if killed:
            toy.train(tmp_path / "run", **settings, stop_after=6)
        else:
            with pytest.raises(InputError, match="ended after update 8, but its last updates could not be saved"):
                toy.train(tmp_path / "run", **settings)
    newest = toy.AtomicCheckpointer(checkpoints_dir=tmp_path / "run" / "save").find_checkpoint()
    assert newest.meta["step"] == 1
    toy.train(tmp_path / "run", **settings)
    assert weights(tmp_path / "run" / "encoder@2") == weights(tmp_path / "unbroken" / "encoder@2")
    assert toy.losses(tmp_path / "run") == toy.losses(tmp_path / "unbroken")


def test_a_run_that_is_done_writes_the_encoder_of_its_last_update_where_it_is_missing(
    toy, tmp_path, corpus, monkeypatch
):
    settings = {**corpus, "updates": 4, "encoder_at_steps": [4]}
    toy.train(tmp_path, **settings)
    encoder, log = weights(tmp_path / "encoder@4"), (tmp_path / "train_log.jsonl").read_bytes()
    shutil.rmtree(tmp_path / "encoder@4")
    with monkeypatch.context() as patch:
        refuse_encoders(patch, step=4)
        with pytest.raises(InputError, match="encoder@4 could not be written: make room"):
            toy.train(tmp_path, **settings)
    toy.train(tmp_path, **settings, model={"model_seed": 5})
    assert weights(tmp_path / "encoder@4") == encoder and (tmp_path / "train_log.jsonl").read_bytes() == log
    (tmp_path / "encoder@4" / "README.md").write_text("It is there.")
    toy.train(tmp_path, **settings)
    assert (tmp_path / "encoder@4" / "README.md").read_text() == "It is there."
