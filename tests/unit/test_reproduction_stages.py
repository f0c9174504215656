"""Stages run once each, in their order, whatever fails, whenever it is stopped."""

import errno
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.reproduction import stages as stages_module
from speechbrain_bestrq.reproduction.stages import LOG_FILE, STAGE_FILE, Stage, StageState, parse_devices, run_stages

#: Writes its product and notes that it ran; "fail" in its words makes it fail.
WORK = """
import os, sys, pathlib, time
folder, seconds, *words = sys.argv[1:]
folder = pathlib.Path(folder)
(folder / "pid").write_text(str(os.getpid()))
with open(folder.parent.parent / "ran.txt", "a") as file:
    file.write("/".join(folder.parts[-2:]) + "\\n")
time.sleep(min(float(seconds), float(os.environ.get("SECONDS_AT_MOST", seconds))))
if "fail" in words:
    print("this is why")
    sys.exit(3)
if "refuse" in words:
    print("loading")
    print("error: no data: give some")
    sys.exit(2)
if "nothing" not in words:
    (folder / "results.json").write_text("{}")
"""


def stage(folder, name, *words, needs=(), seconds=0.0):
    command = (sys.executable, "-c", WORK, str(folder / name), str(seconds), *words)
    return Stage(name, command, ("results.json",), needs)


def ran(folder):
    path = folder / "ran.txt"
    return path.read_text().split() if path.exists() else []


def ends(folder, seconds=20):
    """Whether a stage's process, if it comes to its first line in two seconds, ends in some more."""
    pid, begun = folder / "pid", time.monotonic()
    while not (pid.exists() and pid.read_text()):
        if time.monotonic() > begun + 2:
            return True
        time.sleep(0.02)
    while time.monotonic() < begun + seconds:
        try:
            if not Path("/proc", pid.read_text(), "cmdline").read_bytes():
                return True  # one that has ended, and nobody has waited for
        except OSError:
            return True
        time.sleep(0.02)
    return False


def test_a_stage_after_one_that_failed_runs_and_one_that_needs_it_does_not(tmp_path):
    broken = Stage("probe/a", (sys.executable, "-c", "raise SystemExit(3)"), ("product",))
    needing = stage(tmp_path, "probe/b", needs=("probe/a",))
    stages = [broken, needing, replace(stage(tmp_path, "probe/c"), after=("probe/a",))]
    assert run_stages(stages, tmp_path, lambda line: None).keys() == {"probe/a", "probe/b"}
    assert ran(tmp_path) == ["probe/c"]


def test_with_another_language_model_a_stage_runs_again_where_it_was_trained(tmp_path):
    code = "import sys, pathlib; pathlib.Path(sys.argv[1], 'product').open('a').write('run '); print(sys.argv)"
    folder = tmp_path / "asr" / "a"

    def asr(*more):
        return [Stage("asr/a", (sys.executable, "-c", code, str(folder), *more), ("product",))]

    model = tmp_path / "model.arpa"
    model.write_text("one")
    runs = []
    for more in ((), (), ("--language_model", str(model)), ("--language_model", str(model)), ()):
        assert run_stages(asr(*more), tmp_path, print) == {}
        runs.append((folder / "product").read_text().count("run"))
    assert runs == [1, 1, 2, 2, 2]
    moved = model.rename(tmp_path / "moved.arpa")
    assert StageState(asr("--language_model", str(moved)), tmp_path).is_done("asr/a")
    moved.write_text("another one")
    assert run_stages(asr("--language_model", str(moved)), tmp_path, print) == {}
    assert (folder / "product").read_text().count("run") == 3
    assert [path.name for path in (tmp_path / "asr").iterdir()] == ["a"]


def test_a_stage_that_takes_all_devices_is_not_kept_waiting_by_short_ones_that_come_later(tmp_path):
    stages = [
        stage(tmp_path, "check/a"),
        replace(stage(tmp_path, "train/a"), devices=2),
        *(stage(tmp_path, f"probe/{number}") for number in range(4)),
    ]
    assert run_stages(stages, tmp_path, print, devices=["0", "1"]) == {}
    assert ran(tmp_path)[:2] == ["check/a", "train/a"] and len(ran(tmp_path)) == 6


def test_each_stage_runs_once_after_those_that_it_needs(tmp_path):
    stages = [
        stage(tmp_path, "train/a"),
        stage(tmp_path, "train/b"),
        stage(tmp_path, "probe/a", needs=("train/a",)),
        stage(tmp_path, "probe/b", needs=("train/b", "probe/a")),
    ]
    lines = []
    assert run_stages(stages, tmp_path, lines.append) == {}
    assert ran(tmp_path) == ["train/a", "train/b", "probe/a", "probe/b"]
    assert [line.split(",")[0] for line in lines] == [
        "[1/4] train/a",
        "[2/4] train/b",
        "[3/4] probe/a",
        "[4/4] probe/b",
    ]
    assert ["minute left" in line for line in lines] == [False, True, True, True]
    assert run_stages(stages, tmp_path, lines.append) == {}
    assert len(ran(tmp_path)) == 4 and lines[-1] == "4 of 4 stages are done already"


def test_another_command_does_a_stage_and_what_needs_it_again(tmp_path):
    def plan(*words):
        return [
            stage(tmp_path, "train/a", *words),
            stage(tmp_path, "train/b"),
            stage(tmp_path, "probe/a", needs=("train/a",)),
        ]

    run_stages(plan(), tmp_path, print)
    run_stages(plan("longer"), tmp_path, print)
    assert ran(tmp_path)[3:] == ["train/a", "probe/a"]
    (tmp_path / "train" / "b" / "results.json").unlink()
    run_stages(plan("longer"), tmp_path, print)
    assert ran(tmp_path)[5:] == ["train/b"]
    # what the first commands left is kept
    assert (tmp_path / "train" / "a.before1" / "results.json").is_file()
    assert (tmp_path / "probe" / "a.before1" / "results.json").is_file()
    lines = []
    run_stages(plan("longest"), tmp_path, lines.append)
    assert (tmp_path / "train" / "a.before2").is_dir() and not (tmp_path / "train" / "b.before1").exists()
    assert "train/a: begins anew; what another command, or one with other inputs, made is in a.before2" in lines
    # and taken up by the first when it is given again
    count, lines = len(ran(tmp_path)), []
    run_stages(plan(), tmp_path, lines.append)
    assert lines[:2] == [f"{name}: goes on with what this command left in a.before1" for name in ("train/a", "probe/a")]
    assert len(ran(tmp_path)) == count and lines[-1] == "3 of 3 stages are done already"


def test_a_full_disk_is_told_and_the_other_stages_go_on(tmp_path, monkeypatch):
    stages = [stage(tmp_path, "train/a", "fail"), stage(tmp_path, "train/b")]

    def full(self, name, record):
        if "failed" in record or "made" in record:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, name, record)

    write = StageState._write
    monkeypatch.setattr(StageState, "_write", full)
    lines = []
    failed = run_stages(stages, tmp_path, lines.append)
    assert list(failed) == ["train/a", "train/b"] and ran(tmp_path) == ["train/a", "train/b"]
    assert failed["train/b"] == "train/b: that it is done could not be noted"
    assert any("this is why" in line for line in lines)
    assert any("train/b: stage.json cannot be written (No space left on device): make room" in line for line in lines)


@pytest.mark.parametrize(
    ("visible", "given", "found"),
    [
        (None, "cuda:0,1", ["0", "1"]),
        (None, "cpu,cpu", ["cpu", "cpu"]),
        (None, "", [None]),
        (None, "0,7", "'7' is not here: give cpu, or numbers out of 0, 1"),
        (None, "gpu", "'gpu' is not here"),
        ("2,3", "2,3", ["2", "3"]),
        ("2,3", "0", "'0' is not here: give cpu, or numbers out of 2,"),
    ],
)
def test_devices_are_those_that_are_there(visible, given, found, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    if isinstance(found, list):
        assert parse_devices(given) == found
    else:
        with pytest.raises(InputError, match=found):
            parse_devices(given)
        assert parse_devices(given, check=False) == given.split(",")


def test_what_was_done_with_a_product_is_done_again_with_the_next_one(tmp_path):
    stages = [stage(tmp_path, "train/a"), stage(tmp_path, "probe/a", needs=("train/a",))]
    run_stages(stages, tmp_path, print)
    shutil.rmtree(tmp_path / "train" / "a")
    assert not StageState(stages, tmp_path).is_done("probe/a")
    run_stages(stages, tmp_path, print)
    assert ran(tmp_path)[2:] == ["train/a", "probe/a"]


def test_the_number_of_workers_changes_no_stage(tmp_path):
    def plan(workers):
        one = stage(tmp_path, "train/a")
        return [Stage(one.name, (*one.command, "--num_workers", workers), one.products)]

    run_stages(plan("1"), tmp_path, print)
    assert StageState(plan("8"), tmp_path).is_done("train/a")


def test_a_changed_yaml_does_its_stage_again_and_a_comment_does_not(tmp_path):
    path = tmp_path / "train.yaml"
    stages = [stage(tmp_path, "train/a", str(path)), stage(tmp_path, "train/b")]

    def is_done_with(text):
        path.write_text(text)
        state = StageState(stages, tmp_path)
        return [state.is_done(one.name) for one in stages]

    path.write_text("rate: 0.1 # peak\nmodel: !new:torch.nn.ReLU\n")
    run_stages(stages, tmp_path, print)
    assert is_done_with("# a title\nrate: 0.1\nmodel: !new:torch.nn.ReLU\n") == [True, True]
    assert is_done_with("rate: 0.2\nmodel: !new:torch.nn.ReLU\n") == [False, True]
    assert is_done_with("rate: 0.1\nmodel: !new:torch.nn.GELU\n") == [False, True]
    with pytest.raises(InputError, match=r"train\.yaml is not YAML: .*line 3"):
        is_done_with("rate: 0.1\nmodel: [\n")


def test_a_stage_that_cannot_be_started_fails_alone(tmp_path):
    stages = [Stage("train/a", ("/nowhere/python",), ("results.json",)), stage(tmp_path, "train/b")]
    failed = run_stages(stages, tmp_path, print)
    assert list(failed) == ["train/a"] and "/nowhere/python" in failed["train/a"] and ran(tmp_path) == ["train/b"]


@pytest.mark.parametrize("how, why", [("fail", "ended with status 3"), ("nothing", "left no results.json")])
def test_a_stage_that_fails_stops_only_those_that_need_it(tmp_path, how, why):
    stages = [
        stage(tmp_path, "train/a", how),
        stage(tmp_path, "train/b"),
        stage(tmp_path, "probe/a", needs=("train/a",)),
        stage(tmp_path, "last/a", needs=("probe/a",)),
        stage(tmp_path, "probe/b", needs=("train/b",)),
    ]
    lines = []
    failed = run_stages(stages, tmp_path, lines.append)
    assert failed["train/a"] == f"train/a {why}: see {tmp_path / 'train' / 'a' / LOG_FILE}"
    assert failed["probe/a"] == "left out: train/a failed" and failed["last/a"] == "left out: probe/a failed"
    assert ran(tmp_path) == ["train/a", "train/b", "probe/b"]
    told = next(line for line in lines if why in line)
    assert "$ " in told and (how == "nothing" or told.endswith("this is why"))
    # again: only what is not done
    run_stages(stages, tmp_path, lines.append)
    assert ran(tmp_path)[3:] == ["train/a"]


def test_of_input_that_is_refused_one_line_and_the_command_are_told(tmp_path):
    lines, refused = [], stage(tmp_path, "train/a", "refuse")
    failed = run_stages([refused], tmp_path, lines.append)
    log = tmp_path / "train" / "a" / LOG_FILE
    assert failed == {"train/a": f"train/a: error: no data: give some (log: {log})"}
    assert lines[1:] == [f"{failed['train/a']}\n  $ {shlex.join(refused.command)}"]


def test_what_is_told_of_a_failure_is_kept_for_the_report(tmp_path):
    lines = []
    run_stages([stage(tmp_path, "train/a", "fail")], tmp_path, lines.append)
    kept = json.loads((tmp_path / "train" / "a" / STAGE_FILE).read_text())["failed"]
    assert kept == lines[-1] and "\n  $ " in kept and kept.endswith("\n  this is why")


def test_of_a_long_stage_the_last_line_is_told_now_and_then(tmp_path, monkeypatch):
    monkeypatch.setattr(stages_module, "PROGRESS_SECONDS", 0.3)
    code = "import sys, time; print('update 7', flush=True); time.sleep(1.5); open(sys.argv[1] + '/done', 'w')"
    lines = []
    command = (sys.executable, "-c", code, str(tmp_path / "train" / "a"))
    assert run_stages([Stage("train/a", command, ("done",))], tmp_path, lines.append) == {}
    assert lines[0] == "[1/1] train/a" and "    train/a: update 7" in lines[1:]
    assert not [line for line in lines if " left" in line]  # nothing to tell it by


def test_while_a_stage_runs_the_time_left_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(stages_module, "PROGRESS_SECONDS", 0.3)
    stages = [stage(tmp_path, "train/a"), stage(tmp_path, "train/b", seconds=1.5), stage(tmp_path, "train/c")]
    state = StageState(stages, tmp_path)
    state.begin("train/a")
    state.set_done("train/a", 600.0)
    (tmp_path / "train" / "a" / "results.json").write_text("{}")
    lines = []
    assert run_stages(stages, tmp_path, lines.append) == {}
    assert lines[1] == "[2/3] train/b, about 20 minutes left" and "    about 20 minutes left" in lines[2:]


def test_of_a_stage_that_was_stopped_the_time_before_counts_too(tmp_path):
    one = stage(tmp_path, "train/a")
    state = StageState([one], tmp_path)
    state.begin("train/a")
    assert state.spent("train/a") == 0.0
    state.set_spent("train/a", 100.0)  # stopped in order
    state.begin("train/a")
    state.set_spent("train/a", 20.0)
    state.begin("train/a")
    assert state.spent("train/a") == 120.0
    state.set_done("train/a", 5.0)
    assert state.seconds("train/a") == 125.0
    state.begin("train/a")  # its product was deleted: anew
    assert state.spent("train/a") == 0.0 and state.seconds("train/a") is None
    state.begin("train/a")  # after a kill
    state.set_done("train/a", 5.0)
    assert state.seconds("train/a") is None  # nobody knows
    changed = StageState([stage(tmp_path, "train/a", "longer")], tmp_path)
    assert changed.spent("train/a") == 0.0


def test_what_another_plan_took_tells_nothing_of_this_one(tmp_path):
    run_stages([stage(tmp_path, "train/a"), stage(tmp_path, "train/b")], tmp_path, print)
    lines = []
    stages = [stage(tmp_path, "train/a", "longer"), stage(tmp_path, "train/b", "longer")]
    run_stages(stages, tmp_path, lines.append, expected={"train/a": 600.0, "train/b": 600.0})
    assert lines[0] == "[1/2] train/a, about 20 minutes left"


def test_what_is_expected_is_told_from_the_first_second(tmp_path):
    lines = []
    stages = [stage(tmp_path, "train/a"), stage(tmp_path, "probe/a", needs=("train/a",))]
    run_stages(stages, tmp_path, lines.append, expected={"train/a": 240.0, "probe/a": 60.0})
    assert lines[0] == "[1/2] train/a, about 5 minutes left"


def test_on_several_devices_stages_run_at_once(tmp_path):
    code = "import os, sys, pathlib, time; begun = time.time(); time.sleep(0.5); "
    code += "pathlib.Path(sys.argv[1], 'device').write_text(os.environ['CUDA_VISIBLE_DEVICES']); "
    code += "pathlib.Path(sys.argv[1], 'times').write_text(f'{begun} {time.time()}')"
    names = [f"train/{number}" for number in range(4)]
    stages = [Stage(name, (sys.executable, "-c", code, str(tmp_path / name)), ("device",)) for name in names]
    assert run_stages(stages, tmp_path, print, devices=["4", "7"]) == {}
    seen = [(tmp_path / name / "device").read_text() for name in names]
    assert set(seen) == {"4", "7"}
    times = [[float(time) for time in (tmp_path / name / "times").read_text().split()] for name in names]
    for device in ("4", "7"):  # one stage after the other
        (_, ended), *others = sorted(own for own, where in zip(times, seen, strict=True) if where == device)
        for begun, later in others:
            assert begun > ended
            ended = later
    both = Stage("train/4", (sys.executable, "-c", code, str(tmp_path / "train" / "4")), ("device",), devices=2)
    assert run_stages([*stages, both], tmp_path, print, devices=["4", "7"]) == {}
    assert sorted((tmp_path / "train" / "4" / "device").read_text().split(",")) == ["4", "7"]
    with pytest.raises(InputError, match="train/4 takes 2 GPUs: give so many"):
        run_stages([both], tmp_path, print, devices=["4"])


@pytest.mark.parametrize("at_once", [1, 2])
def test_stages_at_once_on_a_cpu_share_its_cores_and_see_no_gpu(tmp_path, at_once):
    code = "import os, sys, pathlib; seen = os.environ['CUDA_VISIBLE_DEVICES'] + os.environ['OMP_NUM_THREADS']; "
    code += "pathlib.Path(sys.argv[1], 'threads').write_text(seen)"
    name = "train/a"
    one = Stage(name, (sys.executable, "-c", code, str(tmp_path / name)), ("threads",))
    assert run_stages([one], tmp_path, print, devices=["cpu"] * at_once) == {}
    assert (tmp_path / name / "threads").read_text() == str(max(len(os.sched_getaffinity(0)) // at_once, 1))


def test_plans_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(ValueError, match="needs b, which comes later or not at all"):
        StageState([stage(tmp_path, "a", needs=("b",)), stage(tmp_path, "b")], tmp_path)
    with pytest.raises(ValueError, match="the same name"):
        StageState([stage(tmp_path, "a"), stage(tmp_path, "a")], tmp_path)


def test_a_damaged_record_means_not_done(tmp_path):
    stages = [stage(tmp_path, "train/a")]
    run_stages(stages, tmp_path, print)
    record = tmp_path / "train" / "a" / STAGE_FILE
    assert json.loads(record.read_text())["seconds"] > 0
    record.write_text("{")
    assert not StageState(stages, tmp_path).is_done("train/a")


#: Runs three stages as the command does, of which the second takes a minute, if the environment lets it.
RUN = """
import sys, pathlib
sys.path.insert(0, sys.argv[2])
import test_reproduction_stages as here
folder = pathlib.Path(sys.argv[1])
stages = [here.stage(folder, f"train/{letter}", seconds=60.0 * (letter == "b")) for letter in "abc"]
here.run_stages(stages, folder, lambda line: print(line, flush=True))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_stopped_or_killed_it_takes_its_stages_along_and_goes_on_later(tmp_path, number):
    command = [sys.executable, "-c", RUN, str(tmp_path), os.path.dirname(__file__)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith("[1/3]") and process.stdout.readline().startswith("[2/3]")
    deadline = time.monotonic() + 30
    while len(ran(tmp_path)) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(30) != 0
    assert ends(tmp_path / "train" / "b"), "the stage went on without anybody waiting"
    brief = {**os.environ, "SECONDS_AT_MOST": "0"}
    again = subprocess.run(command, capture_output=True, text=True, timeout=60, env=brief)
    assert again.returncode == 0, again.stderr
    assert again.stdout.splitlines()[0] == "1 of 3 stages are done already"
    assert ran(tmp_path) == ["train/a", "train/b", "train/b", "train/c"]


#: The same, interrupted in the midst of the fork of the second stage, where Python ignores what a handler raises.
INTERRUPTED = (
    """
import os, signal
forks = []
def interrupt():
    forks.append(1)
    if len(forks) == 2:
        os.kill(os.getpid(), signal.SIGINT)
os.register_at_fork(after_in_parent=interrupt)
"""
    + RUN
)


def test_an_interrupt_while_a_stage_is_started_is_not_lost(tmp_path):
    command = [sys.executable, "-c", INTERRUPTED, str(tmp_path), os.path.dirname(__file__)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode != 0 and "KeyboardInterrupt" in done.stderr and "[3/3]" not in done.stdout
    assert ends(tmp_path / "train" / "b"), "the stage went on without anybody waiting"
    assert not (tmp_path / "train" / "b" / "results.json").exists()


def test_a_stage_that_was_begun_on_other_devices_is_refused_until_it_is_done(tmp_path):
    one = Stage("train/a", ("program", "--factor", "8"), ("done",), same_as=("train",))
    eight = Stage("train/a", ("program", "--factor", "1"), ("done",), devices=8, same_as=("train",))
    state = StageState([one], tmp_path)
    state.begin("train/a")
    state.check_begun()
    with pytest.raises(InputError, match=r"train/a was begun on 1 devices .*: give --pretraining_devices 1, or delete"):
        StageState([eight], tmp_path).check_begun()
    (tmp_path / "train" / "a" / "done").touch()
    state.set_done("train/a", 1.0)
    again = StageState([eight], tmp_path)
    again.check_begun()
    assert again.is_done("train/a")


def test_the_folder_of_a_plan_is_taken_out_of_paths_within_it_alone(tmp_path):
    def mark(folder, path):
        words = ("train", f"--encoder=random:{folder}/a", f"[{folder}/b]", path)
        return StageState([Stage("train/a", words, ())], Path(folder)).marks["train/a"]

    assert mark("/data", "/mnt/data/x") == mark("/moved", "/mnt/data/x") != mark("/moved", "/mnt/x")
