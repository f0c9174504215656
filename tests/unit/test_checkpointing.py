"""A checkpoint is whole or not there."""

import errno
import os
import shutil
import time
from pathlib import Path

import pytest
import torch

from speechbrain_bestrq import writing
from speechbrain_bestrq.checkpointing import UNFINISHED, AtomicCheckpointer, SaveError


class Killed(BaseException):
    """Stands for a kill in the middle of saving."""


class Fragile:
    """Something to save that dies half-way through when told to."""

    def __init__(self):
        self.state, self.dies = 0, False

    def save(self, _instance, path):
        path.write_text(str(self.state))
        if self.dies:
            raise Killed

    def load(self, _instance, path, _end_of_epoch):
        self.state = int(path.read_text())


@pytest.fixture
def start(tmp_path):
    """Return a function that starts a run: its checkpointer, its model and what may die."""

    def make():
        model, fragile = torch.nn.Linear(2, 2), Fragile()
        checkpointer = AtomicCheckpointer(
            checkpoints_dir=tmp_path / "save",
            recoverables={"model": model, "fragile": fragile},
            custom_save_hooks={"fragile": fragile.save},
            custom_load_hooks={"fragile": fragile.load},
        )
        return checkpointer, model, fragile

    return make


def names(checkpointer):
    return sorted(checkpoint.path.name for checkpoint in checkpointer.list_checkpoints())


@pytest.mark.parametrize("name", [None, "second"])
def test_a_kill_while_saving_leaves_the_earlier_checkpoint_and_no_other(start, name):
    checkpointer, model, fragile = start()
    fragile.state = 5
    first = checkpointer.save_checkpoint(meta={"step": 1}, name="first")
    weight = model.weight.detach().clone()
    fragile.state, fragile.dies = 6, True
    torch.nn.init.zeros_(model.weight)
    with pytest.raises(Killed):
        checkpointer.save_checkpoint(meta={"step": 2}, name=name)
    assert names(checkpointer) == ["CKPT+first"]

    resumed, model, fragile = start()
    assert names(resumed) == ["CKPT+first"]
    assert resumed.recover_if_possible().path == first.path
    assert fragile.state == 5
    assert torch.equal(model.weight, weight)


def test_what_a_kill_left_over_is_removed_when_the_next_start_saves(start, tmp_path):
    checkpointer, _, fragile = start()
    checkpointer.save_checkpoint(name="first")
    fragile.dies = True
    with pytest.raises(Killed):
        checkpointer.save_checkpoint(name="second")
    assert list((tmp_path / "save").glob(f"{UNFINISHED}+*"))
    resumed, _, _ = start()  # the process before may still be saving
    assert list((tmp_path / "save").glob(f"{UNFINISHED}+*"))
    resumed.save_checkpoint(name="third")
    assert {path.name for path in (tmp_path / "save").iterdir()} == {"CKPT+first", "CKPT+third"}


def test_a_kill_while_deleting_leaves_no_folder_that_looks_valid(start, tmp_path, monkeypatch):
    checkpointer, _, _ = start()
    for step in (1, 2, 3):
        checkpointer.save_checkpoint(meta={"step": step}, name=str(step))

    def killed(path):
        (path / "checksums.json").unlink()
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", killed)
        with pytest.raises(Killed):
            checkpointer.delete_checkpoints(importance_keys=[lambda checkpoint: checkpoint.meta["step"]])
    resumed, _, _ = start()
    assert len(names(resumed)) == 2 and resumed.recover_if_possible(max_key="step").meta["step"] == 3


def test_a_folder_that_cannot_be_deleted_is_a_warning(start, monkeypatch, caplog):
    checkpointer, _, _ = start()
    for step in (1, 2):
        checkpointer.save_checkpoint(meta={"step": step}, name=str(step))

    def refuse(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("os.rename", refuse)
    checkpointer.delete_checkpoints(importance_keys=[lambda checkpoint: checkpoint.meta["step"]])
    assert "CKPT+1 cannot be deleted ([Errno 30] Read-only file system)" in caplog.text


def test_a_kill_while_saving_under_a_name_again_keeps_the_old_one(start):
    checkpointer, _, fragile = start()
    fragile.state = 5
    checkpointer.save_checkpoint(meta={"step": 1}, name="last")
    fragile.state, fragile.dies = 6, True
    with pytest.raises(Killed):
        checkpointer.save_checkpoint(meta={"step": 2}, name="last")
    resumed, _, fragile = start()
    assert resumed.recover_if_possible().meta["step"] == 1
    assert fragile.state == 5


def test_a_name_used_again_replaces_the_old_one(start):
    checkpointer, _, fragile = start()
    for step in (1, 2):
        fragile.state = 10 * step
        checkpointer.save_checkpoint(meta={"step": step}, name="last")
    assert names(checkpointer) == ["CKPT+last"]
    resumed, _, fragile = start()
    assert resumed.recover_if_possible().meta["step"] == 2
    assert fragile.state == 20


def test_what_is_returned_is_where_it_says(start):
    checkpointer, _, _ = start()
    checkpoint = checkpointer.save_checkpoint(meta={"loss": 2.0})
    assert checkpoint.path.name.startswith("CKPT+")
    assert set(checkpoint.paramfiles) == {"model", "fragile"}
    assert all(path.is_file() and path.parent == checkpoint.path for path in checkpoint.paramfiles.values())
    assert checkpoint.meta["loss"] == 2.0
    assert checkpointer.find_checkpoint().path == checkpoint.path


def test_a_later_save_looks_no_longer_for_what_to_delete_than_the_second(start, monkeypatch):
    """SpeechBrain's save_and_keep_only adds a key to a default list that lives as long as the process."""
    checkpointer, _, _ = start()
    looked, find = [], type(checkpointer).find_checkpoints

    def noted(self, *arguments, **options):
        looked.append(1)
        return find(self, *arguments, **options)

    monkeypatch.setattr(type(checkpointer), "find_checkpoints", noted)
    each = []
    for step in range(6):
        before = len(looked)
        checkpointer.save_and_keep_only(meta={"step": step, "loss": 1.0}, min_keys=["loss"], end_of_epoch=False)
        each.append(len(looked) - before)
    assert len(set(each[1:])) == 1, each


def test_the_newest_is_the_one_saved_last_whatever_the_clock_says(start, monkeypatch):
    """A run goes on on a machine whose clock is two hours behind."""
    checkpointer, _, _ = start()
    now = [1e9 + 7200.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    for step in range(6):
        now[0] = 1e9 + step if step > 2 else now[0] + 1
        checkpointer.save_and_keep_only(meta={"step": step}, name=f"step{step}", num_to_keep=1)
        assert checkpointer.find_checkpoint().meta["step"] == step
    assert names(checkpointer) == ["CKPT+step5"]


def test_best_and_last_are_kept_and_the_rest_deleted(start):
    checkpointer, _, _ = start()
    for step, loss in enumerate((3.0, 1.0, 2.0, 4.0)):
        checkpointer.save_and_keep_only(
            meta={"loss": loss, "step": step}, name=f"step{step}", min_keys=["loss"], num_to_keep=1
        )
    assert names(checkpointer) == ["CKPT+step1", "CKPT+step3"]
    assert checkpointer.find_checkpoint(min_key="loss").meta["step"] == 1
    assert checkpointer.find_checkpoint().meta["step"] == 3


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOTCONN])
def test_a_folder_that_cannot_be_listed_is_a_disk_failure_and_saving_goes_on_when_it_is_back(
    start, monkeypatch, caplog, number
):
    checkpointer, _, _ = start()
    checkpointer.save_checkpoint(name="first", meta={"loss": 2.0})

    def refuse(path, *_):
        raise OSError(number, os.strerror(number), str(path))

    with monkeypatch.context() as patch:
        for listing in ("iterdir", "glob"):
            patch.setattr(Path, listing, refuse)
        patch.setattr(os, "listdir", refuse)
        patch.setattr(os, "scandir", refuse)
        with pytest.raises(SaveError, match="no checkpoint could be saved in .*save"):
            checkpointer.save_checkpoint(name="second", meta={"loss": 1.0})
        checkpointer.keep_newest_and_best(1, "loss")
    assert "nothing is deleted" in caplog.text
    checkpointer.save_checkpoint(name="third", meta={"loss": 3.0})
    assert names(checkpointer) == ["CKPT+first", "CKPT+third"]


def test_a_folder_that_was_moved_away_is_made_anew(start, tmp_path):
    checkpointer, _, _ = start()
    checkpointer.save_checkpoint(name="first")
    shutil.move(tmp_path / "save", tmp_path / "elsewhere")
    checkpointer.save_checkpoint(name="second")
    assert names(checkpointer) == ["CKPT+second"]


def test_newest_and_best_are_kept_of_what_may_be_compared(start):
    checkpointer, _, _ = start()
    for number, (loss, audio) in enumerate([(0.1, "old"), (3.0, "new"), (2.0, "new"), (4.0, "new"), (5.0, "new")]):
        checkpointer.save_checkpoint(name=str(number), meta={"loss": loss, "audio": audio})
        checkpointer.keep_newest_and_best(2, "loss", lambda checkpoint: checkpoint.meta["audio"] == "new")
    assert names(checkpointer) == ["CKPT+2", "CKPT+3", "CKPT+4"]


@pytest.mark.parametrize(("number", "passed_over"), [(errno.EINVAL, True), (errno.EIO, False)])
def test_a_file_system_that_cannot_sync_folders_is_no_failure(tmp_path, monkeypatch, number, passed_over):
    def refuse(_descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    if passed_over:
        writing.sync(tmp_path)
    else:
        with pytest.raises(OSError):
            writing.sync(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        writing.sync(tmp_path / "file")


def test_a_file_that_a_hook_misses_is_no_failure_of_the_disk_and_a_disk_that_is_away_is(start, tmp_path, monkeypatch):
    checkpointer, _, fragile = start()
    checkpointer.save_checkpoint(name="first")
    with monkeypatch.context() as patch:
        patch.setitem(checkpointer.custom_save_hooks, "fragile", lambda *_: (tmp_path / "scratch").read_text())
        with pytest.raises(FileNotFoundError):
            checkpointer.save_checkpoint(name="second")
    shutil.move(tmp_path / "save", tmp_path / "elsewhere")
    checkpointer._device += 1  # as if what is left were the disk below a mount point
    with pytest.raises(SaveError, match="its disk is not mounted"):
        checkpointer.save_checkpoint(name="third")
    assert not (tmp_path / "save").exists()
