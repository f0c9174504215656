"""A session on a GPU in one command: does everything run there, how fast is it, what does it cost, what does it learn.

    pip install --editable .                                    # or, without a network, as below
    python benchmarks/gpu_session.py --output session
    python benchmarks/gpu_session.py --output session --data_folder LIBRISPEECH --slurp SLURP --voxceleb VOXCELEB
    python benchmarks/gpu_session.py --output session --parts equality pretraining downstream
    python benchmarks/gpu_session.py --output rehearsal --toy   # on a CPU: the same in small, to try the script

It needs one GPU, and no data but for the part "quality": audio is noise otherwise. On a machine that has PyTorch and
torchaudio but no network, bring the wheels of speechbrain, hyperpyyaml, ruamel.yaml, soundfile, cffi and pycparser
(and of what else `pip check` misses), then

    pip install --no-index --no-deps WHEELS/*.whl && pip install --no-index --no-deps --no-build-isolation --editable .

Parts, in their order; each is a process with a time of its own, and one that fails leaves the others alone:

    equality       labels under bf16 as on a CPU; losses and gradients in float32 as on a CPU
    pretraining    bestrq.yaml and wav2vec2.yaml at full size: bf16, fp16, compiled, torchrun, stopped and resumed
    downstream     an epoch of each recipe that uses an encoder
    steps          the table of pretrain_step.py, eager and compiled
    cost           device-seconds of an hour of audio, both methods; what the paper's runs would take
    trace          the kernels that a step spends its time in, and the share in which the GPU is idle
    kernels        of attention, and of the depthwise convolution: which is the fastest
    micro_batches  speed and memory up to a whole update in one piece
    quality        with the time that is left and --data_folder: both methods pre-trained for equal times and probed

The whole ends within --minutes. --output gets DEVICE.md and DEVICE.json with all figures, logs/, and of "quality"
evidence/ and encoders/ in half precision. The exit status is 1 if something failed.
"""

import argparse
import ctypes
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_checks import downstream, equality, pretraining
from gpu_findings import Findings, Outcome, Settings, markdown_table
from gpu_measures import cost, kernels, micro_batches, steps, trace
from gpu_quality import PROBES, quality
from pretraining_cost import YAMLS

from speechbrain_bestrq.machine import commit, describe_machine, device_name, package_versions
from speechbrain_bestrq.writing import write_text

#: The parts and the seconds that each may take, of eight minutes; the last takes what is left.
PARTS = {
    "equality": (equality, 100),
    "pretraining": (pretraining, 120),
    "downstream": (downstream, 60),
    "steps": (steps, 120),
    "cost": (cost, 45),
    "trace": (trace, 30),
    "kernels": (kernels, 30),
    "micro_batches": (micro_batches, 45),
    "quality": (quality, None),
}
#: Seconds for ending and writing; and those before its end in which a part tells of what it has to break off.
RESERVE, GRACE = 8, 8


#: Of prctl: orphans among what a process has started become its own children.
ADOPT_ORPHANS = 36
#: Bytes of the runs of all parts, most of them checkpoints.
MEMORY_NEEDED = 32e9


def run_part(name: str, settings_file: Path, findings_file: Path, log: Path, seconds: float) -> Outcome:
    """Run a part in a process of its own; when its time is over, it is killed with all that it started.

    What a process of it put into a session of its own, as torchrun does its workers, comes to this one when its parent
    is gone: it would compute beside the next part's measurements.
    """
    words = [sys.executable, __file__, "--part", name, str(settings_file), str(findings_file)]
    words.append(str(time.time() + seconds - GRACE))
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    libc = ctypes.CDLL(None)
    libc.prctl(ADOPT_ORPHANS, 1, 0, 0, 0)
    before = children()
    with open(log, "wb") as file:
        process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)  # also what a part that has ended left running
            except ProcessLookupError:
                pass
            process.wait()
            ends = time.monotonic() + GRACE  # one that hangs in a driver cannot be killed
            # what they started comes in their place
            while (orphans := children() - before) and time.monotonic() < ends:
                for orphan in orphans:
                    os.kill(orphan, signal.SIGKILL)
                    os.waitpid(orphan, os.WNOHANG)
                time.sleep(0.05)
            libc.prctl(ADOPT_ORPHANS, 0, 0, 0, 0)
    return Outcome(status, time.monotonic() - started, log)


def children() -> set[int]:
    """The processes that this one has started or adopted, those that have ended among them."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_bytes().rpartition(b")")[2].split()[1])
        except OSError:  # it has ended
            continue
        if parent == os.getpid():
            found.add(int(folder.name))
    return found


def part(words: Sequence[str]) -> None:
    """Be the process of a part."""
    name, settings_file, findings_file, ends = words
    findings = Findings(Path(findings_file))
    PARTS[name][0](Settings.read(Path(settings_file)), findings, float(ends) - time.time())
    findings.save()


def run_session(
    settings: Settings,
    parts: Sequence[str],
    seconds: float,
    after_part: Callable[[dict[str, Any]], Any] = lambda session: None,
) -> dict[str, Any]:
    """Run the parts; what they found, by part, with how each ended, which ``after_part`` is told after each."""
    ends = time.monotonic() + seconds - RESERVE
    settings_file = Path(settings.work) / "settings.json"
    settings.write(settings_file)
    session = {}
    shares = [PARTS[name][1] for name in parts]
    # parts that are all there is share all of the time
    scale = seconds / 480 if None in shares else max(seconds - RESERVE, 0) / sum(shares)
    for name in parts:
        left, own = ends - time.monotonic(), PARTS[name][1]
        limit = left if own is None else min(own * scale, left)
        print(f"{name}: at most {max(limit, 0):.0f} s of {max(left, 0):.0f}", file=sys.stderr, flush=True)
        found: dict[str, Any] = {"rows": [], "sections": {}, "figures": {}, "seconds": 0.0}
        session[name] = found
        if limit < 1:
            found["rows"].append({"what": name, "outcome": "left out: the time is over", "good": None})
            continue
        findings_file = Path(settings.work) / f"{name}.json"
        outcome = run_part(name, settings_file, findings_file, Path(settings.output) / "logs" / f"{name}.log", limit)
        if findings_file.is_file():
            found |= json.loads(findings_file.read_text(encoding="utf-8"))
        found["seconds"] = outcome.seconds
        if outcome.status != 0:
            found["rows"].append({"what": name, "outcome": outcome.failure(), "good": False})
        after_part(session)
    return session


def short_table(session: dict[str, Any]) -> str:
    """A line for each thing that was checked or measured."""
    verdicts = {True: "ok", False: "FAILED", None: ""}
    rows = [
        (part, row["what"], row["outcome"], verdicts[row["good"]])
        for part, found in session.items()
        for row in found["rows"]
    ]
    return markdown_table(("part", "what", "outcome", ""), rows)


def write_session(session: dict[str, Any], settings: Settings, command: str) -> Path:
    """Write DEVICE.md and DEVICE.json; return the first."""
    device = device_name(settings.device)
    path = Path(settings.output) / f"{re.sub('[^a-z0-9]+', '_', device.lower()).strip('_')}.md"
    took = ", ".join(f"{name} {found['seconds']:.0f}" for name, found in session.items())
    head = [f"# A session on {device}{' (rehearsal with toys)' if settings.toy else ''}", f"    {command}"]
    head += [
        f"{describe_machine(settings.device)}; commit {commit()}. Seconds of the parts: {took}.",
        short_table(session),
    ]
    sections = [f"## {title}\n\n{text}" for found in session.values() for title, text in found["sections"].items()]
    write_text(path, "\n\n".join([*head, *sections]) + "\n")
    facts = {
        "device": device,
        "command": command,
        "toy": settings.toy,
        "versions": package_versions(),
        "commit": commit(),
    }
    write_text(path.with_suffix(".json"), json.dumps({**facts, "parts": session}, indent=1) + "\n")
    return path


def parse(words: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for figures, logs and encoders; a new one")
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS), help="these only")
    parser.add_argument("--minutes", type=float, default=8.0, help="all ends within (%(default)s)")
    parser.add_argument("--toy", action="store_true", help="the same in small on a CPU, as a rehearsal")
    parser.add_argument("--data_folder", type=Path, help="audio to pre-train on, for the part quality")
    parser.add_argument("--corpus", choices=("librispeech", "folder"), default="librispeech", help="its layout")
    parser.add_argument("--extra_folders", type=Path, nargs="+", default=[], help="more audio to pre-train on")
    parser.add_argument("--sizes", nargs="+", choices=tuple(YAMLS), default=["base"], help="of models for quality")
    for corpus in PROBES:
        parser.add_argument(f"--{corpus}", type=Path, metavar="FOLDER", help="to probe on; see sb-bestrq report")
    arguments = parser.parse_args(words)
    if not arguments.toy and not torch.cuda.is_available():
        parser.error("there is no GPU here: --toy rehearses on a CPU")
    if arguments.output.exists() and any(arguments.output.iterdir()):
        parser.error(f"--output {arguments.output} holds files already: name another folder")
    if arguments.minutes <= 0:
        parser.error("--minutes must be above 0")
    folders = [arguments.data_folder, *arguments.extra_folders, *(getattr(arguments, corpus) for corpus in PROBES)]
    for folder in folders:
        if folder is not None and not folder.is_dir():
            parser.error(f"{folder} is no folder")
    return arguments


def data_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The folders that were given, as :class:`Settings` takes them."""
    data = {corpus: str(path.resolve()) for corpus in PROBES if (path := getattr(arguments, corpus)) is not None}
    if arguments.data_folder is not None:
        data |= {"train": str(arguments.data_folder.resolve()), "corpus": arguments.corpus}
        data["extra"] = [str(folder.resolve()) for folder in arguments.extra_folders]
    return data


def fast_folder(toy: bool) -> str | None:
    """A file system in memory with room for all checkpoints, which would keep a disk busy; None for the usual one."""
    memory = Path("/dev/shm")
    room = not toy and memory.is_dir() and shutil.disk_usage(memory).free > MEMORY_NEEDED
    return str(memory) if room else None


def main(words: list[str] | None = None) -> None:
    """Run the parts, print the table, write all."""
    arguments = parse(words)
    arguments.output.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "benchmarks/gpu_session.py", *(sys.argv[1:] if words is None else words)])
    with tempfile.TemporaryDirectory(dir=fast_folder(arguments.toy)) as work:
        settings = Settings(
            "cpu" if arguments.toy else "cuda",
            arguments.toy,
            str(arguments.output.resolve()),
            work,
            data_of(arguments),
            arguments.sizes,
        )
        room = shutil.disk_usage(work).free / 1e9
        print(f"runs and checkpoints in {work}, {room:.0f} GB free", file=sys.stderr, flush=True)
        parts = [name for name in PARTS if name in arguments.parts]
        # after each part, for a machine may be taken away
        written = partial(write_session, settings=settings, command=command)
        session = run_session(settings, parts, 60 * arguments.minutes, written)
    path = write_session(session, settings, command)
    print(short_table(session))
    print(f"\nAll figures: {path} and {path.with_suffix('.json').name}")
    if any(row["good"] is False for found in session.values() for row in found["rows"]):
        sys.exit(1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--part"]:
        part(sys.argv[2:])
    else:
        main()
