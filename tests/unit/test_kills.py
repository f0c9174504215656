"""Whole runs in processes of their own: killed at random moments, stopped under torchrun, watched for leaks."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

TOY = Path(__file__).parents[1] / "helpers" / "toy.py"
#: Trains as toy.train does, with what comes as JSON.
SCRIPT = f"""
import importlib.util, json, sys, torch
torch.set_num_threads(1)
spec = importlib.util.spec_from_file_location("toy", {str(TOY)!r})
toy = importlib.util.module_from_spec(spec)
spec.loader.exec_module(toy)
toy.train(**json.loads(sys.argv[1]))
"""


@pytest.fixture
def settings(toy, tmp_path):
    """A run of 40 updates with loading workers, that saves a lot."""
    seconds = np.random.default_rng(3).uniform(0.6, 2.0, size=16)
    return {
        "train_folder": str(toy.write_noise(tmp_path / "audio", seconds, seed=1)),
        "valid_folder": str(toy.write_noise(tmp_path / "valid", [1.0, 0.7], seed=2)),
        "updates": 40,
        "checkpoint_every": 1,
        "workers": 1,
        "model": {"dropout": 0.1},
    }


def start(output, settings, script=SCRIPT):
    """Start a run; what it says goes to a file beside its folder, for a pipe would fill up."""
    command = [sys.executable, "-c", script, json.dumps({"output": str(output), **settings})]
    with open(said(output), "ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)


def said(output):
    """The file of what a run said."""
    return Path(f"{output}.txt")


def finish(process, output, seconds=300):
    """Wait for a run that is to end well."""
    assert process.wait(seconds) == 0, said(output).read_text()[-3000:]


def wait_for_updates(output, process, more, patience=120):
    """Wait until a run has logged more updates than at first, or has ended."""
    log = Path(output) / "train_log.jsonl"

    def lines():
        return len(log.read_bytes().splitlines()) if log.exists() else 0

    first, deadline = lines(), time.monotonic() + patience
    while process.poll() is None and lines() < first + more:
        assert time.monotonic() < deadline, "no update in two minutes"
        time.sleep(0.005)


#: The same with updates of a tenth of a second at least, half of it amid saving, on a machine of any speed.
PACED = SCRIPT.replace(
    "toy.train(",
    """
import time
def slow(function):
    def paced(*arguments):
        result = function(*arguments)
        time.sleep(0.05)
        return result
    return paced
toy.ToyBrain.fit_batch = slow(toy.ToyBrain.fit_batch)
toy.AtomicCheckpointer._write = slow(toy.AtomicCheckpointer._write)
toy.train(""",
)


@pytest.mark.slow
def test_a_run_killed_twenty_times_is_the_unbroken_run(toy, tmp_path, settings):
    unbroken = start(tmp_path / "unbroken", settings)
    finish(unbroken, tmp_path / "unbroken")
    generator, kills, unfinished = random.Random(0), 0, 0
    while True:
        process = start(tmp_path / "run", settings, PACED)
        if kills < 20:
            wait_for_updates(tmp_path / "run", process, generator.randrange(0, 3))
            time.sleep(generator.uniform(0.0, 0.1))
        if kills == 20 or process.poll() is not None:
            finish(process, tmp_path / "run")
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        unfinished += any((tmp_path / "run" / "save").glob("UNFINISHED*"))
    print(f"figure: killed {kills} times, {unfinished} of them with a checkpoint half written or half deleted")
    assert kills >= 15, "the run was over before it had been killed often"
    assert unfinished, "no kill came while saving"
    assert toy.losses(tmp_path / "run") == toy.losses(tmp_path / "unbroken")
    assert [step for step, _ in toy.losses(tmp_path / "run")] == list(range(1, 41))
    assert not list((tmp_path / "run" / "save").glob("UNFINISHED*"))


def test_a_run_in_its_own_process_stops_with_the_status_that_says_start_me_again(tmp_path, settings):
    script = SCRIPT.replace("toy.train(**json.loads(sys.argv[1]))", "")
    script += (
        "from speechbrain_bestrq.recipe import run_recipe\n"
        "run_recipe(lambda arguments: toy.train(**json.loads(arguments[0])))\n"
    )
    process = start(tmp_path / "run", {**settings, "updates": 4000}, script)
    wait_for_updates(tmp_path / "run", process, 3)
    asked = time.monotonic()
    os.killpg(process.pid, signal.SIGTERM)  # as a scheduler does, the loading workers too
    assert process.wait(60) == 75, said(tmp_path / "run").read_text()[-3000:]
    print(f"figure: ended {time.monotonic() - asked:.1f} s after SIGTERM")
    assert time.monotonic() - asked < 30
    assert "stopped: by SIGTERM after update" in said(tmp_path / "run").read_text().splitlines()[-1]


@pytest.mark.slow
def test_torchrun_hands_a_signal_on_and_the_same_command_goes_on(toy, tmp_path, settings):
    settings = {**settings, "updates": 30}
    for process in start_ranks(tmp_path / "unbroken", settings, [0.0, 0.0], "torchrun"):
        finish(process, tmp_path / "unbroken")
    (launched,) = start_ranks(tmp_path / "run", settings, [0.1, 0.1], "torchrun")
    wait_for_updates(tmp_path / "run", launched, 5)
    launched.send_signal(signal.SIGTERM)
    assert launched.wait(60) != 0  # torchrun has a status of its own
    assert "stopped: by SIGTERM after update" in said(tmp_path / "run").read_text()
    done = len(toy.losses(tmp_path / "run"))
    for process in start_ranks(tmp_path / "run", settings, [0.0, 0.0], "torchrun"):
        finish(process, tmp_path / "run")
    assert 5 <= done < 30 and toy.losses(tmp_path / "run") == toy.losses(tmp_path / "unbroken")


#: A rank that is the only one; taking Python apart would end it by SIGABRT, as what is left of a process group may.
ENDING = """
import atexit, os, sys, torch
from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.recipe import run_recipe
from speechbrain_bestrq.stopping import StoppedError

class Left:
    def __del__(self, abort=os.abort):
        abort()

def main(arguments):
    torch.distributed.init_process_group("gloo", init_method=arguments[0], rank=0, world_size=1)
    print("said", end="")
    if arguments[1] != "None":
        raise eval(arguments[1])

left = Left()
atexit.register(print, " and done", end="")
run_recipe(main)
"""


@pytest.mark.parametrize(
    ("error", "status"),
    [("None", 0), ("InputError('no')", 2), ("StoppedError('by X')", 75), ("KeyboardInterrupt", 130)],
)
def test_a_rank_ends_as_it_should_whatever_threads_its_group_leaves(tmp_path, error, status):
    command = [sys.executable, "-c", ENDING, f"file://{tmp_path / 'store'}", error]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    )
    assert (done.returncode, done.stdout) == (status, "said and done"), done.stderr


#: A rank of a run, which may dawdle over each update.
RANK = SCRIPT.replace(
    "toy.train(**json.loads(sys.argv[1]))",
    """
import os, time, torch.distributed
from speechbrain_bestrq.recipe import run_recipe
arguments = json.loads(sys.argv[1])
pauses, store = arguments.pop("pauses"), arguments.pop("store")
rank = int(os.environ["RANK"])
fit_batch = toy.ToyBrain.fit_batch
toy.ToyBrain.fit_batch = lambda self, batch: time.sleep(pauses[rank]) or fit_batch(self, batch)
torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
run_recipe(lambda _: toy.train(**arguments))
""",
)


def start_ranks(output, settings, pauses, launcher):
    """Start a run on two devices; what all say goes to the file beside its folder."""
    attempt = len(list(output.parent.glob("store*")))
    arguments = {"output": str(output), **settings, "pauses": pauses, "store": f"file://{output.parent}/store{attempt}"}
    script = output.parent / "rank.py"
    script.write_text(RANK)
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    if launcher == "torchrun":
        arguments["store"] = "env://"
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d"]
        commands = [[*command, "--rdzv_endpoint=localhost:0", str(script), json.dumps(arguments)]]
    else:
        commands = [[sys.executable, str(script), json.dumps(arguments)]] * 2
    with open(said(output), "ab") as file:
        return [
            subprocess.Popen(
                command, stdout=file, stderr=file, env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            )
            for rank, command in enumerate(commands)
        ]


def find_rank(launched, rank):
    """The process of a rank: torchrun's children are its ranks, in the order of their birth."""
    if len(launched) == 2:
        return launched[rank].pid
    pid = launched[0].pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return sorted(int(child) for child in children if "rank.py" in Path(f"/proc/{child}/cmdline").read_text())[rank]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "alone"])
def test_when_a_rank_dies_the_others_end_within_a_minute_and_the_same_command_goes_on(
    toy, tmp_path, settings, launcher
):
    settings = {**settings, "updates": 20, "checkpoint_every": 4}
    for process in start_ranks(tmp_path / "unbroken", settings, [0.0, 0.0], launcher):
        finish(process, tmp_path / "unbroken")
    launched = start_ranks(tmp_path / "run", settings, [0.1, 0.1], launcher)
    wait_for_updates(tmp_path / "run", launched[0], 6)
    os.kill(find_rank(launched, 1), signal.SIGKILL)
    died = time.monotonic()
    statuses = [process.wait(60) for process in launched]
    print(f"figure: {launcher}: all ended {time.monotonic() - died:.1f} s after a rank died")
    assert time.monotonic() - died < 60
    assert statuses == ([1] if launcher == "torchrun" else [1, -signal.SIGKILL])
    if launcher == "alone":  # torchrun may end the other before it notices
        assert "error: rank 0 has lost another rank" in said(tmp_path / "run").read_text().splitlines()[-1]
    assert len(toy.losses(tmp_path / "run")) < 20
    # a rank that is always late delays the others, and changes nothing
    for process in start_ranks(tmp_path / "run", settings, [0.0, 0.2], launcher):
        finish(process, tmp_path / "run")
    assert toy.losses(tmp_path / "run") == toy.losses(tmp_path / "unbroken")
    assert [step for step, _ in toy.losses(tmp_path / "run")] == list(range(1, 21))


@pytest.mark.slow
def test_memory_and_open_files_stay_flat_over_two_thousand_updates(toy, tmp_path, settings):
    process = start(tmp_path / "run", {**settings, "updates": 2000, "checkpoint_every": 200, "log_interval": 20})
    folder, samples = Path("/proc") / str(process.pid), []
    log = tmp_path / "run" / "train_log.jsonl"
    while process.poll() is None:
        time.sleep(0.2)
        if not log.exists():
            continue
        try:
            resident = int((folder / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            files = len(list((folder / "fd").iterdir()))
        except OSError:
            break
        samples.append((resident, files))
    finish(process, tmp_path / "run")
    memory, files = (np.array(values, dtype=float) for values in zip(*samples, strict=True))
    early, late = slice(len(samples) // 5, 2 * len(samples) // 5), slice(-len(samples) // 5, None)
    growth = np.median(memory[late]) / np.median(memory[early]) - 1
    print(f"figure: memory {growth:+.2%}, open files {files[late].max() - files[early].max():+.0f}")
    assert growth < 0.02
    assert files[late].max() <= files[early].max() + 2
