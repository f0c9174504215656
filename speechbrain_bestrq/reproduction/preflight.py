"""What a reproduction would find missing after days, looked for before anything is run."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from speechbrain_bestrq.corpora.iemocap import check_sessions
from speechbrain_bestrq.corpora.librispeech import check_splits
from speechbrain_bestrq.corpora.slurp import find_texts
from speechbrain_bestrq.corpora.voxceleb import find_lists
from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.ngram import read_words
from speechbrain_bestrq.reproduction.plan import PRETRAINING, RECIPES, TASKS, yaml_value
from speechbrain_bestrq.reproduction.stages import LANGUAGE_MODEL, Stage

_SPLITS = ("train_splits", "valid_splits", "test_splits")


def check_inputs(stages: Sequence[Stage], run_here: bool = True) -> None:
    """Refuse corpora that lack a part which a stage will read, and a language model that none can be.

    No audio is looked at: an hour of files takes longer than this may.

    Arguments
    ---------
    stages : sequence of Stage
        Those that are still to be run, of :func:`speechbrain_bestrq.reproduction.plan.make_plan`. A corpus that one of
        them makes is left alone.
    run_here : bool
        Whether what a language model takes has to be installed.

    Raises
    ------
    InputError
        Naming what is missing.
    """
    checks = {f"{PRETRAINING}/train.py": _check_librispeech}
    checks |= {f"{task.recipe}/train.py": _CHECKS[name] for name, task in TASKS.items()}
    seen = set()
    for stage in stages:
        program, *more = stage.same_as
        if program not in checks or any(need.startswith("speech/") for need in stage.needs):
            continue
        asked = _Asked(RECIPES / Path(program).parent / more[0], more[1:])
        if asked.identity not in seen:
            seen.add(asked.identity)
            checks[program](asked)
        model = asked.options.get(LANGUAGE_MODEL.removeprefix("--"))
        if model is not None and model not in seen:
            seen.add(model)
            if run_here:
                _import_kenlm()
            read_words(model)


def _import_kenlm() -> None:
    from speechbrain_bestrq.ctc_decoding import import_kenlm  # with all of PyTorch, which nothing else here needs

    import_kenlm()


class _Asked:
    """What a stage asks of a corpus."""

    def __init__(self, hparams: Path, words: Sequence[str]):
        if not hparams.is_file():
            known = ", ".join(sorted(path.stem for path in hparams.parent.glob("*.yaml")))
            raise InputError(f"the preset names a YAML {hparams.stem}, which the recipe has not: give one of {known}.")
        self.hparams = hparams
        pairs = zip(words, words[1:], strict=False)
        self.options = {word[2:]: value for word, value in pairs if word.startswith("--")}
        self.root = Path(self.options["data_folder"])
        given = {name: str(self.value(name)) for name in (*_SPLITS, "corpus", "trials", "synthetic")}
        self.identity = (self.root, self.hparams.parts[-3], *given.items())

    def value(self, name: str) -> Any:
        """Of an option, or else of the YAML."""
        return yaml.safe_load(self.options[name]) if name in self.options else yaml_value(self.hparams, name)


def _check_librispeech(asked: _Asked) -> None:
    if asked.value("corpus") == "folder":
        return
    check_splits(asked.root, sorted({split for name in _SPLITS for split in asked.value(name) or []}))


def _check_voxceleb(asked: _Asked) -> None:
    find_lists(asked.value("trials"), asked.root)


def _check_iemocap(asked: _Asked) -> None:
    check_sessions(asked.root)


def _check_slurp(asked: _Asked) -> None:
    find_texts(asked.root, bool(asked.value("synthetic")))


_CHECKS: dict[str, Callable[[_Asked], None]] = {
    "asr": _check_librispeech,
    "verification": _check_voxceleb,
    "emotion": _check_iemocap,
    "intent": _check_slurp,
}
