"""The demo: it goes the whole way, can be called again, and what it tells to type works."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from speechbrain_bestrq import demo
from speechbrain_bestrq.cli import main
from speechbrain_bestrq.errors import InputError


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A demo of a few seconds of speech and two updates, and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    words = ["demo", "--folder", str(folder), "--hours", "0.02", "--updates", "2"]
    command = [Path(sys.executable).with_name("sb-bestrq"), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder, words, done


def test_the_demo_ends_with_curve_cost_encoder_and_three_lines_that_run(finished):
    folder, _, done = finished
    text = done.stdout
    table = [line.split() for line in text.splitlines()]
    valid = [json.loads(line) for line in (folder / "run" / "train_log.jsonl").read_text().splitlines()][-1]
    assert valid["event"] == "valid" and valid["step"] == 2
    assert ["2", f"{valid['audio_hours']:.1f}", f"{valid['loss']:.3f}", f"{valid['gain']:.3f}"] in [
        row[:4] for row in table
    ]
    assert f"Encoder: {folder / 'run' / 'encoder'} " in text
    assert "Cost: " in text
    lines = [line.strip() for line in text.splitlines()][-3:]
    names = {}
    exec("\n".join(lines), names)
    hidden = names["hidden"]
    assert hidden.shape[0] == 1 and hidden.shape[2] == 192 and hidden.isfinite().all()


def test_the_demo_says_what_it_is_doing(finished):
    _, _, done = finished
    for step in ("[1/3]", "[2/3]", "[3/3]", "python train.py hparams/bestrq_small.yaml"):
        assert step in done.stderr


def test_a_second_call_finds_everything_done(finished, capsys, caplog):
    folder, words, _ = finished
    before = {path: path.stat().st_mtime_ns for path in (folder / "run" / "save").rglob("*")}
    caplog.set_level("INFO")
    assert main([*words, "--json"]) == 0
    assert "done already" in caplog.text
    summary = json.loads(capsys.readouterr().out)
    assert summary["updates"] == 2
    assert {path: path.stat().st_mtime_ns for path in (folder / "run" / "save").rglob("*")} == before


def test_an_interrupted_demo_goes_on(tmp_path):
    words = ["demo", "--folder", str(tmp_path), "--hours", "0.02", "--updates", "8"]
    command = [Path(sys.executable).with_name("sb-bestrq"), *words]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, process_group=0)
    deadline = time.monotonic() + 200
    while not list((tmp_path / "run" / "save").glob("CKPT+*")) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, error = process.communicate(timeout=100)
    assert process.returncode == 130, error
    assert "Traceback" not in error
    assert error.splitlines()[-1] == "sb-bestrq: interrupted"

    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "train_log.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps)) and steps[-1] == 8  # no validation twice
    assert "Loading a checkpoint" in (tmp_path / "run" / "log.txt").read_text()


def test_without_the_recipes_the_demo_says_where_it_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "RECIPE", tmp_path / "nowhere")
    with pytest.raises(InputError, match="run the demo in a checkout"):
        demo.run_demo(tmp_path)


def test_a_failed_training_is_one_line(tmp_path, monkeypatch):
    recipe = tmp_path / "recipe"
    recipe.mkdir()
    (recipe / "train.py").write_text("raise SystemExit(3)")
    monkeypatch.setattr(demo, "RECIPE", recipe)
    with pytest.raises(InputError, match="ended with status 3"):
        demo._train(demo.training_command(tmp_path, 2))
