"""One writer at a time, or one after another."""

import contextlib
import fcntl
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
import soundfile

from speechbrain_bestrq import locking, recipe
from speechbrain_bestrq.audio import AudioTable
from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.feature_cache import cache_features
from speechbrain_bestrq.locking import fellow_writer, is_empty, next_writer, sole_writer
from speechbrain_bestrq.pcm_cache import cache_audio
from speechbrain_bestrq.task_encoders import TaskEncoder


def waits_for(folder, action: Callable, caplog) -> bool:
    """Whether something says that it waits for another writer, and gets done when that one has left."""
    done = threading.Event()
    thread = threading.Thread(target=lambda: (action(), done.set()))
    caplog.set_level("INFO")
    caplog.clear()
    told = f"Another process is writing in cache_folder '{folder}': waiting for it."
    with next_writer(folder):
        thread.start()
        until = time.monotonic() + 60
        while told not in caplog.messages and not done.is_set() and time.monotonic() < until:
            time.sleep(0.01)
        waited = told in caplog.messages and not done.is_set()
    thread.join(60)
    return waited and done.is_set()


def test_a_sole_writer_has_no_fellows(tmp_path):
    with sole_writer(tmp_path), pytest.raises(InputError, match="is being written by another"), fellow_writer(tmp_path):
        pass
    with (
        fellow_writer(tmp_path),
        fellow_writer(tmp_path),
        pytest.raises(InputError, match="is being written by another process"),
        sole_writer(tmp_path),
    ):
        pass
    with sole_writer(tmp_path):
        pass


def test_locks_are_such_as_nfs_has_for_other_machines(tmp_path, monkeypatch):
    """Of a folder it has none; of a file none for one alone but where it is open to be written."""
    locked, flock = [], fcntl.flock

    def noted(descriptor, operation):
        mode = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
        locked.append((stat.S_ISREG(os.fstat(descriptor).st_mode), mode))
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", noted)
    for kind in (sole_writer, fellow_writer, next_writer):
        with kind(tmp_path):
            pass
    assert set(locked) == {(True, os.O_RDWR)} and len(locked) >= 3


def test_a_lock_ends_with_its_owner_though_a_worker_of_it_lives(tmp_path):
    """As loading workers do for seconds after a run that was killed, which is started again at once."""
    code = (
        "import os, signal, sys, time\n"
        "from pathlib import Path\n"
        "from speechbrain_bestrq.locking import sole_writer\n"
        "with sole_writer(Path(sys.argv[1])):\n"
        "    worker = os.fork()\n"
        "    if not worker:\n"
        "        time.sleep(60)\n"
        "        os._exit(0)\n"
        "    print(worker, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    with open(tmp_path / "printed", "w") as printed:  # a pipe would be the worker's, too
        subprocess.run([sys.executable, "-c", code, str(tmp_path)], stdout=printed)
    worker = int((tmp_path / "printed").read_text())
    try:
        for _ in range(50):  # the worker may not have been given its first moment yet
            with contextlib.suppress(InputError), sole_writer(tmp_path):
                break
            time.sleep(0.1)
        else:
            pytest.fail("the folder is still locked")
    finally:
        os.kill(worker, signal.SIGKILL)


def test_an_owner_leaves_nothing_and_nobody_locks_a_file_that_is_taken_away(tmp_path, monkeypatch):
    with sole_writer(tmp_path):
        for _ in range(2):  # who is refused leaves the owner's alone
            with pytest.raises(InputError, match="another process"), sole_writer(tmp_path):
                pass
        assert is_empty(tmp_path) and len(list(tmp_path.iterdir())) == 1
    assert list(tmp_path.iterdir()) == []
    # between one's opening of the file and its locking the owner ends
    opened, owner = locking._open_for_all, sole_writer(tmp_path)
    owner.__enter__()

    def late(path):
        descriptor = opened(path)
        monkeypatch.setattr(locking, "_open_for_all", opened)
        owner.__exit__(None, None, None)
        return descriptor

    monkeypatch.setattr(locking, "_open_for_all", late)
    with sole_writer(tmp_path), pytest.raises(InputError, match="another process"), sole_writer(tmp_path):
        pass


def test_who_ends_leaves_the_lock_of_another_who_began_the_folder_anew(tmp_path):
    folder = tmp_path / "out"
    with sole_writer(folder):
        folder.rename(tmp_path / "moved")
        other = sole_writer(folder)
        other.__enter__()
    with pytest.raises(InputError, match="another process"), sole_writer(folder):
        pass
    other.__exit__(None, None, None)
    assert list(folder.iterdir()) == []


def test_the_next_writer_waits_and_may_own_the_folder_already(tmp_path, caplog):
    def write():
        with next_writer(tmp_path):
            pass

    with sole_writer(tmp_path):
        assert waits_for(tmp_path, write, caplog)


def test_caches_that_runs_share_are_written_by_one_at_a_time(tmp_path, caplog):
    soundfile.write(tmp_path / "a.wav", np.zeros(16000, dtype=np.int16), 16000)
    rows = {"a": {"wav": str(tmp_path / "a.wav"), "duration": 1.0}}
    states, samples = tmp_path / "states", tmp_path / "samples"
    assert waits_for(states, lambda: cache_features(states, TaskEncoder("fbank"), rows), caplog)
    table = AudioTable(["a"], [str(tmp_path / "a.wav")], [1.0], 16000)
    assert waits_for(samples, lambda: cache_audio(table, samples), caplog)
    # made, they are only read: they may be another user's, or on a file system that cannot be written to
    with next_writer(states), next_writer(samples):
        assert len(cache_features(states, TaskEncoder("fbank"), rows)) == 1
        assert cache_audio(table, samples).read(0, 0, 3).tolist() == [0, 0, 0]


def test_what_the_file_system_refuses_is_one_line_and_other_errors_have_a_traceback(capsys):
    def main(arguments):
        raise PermissionError(13, "Permission denied", "/data/a.flac")

    with pytest.raises(SystemExit) as ended:
        recipe.run_recipe(main)
    assert ended.value.code == 2
    assert (
        capsys.readouterr().err == "error: '/data/a.flac': Permission denied: mend its permissions, or give another.\n"
    )
    with pytest.raises(FileNotFoundError):
        recipe.run_recipe(lambda arguments: open("/nowhere/at/all"))


def test_an_error_of_another_rank_alone_is_told(monkeypatch, capsys):
    def main(arguments):
        raise InputError("the disk of this node is full: make room.")

    monkeypatch.setattr("speechbrain.utils.distributed.if_main_process", lambda: False)
    monkeypatch.setattr("speechbrain.utils.distributed.get_rank", lambda: 3)
    with pytest.raises(SystemExit) as ended:
        recipe.run_recipe(main)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error on rank 3: the disk of this node is full: make room.\n"
