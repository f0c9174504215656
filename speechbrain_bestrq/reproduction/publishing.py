"""A copy of a reproduction that can be shown: its figures and its report, without audio, weights or folders' names."""

import json
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from speechbrain_bestrq.corpora._options import absolute_path
from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.reproduction.pairs import Pairs
from speechbrain_bestrq.reproduction.plan import CODEBOOK_PICTURE, CORPORA, TASKS
from speechbrain_bestrq.reproduction.report import task_of, write_reproduction
from speechbrain_bestrq.reproduction.stages import STAGE_FILE
from speechbrain_bestrq.reproduction.tables import PLAN_FILE, Runs, all_tables, read_plan
from speechbrain_bestrq.run_log import LOG_FILE, RUN_FILE
from speechbrain_bestrq.writing import write_text

#: An absolute path within a command: at its beginning, or behind what may stand before one.
_PATH = re.compile(r"(?<![\w.)\]~-])(?:/[\w.@+~-]+)+/?")


def publish(folders: str | os.PathLike | Sequence[str | os.PathLike], target: str | os.PathLike) -> list[Path]:
    """Copy what the report of a reproduction is made of, and write the report of the copy.

    Copied are the plan, and of each finished stage its record, its ``results.json`` or its
    log of the pre-training, and the picture of the check of the codebook; with them, how far apart the
    errors on the same utterances are. In all texts the folders of the corpora
    become "LIBRISPEECH", "VOXCELEB"..., that of the reproduction ".", and of any other absolute path the last
    name is left.

    Several reproductions of a preset by other seeds, from one machine or more, become one of all seeds. Where the
    errors of utterances are not at hand for all of them, as in what was published before, the report says so.

    Arguments
    ---------
    folders : str, Path or sequence of them
        Of the reproduction, or of several.
    target : str or Path
        A new folder, or an empty one.

    Returns
    -------
    list of Path
        The copied files, without those of the report.

    Raises
    ------
    InputError
        If a folder is none of a reproduction, several are not of one preset by other seeds, or the target holds
        something or lies in one of them.
    """
    given = [folders] if isinstance(folders, str | os.PathLike) else folders
    sources, target = [Path(folder).resolve() for folder in given], Path(target).resolve()
    plans = [read_plan(folder) for folder in sources]
    names = [folder_names(shlex.split(one["command"]), folder) for one, folder in zip(plans, sources, strict=True)]
    plans = [json.loads(without_paths(json.dumps(one), own)) for one, own in zip(plans, names, strict=True)]
    plan = _join(sources, plans)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} exists already: give a new folder, or empty this one.")
    if any(target == folder or folder in target.parents for folder in sources):
        raise InputError(f"{target} lies in the reproduction itself: give a folder elsewhere.")
    write_text(target / PLAN_FILE, json.dumps(plan, indent=2) + "\n")
    copied = [target / PLAN_FILE]
    for folder, one, own in zip(sources, plans, names, strict=True):
        for path in _files(folder, one["marks"]):
            copy = target / path.relative_to(folder)
            if path.suffix == ".png":
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
            else:
                write_text(copy, without_paths(path.read_text(encoding="utf-8"), own))
            copied.append(copy)
    _write_pairs(sources, plans, plan, target)
    write_reproduction(target)
    return copied


def _join(folders: Sequence[Path], plans: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One plan of all seeds."""
    first, *others = plans
    joined = {**first, "preset": dict(first["preset"]), "marks": dict(first["marks"])}
    for folder, plan in zip(folders[1:], others, strict=True):
        if {**plan["preset"], "seeds": None} != {**first["preset"], "seeds": None}:
            raise InputError(f"{folders[0]} and {folder} are of presets that differ in more than seeds: publish each.")
        if both := set(joined["preset"]["seeds"]) & set(plan["preset"]["seeds"]):
            raise InputError(f"{folders[0]} and {folder} both have seed {min(both)}: publish each.")
        if both := joined["marks"].keys() & plan["marks"].keys():
            raise InputError(
                f"{folders[0]} and {folder} both have {min(both)}, for all seeds: publish each. Only what is "
                "pre-trained for each seed (pretrain_each_seed) can be joined."
            )
        joined["command"] += f"\n{plan['command']}"
        joined["preset"]["seeds"] = [*joined["preset"]["seeds"], *plan["preset"]["seeds"]]
        joined["marks"] |= plan["marks"]
        joined["corpora"] = [corpus for corpus in joined["corpora"] if corpus in plan["corpora"]]
    return joined


def _write_pairs(
    folders: Sequence[Path], plans: Sequence[Mapping[str, Any]], joined: Mapping[str, Any], target: Path
) -> None:
    """Compare the errors of utterances, which are not copied, where they are."""
    with tempfile.TemporaryDirectory() as scratch:
        for folder, plan in zip(folders, plans, strict=True):
            for stage in plan["marks"]:
                if (folder / stage).is_dir():
                    (Path(scratch) / stage).parent.mkdir(parents=True, exist_ok=True)
                    (Path(scratch) / stage).symlink_to(folder / stage)
        runs = Runs(Path(scratch), joined)
        for folder in folders:
            runs.pairs.known |= Pairs(folder).known
        all_tables(runs)
        runs.pairs.write(target)


def _files(folder: Path, stages: Mapping[str, Any]) -> list[Path]:
    files = []
    for stage in stages:
        files.append(folder / stage / STAGE_FILE)
        if task_of(stage) in TASKS:
            files.append(folder / stage / TASKS[task_of(stage)].results)
        else:
            files += [folder / stage / name for name in (RUN_FILE, LOG_FILE, CODEBOOK_PICTURE)]
    return [path for path in files if path.is_file()]


def folder_names(words: Sequence[str], folder: Path) -> dict[str, str]:
    """Names that stand for the folders in a command of ``sb-bestrq reproduce``.

    Arguments
    ---------
    words : sequence of str
        The command.
    folder : Path
        Of the reproduction.

    Returns
    -------
    dict
        Of each folder as an absolute path. A relative one is no secret, and may be the name of a corpus.

    Example
    -------
    >>> folder_names(["--slurp", "/data/a", "--extra_folders", "/b", "/c"], Path("/out"))
    {'/out': '.', '/data/a': 'SLURP', '/b': 'EXTRA', '/c': 'EXTRA2'}
    """
    names = {str(folder): "."}
    option, count = "", 0
    for word in words:
        if word.startswith("--"):
            option, count = word.removeprefix("--"), 0
            continue
        count += 1
        if option in CORPORA or option == "extra_folders":
            name = "EXTRA" if option == "extra_folders" else option.upper()
            name += str(count) if count > 1 else ""
            if Path(word).is_absolute():
                names |= {word: name, str(absolute_path(word)): name, str(Path(word).resolve()): name}
    return names


def without_paths(text: str, names: Mapping[str, str]) -> str:
    """Replace absolute paths in a text.

    Arguments
    ---------
    text : str
    names : mapping
        Of folders, what stands for them; of other paths the last name is left.

    Returns
    -------
    str

    Example
    -------
    >>> without_paths("/usr/bin/python train.py --data_folder /data/S/wav --encoder random:/o/x", {"/data/S": "SLURP"})
    'python train.py --data_folder SLURP/wav --encoder random:x'
    """
    # as text, and as JSON writes what is not ASCII
    shown = {form: name for path, name in names.items() for form in (path, json.dumps(path)[1:-1])}
    for path, name in sorted(shown.items(), key=lambda pair: -len(pair[0])):
        text = re.sub(rf"(?<![\w./-]){re.escape(path)}(?![\w.-])", lambda _, name=name: name, text)
    return _PATH.sub(lambda found: found[0].rstrip("/").rsplit("/", 1)[1], text)
