"""What is noted of the machine and the code that a figure came from."""

import subprocess

from speechbrain_bestrq import machine


def git(folder, *words):
    settings = ("-c", "user.name=Somebody", "-c", "user.email=somebody@example.org")
    done = subprocess.run(["git", "-C", str(folder), *settings, *words], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_a_commit_says_when_its_files_have_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "machine.py"))
    (tmp_path / "machine.py").write_text("one")
    assert machine.commit() is None
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "machine.py")
    git(tmp_path, "commit", "-q", "-m", "first")
    git(tmp_path, "tag", "-a", "v1", "-m", "tagged")  # a name is no commit
    (tmp_path / "other.py").write_text("not tracked")
    assert machine.commit() == git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "machine.py").write_text("two")
    assert machine.commit() == git(tmp_path, "rev-parse", "HEAD") + "-dirty"
