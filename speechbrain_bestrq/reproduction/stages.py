"""Stages of a plan: commands that depend on one another, run each once, whatever happens between."""

import ctypes
import glob
import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from speechbrain_bestrq.errors import USER_ERROR, InputError
from speechbrain_bestrq.locking import sole_writer
from speechbrain_bestrq.machine import commit, usable_cores
from speechbrain_bestrq.reproduction.time_left import left_text
from speechbrain_bestrq.writing import write_text

#: What a finished stage leaves in its folder.
STAGE_FILE = "stage.json"
#: What a stage says goes here, in its folder.
LOG_FILE = "stage.log"
#: Of a log, shown when its stage has failed.
LAST_LINES = 12
LANGUAGE_MODEL = "--language_model"
#: Options that change nothing of what a command makes, but for rounding; a language model changes what it tests. Where
#: hidden states are kept depends, for few labels, on whether those of all are kept too.
FREE_OPTIONS = ("--cache_folder", "--num_workers", LANGUAGE_MODEL)
#: In place of a GPU's number.
CPU = "cpu"
#: Seconds to wait for a process that still writes to a stage's folder.
PATIENCE = 60
#: After so many, the last line of each running stage's log is reported.
PROGRESS_SECONDS = 30
#: What the name of a folder ends in, before a number, that made room for another command.
MOVED_ASIDE = ".before"
#: How the reason begins of a stage that could not run.
LEFT_OUT = "left out:"
STOPPING = (signal.SIGINT, signal.SIGTERM)
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Stage:
    """A command with a folder of its own.

    Arguments
    ---------
    name : str
        "pretraining/bestrq": also its folder, within that of the plan.
    command : tuple of str
        Program and arguments.
    products : tuple of str
        Files or folders within its folder, which are there when the stage is done.
    needs : tuple of str
        Names of stages that have to be done before.
    devices : int
        GPUs that it takes, where stages are given some.
    after : tuple of str
        Names of stages that have to be over before, done or failed.
    same_as : tuple of str
        What the command comes to, whatever interpreter and launcher run it on however many devices, wherever its
        program lies: a stage is done once for all commands that come to the same. The command itself if left out.
    is_brief : bool
        Whether it takes seconds, and tells nothing of how long others of its kind take.
    """

    name: str
    command: tuple[str, ...]
    products: tuple[str, ...]
    needs: tuple[str, ...] = ()
    devices: int = 1
    after: tuple[str, ...] = ()
    same_as: tuple[str, ...] = ()
    is_brief: bool = False

    @property
    def kind(self) -> str:
        """The first part of the name: stages of a kind take about equally long."""
        return self.name.split("/")[0]


class StageState:
    """What is known of the stages of a plan: which are done, how long they took.

    A stage is done if its products are there, its command and the YAMLs that it names are those that made
    it, and so are the very products of the stages that it needs: one of them done anew, it has to be, too.
    :data:`FREE_OPTIONS` of a command may change, and comments in a YAML. With another language model, or the first,
    the command is run again in the same folder, where it trains no further.

    Arguments
    ---------
    stages : sequence of Stage
        Each after those that it needs.
    folder : Path
        Of the plan.

    Raises
    ------
    ValueError
        If a stage needs one that does not come before it, or two have one name.
    InputError
        If a YAML that a command names is none.
    """

    def __init__(self, stages: Sequence[Stage], folder: Path):
        self.stages = {stage.name: stage for stage in stages}
        self.folder = Path(folder)
        self.marks: dict[str, str] = {}
        if len(self.stages) < len(stages):
            raise ValueError("two stages have the same name.")
        for stage in stages:
            if missing := [name for name in (*stage.needs, *stage.after) if name not in self.marks]:
                raise ValueError(f"{stage.name} needs {', '.join(missing)}, which comes later or not at all.")
            governing = _governing(stage.same_as or stage.command, self.folder)
            known = [governing, _yaml_contents(stage.command), stage.products]
            self.marks[stage.name] = hashlib.sha256(json.dumps(known).encode()).hexdigest()

    def folder_of(self, name: str) -> Path:
        """Where a stage works."""
        return self.folder / name

    def is_done(self, name: str) -> bool:
        """Whether a stage has nothing left to do."""
        record = self._record(name)
        if not self._is_own(record, name) or self.missing(name):
            return False
        model = _language_model(self.stages[name].command)
        if model is not None and record.get("language_model") != model:
            return False  # what was trained stays, and is tested again
        return record.get("made") is not None and all(map(self.is_done, self.stages[name].needs))

    def missing(self, name: str) -> list[str]:
        """Which products of a stage are not there."""
        return [one for one in self.stages[name].products if not (self.folder_of(name) / one).exists()]

    def check_begun(self) -> None:
        """Refuse to go on with a stage amid which another number of devices was at work.

        Raises
        ------
        InputError
            Naming the stage and its devices.
        """
        for name, stage in self.stages.items():
            record = self._record(name)
            devices = record.get("devices", stage.devices)
            if record.get("mark") == self.marks[name] and "made" not in record and devices != stage.devices:
                raise InputError(
                    f"{name} was begun on {devices} devices and has not got to its end: give --pretraining_devices "
                    f"{devices}, or delete {self.folder_of(name)} to begin it anew."
                )

    def take_up(self) -> list[str]:
        """Give back to the stages what another command moved aside; say so in a line for each.

        Returns
        -------
        list of str
        """
        told = []
        for name in self.stages:
            folder = self.folder_of(name)
            if self._is_own(self._record(name), name):
                continue
            asides = folder.parent.glob(f"{glob.escape(folder.name)}{MOVED_ASIDE}*")
            own = [aside for aside in asides if self._is_own(read_record(aside), name)]
            if own:
                aside = max(own, key=lambda one: ("made" in read_record(one), one.stat().st_mtime))
                if folder.exists():
                    _wait_until_free(folder)
                    self._move_aside(name)
                aside.rename(folder)
                told.append(f"{name}: goes on with what this command left in {aside.name}")
        return told

    def _needed(self, name: str) -> dict[str, str | None]:
        """Which very products a stage would work with."""
        return {need: self._record(need).get("made") for need in self.stages[name].needs}

    def _is_own(self, record: dict, name: str) -> bool:
        """Whether a record is of a stage's command and of what it would work with."""
        return record.get("mark") == self.marks[name] and record.get("needed") == self._needed(name)

    def _move_aside(self, name: str) -> Path:
        folder, number = self.folder_of(name), 1
        while (aside := folder.with_name(f"{folder.name}{MOVED_ASIDE}{number}")).exists():
            number += 1
        return folder.rename(aside)

    def begin(self, name: str) -> str:
        """Make a stage's folder its own: what another command left there is moved aside, and nothing is lost.

        Returns
        -------
        str
            A line on what was moved aside; empty if nothing was.
        """
        folder, record, told = self.folder_of(name), self._record(name), ""
        if record and not self._is_own(record, name):
            aside = self._move_aside(name)
            told = f"{name}: begins anew; what another command, or one with other inputs, made is in {aside.name}"
            record = {}
        if "made" in record and not self.missing(name):
            # it is tested with another language model; what there is counts until that is done
            testing = {"tested_with": _language_model(self.stages[name].command)}
            self._write(name, {key: value for key, value in record.items() if key != "failed"} | testing)
            return told
        folder.mkdir(parents=True, exist_ok=True)
        begun = {
            "mark": self.marks[name],
            "needed": self._needed(name),
            "commit": commit(),
            "devices": self.stages[name].devices,
        }
        if record and "made" not in record:  # taken up again
            begun["spent"] = record.get("spent")
        self._write(name, begun)
        return told

    def spent(self, name: str) -> float | None:
        """Seconds that a stage ran before it was begun this time; None if it did, and they are not known."""
        record = self._record(name)
        return record.get("spent", 0.0) if record.get("mark") == self.marks[name] else 0.0

    def set_spent(self, name: str, seconds: float) -> None:
        """Remember for how long a stage ran that has not got to its end: it will go on from there."""
        before = self.spent(name)
        self._write(name, {**self._record(name), "spent": None if before is None else before + seconds})

    def set_done(self, name: str, seconds: float) -> None:
        """Remember that a stage is done, after so many seconds this time."""
        record, spent = self._record(name), self.spent(name)
        record.pop("failed", None)
        known = {
            "made": uuid.uuid4().hex,
            "seconds": (record["seconds"] if "made" in record else 0.0) + (spent or 0.0) + seconds,
            "spent": None if spent is None else 0.0,
            "command": list(self.stages[name].command),
            "language_model": record.pop("tested_with", _language_model(self.stages[name].command)),
        }
        self._write(name, {**record, **known})

    def set_failed(self, name: str, why: str) -> None:
        """Remember that a stage has failed, for the report; it is begun anew the next time."""
        self._write(name, {**self._record(name), "failed": why})

    def _write(self, name: str, record: dict) -> None:
        write_text(self.folder_of(name) / STAGE_FILE, json.dumps(record, indent=2) + "\n")

    def _record(self, name: str) -> dict:
        return read_record(self.folder_of(name))

    def seconds(self, name: str) -> float | None:
        """How long a done stage took; None if it is not known."""
        record = self._record(name)
        return record["seconds"] if self.spent(name) is not None and "made" in record else None


def read_record(folder: Path) -> dict[str, Any]:
    """What a stage's folder says of it; nothing where it says nothing, or is damaged."""
    try:
        return json.loads((folder / STAGE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _governing(command: Sequence[str], folder: Path) -> list[str]:
    """A command without what may change, such as the place of the plan's folder."""
    # where a path begins, and not within another
    own = re.compile(rf"(?<![\w./-]){re.escape(str(folder))}{os.sep}")
    words = [own.sub("", word) for word in command]
    for option in FREE_OPTIONS:
        if option in words:
            place = words.index(option)
            del words[place : place + 2]
    return words


def _yaml_contents(command: Sequence[str]) -> list[str]:
    """What the YAMLs of a command say, without comments; tags are not acted upon."""
    contents = []
    for path in (Path(word) for word in command if word.endswith(".yaml") and Path(word).is_file()):
        try:
            contents.append(yaml.serialize(yaml.compose(path.read_text(encoding="utf-8"))))
        except yaml.YAMLError as error:
            raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    return contents


def _language_model(command: Sequence[str]) -> int | None:
    """Size of the language model that a command names, None without: wherever it lies, and another may lie there."""
    words = list(command)
    if LANGUAGE_MODEL not in words:
        return None
    path = Path(words[words.index(LANGUAGE_MODEL) + 1])
    return path.stat().st_size if path.is_file() else None


@dataclass
class _Running:
    stage: Stage
    process: subprocess.Popen
    started: float
    devices: list[str | None]


def check_devices(stages: Sequence[Stage], devices: Sequence[str | None]) -> None:
    """Refuse stages that take more devices than there are.

    Arguments
    ---------
    stages : sequence of Stage
    devices : sequence of str
        As :func:`run_stages` takes them.

    Raises
    ------
    InputError
        If one does.
    """
    many = [stage for stage in stages if stage.devices > len(devices)]
    if many and list(devices) != [None]:
        raise InputError(f"{many[0].name} takes {many[0].devices} GPUs: give so many as --devices, or none.")


def parse_devices(text: str | None, check: bool = True) -> list[str | None]:
    """Read the devices of a command line.

    Arguments
    ---------
    text : str or None
        Numbers of GPUs, "cuda:0" for 0, or "cpu", with commas between. Where ``CUDA_VISIBLE_DEVICES`` is set, numbers
        that are in it.
    check : bool
        Whether they have to be there.

    Returns
    -------
    list of str
        As :func:`run_stages` takes them; [None] if nothing is given.

    Raises
    ------
    InputError
        If there is no such device: a stage that saw none would train on the CPU without a word.

    Example
    -------
    >>> parse_devices("cpu,cpu"), parse_devices(None)
    (['cpu', 'cpu'], [None])
    """
    if not text:
        return [None]
    devices = [word.strip().removeprefix("cuda:") for word in text.split(",")]
    if not check:
        return devices
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    there = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
    for word in devices:
        if word not in (CPU, *there) and not word.startswith(("GPU-", "MIG-")):
            raise InputError(
                f"--devices {word!r} is not here: give {CPU}, or numbers out of {', '.join(there) or 'none'}."
            )
    return devices


def device_environment(devices: Sequence[str | None], at_once: int) -> dict[str, str]:
    """Variables by which a process sees its devices, and no others.

    Arguments
    ---------
    devices : sequence of str
        Of the process: numbers of GPUs, or "cpu"; [None] leaves everything as it is.
    at_once : int
        How many processes share the cores, if it is "cpu".

    Returns
    -------
    dict

    Example
    -------
    >>> device_environment(["4", "7"], 2)
    {'CUDA_VISIBLE_DEVICES': '4,7'}
    """
    if CPU in devices:
        threads = max(usable_cores() // at_once, 1)
        return {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(threads)}
    return {} if list(devices) == [None] else {"CUDA_VISIBLE_DEVICES": ",".join(map(str, devices))}


def run_stages(
    stages: Sequence[Stage],
    folder: Path,
    report: Callable[[str], None],
    devices: Sequence[str | None] = (None,),
    expected: Mapping[str, float] | None = None,
) -> dict[str, str]:
    """Run what is not done yet; a stage that fails keeps those that need it from running, and no others.

    Interrupted (Ctrl-C, SIGTERM), it lets the running stages end by themselves, as the
    recipes do with a checkpoint, and raises. Called again, it goes on.

    Arguments
    ---------
    stages : sequence of Stage
        Each after those that it needs.
    folder : Path
        Each stage has its name in it.
    report : callable
        Takes lines on how it goes.
    devices : sequence of str, optional
        Values of ``CUDA_VISIBLE_DEVICES``: stages run at once, each on as many as it
        takes. (None,) runs one after another and leaves the variable as it is; "cpu" hides the
        GPUs, and stages at once share the cores: two that take all slow each other down.
    expected : mapping, optional
        Seconds that stages will take, for the time left.

    Returns
    -------
    dict
        Of each stage that failed or could not run, why: one line.

    Raises
    ------
    InputError
        If a stage takes more devices than there are.
    KeyboardInterrupt
        If interrupted.
    """
    check_devices(stages, devices)
    own = list(devices) == [None]
    state = StageState(stages, folder)
    for line in state.take_up():
        report(line)
    state.check_begun()
    done = {stage.name for stage in stages if state.is_done(stage.name)}
    if done:
        report(f"{len(done)} of {len(stages)} stages are done already")
    waiting, running = deque(stage for stage in stages if stage.name not in done), []
    failed: dict[str, str] = {}
    idle, told = list(devices), time.monotonic()

    def left(next_ones: Iterable[Stage]) -> str:
        now = time.monotonic()
        spent = {one.stage.name: now - one.started for one in running} | {one.name: 0.0 for one in next_ones}
        spent = {name: seconds + (state.spent(name) or 0.0) for name, seconds in spent.items()}
        taken = {name: seconds for name in done if (seconds := state.seconds(name)) is not None}
        return left_text(stages, spent, taken, expected or {}, len(devices))

    def noted(note: Callable[..., None], name: str, *what: Any) -> bool:
        try:
            note(name, *what)
        except OSError as error:  # the others go on
            report(f"{name}: {STAGE_FILE} cannot be written ({error.strerror}): make room, and give the command again")
            return False
        return True

    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        while waiting or running:
            for stage in list(waiting):
                if broken := [name for name in stage.needs if name in failed]:
                    failed[stage.name] = f"{LEFT_OUT} {broken[0]} failed"
                    waiting.remove(stage)
                elif done.issuperset(stage.needs) and (done | failed.keys()).issuperset(stage.after):
                    if len(idle) < (1 if own else stage.devices):
                        break  # what comes next would keep it waiting for as long as there are short stages
                    waiting.remove(stage)
                    number = len(stages) - len(waiting)
                    minutes = left([stage, *waiting])
                    report(f"[{number}/{len(stages)}] {stage.name}{minutes and f', {minutes}'}")
                    taken = [idle.pop(0) for _ in range(1 if own else stage.devices)]
                    try:
                        _wait_until_free(state.folder_of(stage.name))
                        with _signals_waiting():
                            running.append(_start(stage, state, taken, len(devices), report))
                    except (InputError, OSError) as error:
                        failed[stage.name] = f"{stage.name}: {error}"
                        why = f"{failed[stage.name]}\n{_command_line(stage)}"
                        report(why)
                        noted(state.set_failed, stage.name, why)
                        idle += taken
            time.sleep(0.05)
            if time.monotonic() - told > PROGRESS_SECONDS:
                told = time.monotonic()
                for one in running:
                    report(f"    {one.stage.name}: {_last_line(state.folder_of(one.stage.name) / LOG_FILE)}")
                if minutes := left(waiting):
                    report(f"    {minutes}")
            for one in [one for one in running if one.process.poll() is not None]:
                running.remove(one)
                idle += one.devices
                why = _finish(one, state)
                if why is None and not noted(state.set_done, one.stage.name, time.monotonic() - one.started):
                    failed[one.stage.name] = f"{one.stage.name}: that it is done could not be noted"
                elif why is None:
                    done.add(one.stage.name)
                else:
                    failed[one.stage.name] = why.splitlines()[0]
                    report(why)
                    noted(state.set_spent, one.stage.name, time.monotonic() - one.started)
                    noted(state.set_failed, one.stage.name, why)
    except KeyboardInterrupt:
        for one in running:
            one.process.send_signal(signal.SIGTERM)
        for one in running:
            one.process.wait()
            noted(state.set_spent, one.stage.name, time.monotonic() - one.started)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    return failed


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@contextmanager
def _signals_waiting() -> Iterator[None]:
    """Have signals wait: in the midst of a fork one gets lost, and a process that is not known yet is not ended."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start(
    stage: Stage, state: StageState, devices: list[str | None], at_once: int, report: Callable[[str], None]
) -> _Running:
    folder = state.folder_of(stage.name)
    if told := state.begin(stage.name):
        report(told)
    environment = {**os.environ, **device_environment(devices, at_once)}
    with open(folder / LOG_FILE, "a", encoding="utf-8") as log:
        log.write(f"$ {shlex.join(stage.command)}\n")
        log.flush()
        # a session of its own: Ctrl-C reaches it once, from here
        process = subprocess.Popen(
            stage.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
            preexec_fn=partial(end_with_parent, os.getpid()),
        )
    return _Running(stage, process, time.monotonic(), devices)


def end_with_parent(parent: int) -> None:
    """Have Linux send SIGTERM when the parent dies, also by SIGKILL: a stage that nobody waits for is in the way.

    Arguments
    ---------
    parent : int
        Its number. It may have died already.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
    if os.getppid() != parent:
        os._exit(1)


def _wait_until_free(folder: Path) -> None:
    """Wait for the stage that a killed process has left behind to save and end."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            with sole_writer(folder):
                return
        except InputError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def _last_line(path: Path) -> str:
    """The end of a log, which may be long."""
    with open(path, "rb") as log:
        log.seek(max(log.seek(0, os.SEEK_END) - 2000, 0))
        lines = log.read().decode(errors="replace").splitlines()
    return lines[-1][:160] if lines else ""


def _finish(one: _Running, state: StageState) -> str | None:
    """Say in lines why a stage that has ended is not done; None if it is."""
    stage, status = one.stage, one.process.returncode
    folder = state.folder_of(stage.name)
    missing = state.missing(stage.name)
    if status == 0 and not missing:
        return None
    log = folder / LOG_FILE
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    if status == USER_ERROR:  # said in one line
        return f"{stage.name}: {lines[-1]} (log: {log})\n{_command_line(stage)}"
    why = f"ended with status {status}" if status else f"left no {missing[0]}"
    last = (f"  {line}" for line in lines[-LAST_LINES:])
    return "\n".join([f"{stage.name} {why}: see {log}", _command_line(stage), *last])


def _command_line(stage: Stage) -> str:
    return f"  $ {shlex.join(stage.command)}"
