"""The whole of a small reproduction, by the command: real stages, stopped and killed, the same tables."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

COMMAND = Path(sys.executable).with_name("sb-bestrq")
TINY = {
    "train_splits": "[train-clean-100]",
    "valid_splits": "[dev-clean]",
    "d_model": 48,
    "num_heads": 4,
    "d_ffn": 64,
    "num_layers": 1,
    "max_batch_seconds": 20,
    "grad_accumulation_factor": 1,
    "valid_interval": 10,
    "ckpt_interval_steps": 1,
}
PRESET = {
    "seeds": [1],
    "synthetic": {"librispeech": 0.02, "voxceleb": 0.05},
    "updates": [2, 30],
    "pretraining": {
        "bestrq": {
            "yaml": "bestrq_small",
            "options": {**TINY, "optimizer_step_limit": 30, "codebook_size": 64, "statistics_hours": 0.01},
        }
    },
    "baselines": ["fbank"],
    "tasks": {"verification": {"frozen": {"yaml": "probe_small", "options": {"number_of_epochs": 1}}}},
}
STAGES = 7
#: Of stages that are stopped, what is there when they are at work and not yet done.
AT_WORK = {
    "speech/voxceleb": "voxceleb/wav/**/*.*",
    "pretraining/bestrq": "save/CKPT*",
    "verification-frozen/bestrq-30/1": "manifests/*.csv",
}
TABLES = ("table1.csv", "table2.csv", "table3.csv")


def words(tmp_path):
    """The command, with a preset of its own."""
    preset = tmp_path / "tiny.yaml"
    preset.write_text(yaml.safe_dump(PRESET))
    return [COMMAND, "reproduce", "--preset", preset, "--output_folder", tmp_path / "out", "--num_workers", "0"]


def run(tmp_path):
    """To its end."""
    return subprocess.run(words(tmp_path), capture_output=True, text=True, timeout=300)


def stop_at(tmp_path, stage, number):
    """Begin, and send a signal while a stage is at work; return the exit status and what was said."""
    command = words(tmp_path)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, process_group=0)
    said = []
    for line in process.stderr:
        said.append(line)
        if f"] {stage}" in line:
            break
    folder, deadline = tmp_path / "out" / stage, time.monotonic() + 100
    while not any(folder.glob(AT_WORK[stage])) and process.poll() is None:
        assert time.monotonic() < deadline, "the stage makes nothing"
        time.sleep(0.01)
    assert process.poll() is None, said
    process.send_signal(number)
    _, error = process.communicate(timeout=100)
    assert "made" not in json.loads((folder / "stage.json").read_text()), "it was over before it was stopped"
    return process.returncode, "".join(said) + error


def tables(tmp_path):
    """What the tables say."""
    return [(tmp_path / "out" / name).read_text() for name in TABLES]


def test_interrupted_it_goes_on_and_a_further_call_has_nothing_to_do(tmp_path):
    status, error = stop_at(tmp_path, "pretraining/bestrq", signal.SIGINT)
    assert status == 130 and error.splitlines()[-1] == "sb-bestrq: interrupted", error
    assert "Traceback" not in error

    done = run(tmp_path)
    assert done.returncode == 0, done.stderr
    trying, already, first = done.stderr.splitlines()[:3]
    assert trying.startswith("trying how fast") and already == f"3 of {STAGES} stages are done already"
    # to tell the time left, it was tried
    assert first.startswith(f"[4/{STAGES}] pretraining/bestrq, about ") and first.endswith(" left")
    assert f"Report: {tmp_path / 'out' / 'report.html'}" in done.stdout
    report = (tmp_path / "out" / "report.md").read_text()
    assert all(f"\nTable {number}: " in done.stdout for number in (1, 2, 3)) and "train.py" not in done.stdout
    figures = re.findall(r"\[(\d+\.\d+) \(", report.split("## Table 1")[1].split("## Table 2")[0])
    assert len(figures) == 3 and all(f" {figure} (" in done.stdout for figure in figures)
    assert "paper 16.42" in done.stdout and "not run" in done.stdout
    rows = {line.split("|")[1].strip(): line for line in report.splitlines() if line.startswith("| ")}
    assert {"filter banks", "BEST-RQ, 2 updates", "BEST-RQ, 30 updates"} <= rows.keys()

    lines = [
        line.strip()
        for line in report.split("## Use an encoder")[1].split("## ")[0].splitlines()
        if line.startswith("    ")
    ]
    check = subprocess.run(
        [sys.executable, "-c", "\n".join([*lines, "print(hidden.shape[2], bool(hidden.isfinite().all()))"])],
        cwd=tmp_path / "out",
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert check.stdout == "48 True\n", check.stderr

    taken_over(tmp_path, rows)

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("stage.json")}
    again = run(tmp_path)
    assert again.returncode == 0 and again.stderr == f"{STAGES} of {STAGES} stages are done already\n"
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("stage.json")} == before


def taken_over(tmp_path, rows):
    """The pre-training that was done, in another reproduction, without the corpus that it was trained on."""
    preset = tmp_path / "given.yaml"
    preset.write_text(yaml.safe_dump({key: value for key, value in PRESET.items() if key != "synthetic"}))
    out = tmp_path / "out"
    words = [COMMAND, "reproduce", "--preset", preset, "--voxceleb", out / "speech" / "voxceleb" / "voxceleb"]
    words += ["--pretrained", f"bestrq={out / 'pretraining' / 'bestrq'}"]
    words += ["--output_folder", tmp_path / "other", "--num_workers", "0"]
    for said in (f"[1/{STAGES - 3}] pretraining/bestrq", f"{STAGES - 3} of {STAGES - 3} stages are done already"):
        done = subprocess.run(words, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0 and said in done.stderr, done.stderr
    report = (tmp_path / "other" / "report.md").read_text()
    lines = {line.split("|")[1].strip(): line for line in report.splitlines() if line.startswith("| ")}
    for name in ("filter banks", "BEST-RQ, 2 updates", "BEST-RQ, 30 updates"):
        assert lines[name] == rows[name]
    command = json.loads((out / "pretraining" / "bestrq" / "run.json").read_text())["command"]
    assert command in report and f"bestrq={out}" in report


@pytest.mark.slow
def test_killed_at_three_stages_it_ends_with_the_tables_of_an_unbroken_run(tmp_path):
    for name in ("unbroken", "killed"):
        (tmp_path / name).mkdir()
    unbroken = run(tmp_path / "unbroken")
    assert unbroken.returncode == 0, unbroken.stderr
    for stage in AT_WORK:
        status, _ = stop_at(tmp_path / "killed", stage, signal.SIGKILL)
        assert status == -signal.SIGKILL
    done = run(tmp_path / "killed")
    assert done.returncode == 0, done.stderr
    assert tables(tmp_path / "killed") == tables(tmp_path / "unbroken")
