"""Processes that load data say what they need."""

import os
from types import SimpleNamespace

from speechbrain_bestrq.workers import warn_of_shared_memory


def test_too_little_shared_memory_is_warned_of_before_a_worker_dies_of_it(monkeypatch, caplog):
    room = SimpleNamespace(f_bavail=1000, f_frsize=4096)
    monkeypatch.setattr(os, "statvfs", lambda folder: room)
    warn_of_shared_memory(4_096_000)
    assert not caplog.text
    warn_of_shared_memory(4_096_001)
    assert "/dev/shm has 0.0041 GB of room" in caplog.text and "--shm-size" in caplog.text


def test_where_there_is_no_such_folder_nothing_is_said(tmp_path, caplog):
    warn_of_shared_memory(10**18, str(tmp_path / "none"))
    assert not caplog.text
