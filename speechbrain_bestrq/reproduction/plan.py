"""From a preset, which is data, to the stages of its plan: the recipes' own commands."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.reproduction.elsewhere import FinishedRun, assign_runs, check_model, command_of
from speechbrain_bestrq.reproduction.stages import Stage
from speechbrain_bestrq.results import RESULTS_FILE

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
PRESETS = Path(__file__).resolve().parent / "presets"
PRETRAINING = "LibriSpeech/pretrain"
#: Kind of the stages that look at the labels before training, and what they draw.
CODEBOOK_CHECK, CODEBOOK_PICTURE = "codebook-check", "codebook.png"


@dataclass(frozen=True)
class Task:
    """A downstream task: its recipe, the corpus it needs, its option for few labels and in words, its results."""

    recipe: str
    corpus: str
    few_option: str
    few_words: str
    results: str = RESULTS_FILE


TASKS = {
    "asr": Task("LibriSpeech/ASR", "librispeech", "label_hours", "{} h of labels"),
    "verification": Task("VoxCeleb/verification", "voxceleb", "train_speakers", "{} training speakers"),
    "emotion": Task("IEMOCAP/emotion", "iemocap", "examples_per_class", "{} examples a class", f"all/{RESULTS_FILE}"),
    "intent": Task("SLURP/intent", "slurp", "examples_per_class", "{} examples a class"),
}
CORPORA = tuple(task.corpus for task in TASKS.values())
#: What a preset has to say, and may.
KEYS = (
    {"seeds", "updates", "pretraining", "baselines", "tasks"},
    {"few_labels", "fine_tune_untrained", "synthetic", "masking", "pretrain_each_seed"},
)
FROZEN, FINE_TUNED = "frozen", "fine-tuned"
#: Of the settings of a fine-tuning: options that training from scratch has beside or instead of the others.
UNTRAINED = "untrained"
#: Where a preset has the tasks with all of their labels, and with few.
ALL_LABELS, FEW_LABELS = "tasks", "few_labels"
#: What Table 3 is measured on.
MASKING_SPLIT = "dev-clean"


def read_preset(name: str) -> dict[str, Any]:
    """Read a preset.

    Arguments
    ---------
    name : str
        One of those in the package, or a YAML file of the same form.

    Returns
    -------
    dict

    Raises
    ------
    InputError
        If there is none, or it lacks a key or has one too many.

    Example
    -------
    >>> read_preset("paper")["updates"]
    [100000, 200000]
    """
    path = PRESETS / f"{name}.yaml"
    if not path.is_file():
        path = Path(name)
    if not path.is_file():
        known = ", ".join(sorted(one.stem for one in PRESETS.glob("*.yaml")))
        raise InputError(f"there is no preset {name!r}: give one of {known}, or a file of the same form.")
    try:
        preset = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise InputError(f"{path} is no YAML ({' '.join(str(error).split())}): mend it.") from error
    needed, allowed = KEYS
    if not isinstance(preset, dict) or not needed <= preset.keys() <= needed | allowed:
        raise InputError(f"{path} has to have {', '.join(sorted(needed))} and may have {', '.join(sorted(allowed))}.")
    _check_numbers(path, "seeds", preset["seeds"])
    for name, kind, form in (
        ("pretraining", dict, "a mapping of methods"),
        ("baselines", list, "a list, which may be []"),
    ):
        if not isinstance(preset[name], kind):
            raise InputError(f"{path}: {name} is {form}, not {preset[name]!r}.")
    masking = preset.get("masking")
    if masking and "bestrq" not in preset["pretraining"]:
        raise InputError(f"{path}: masking needs a pre-training named bestrq.")
    if masking and not (
        isinstance(masking, dict) and isinstance(masking.get("mask_prob"), dict) and "updates" in masking
    ):
        raise InputError(f"{path}: masking has to have mask_prob, a mapping of shares to probabilities, and updates.")
    known = {"fbank", *(["random"] if "bestrq" in preset["pretraining"] else [])}
    if unknown := set(preset["baselines"]) - known:
        raise InputError(
            f"{path}: baselines can be fbank and, where there is a pre-training named bestrq, random (that one, "
            f"untrained), not {', '.join(sorted(unknown))}."
        )
    for method, settings in preset["pretraining"].items():
        _check_settings(path, method, settings)
        if "-" in method or "/" in method:
            raise InputError(f"{path}: {method}: name it without - and /.")
    _check_updates(path, preset)
    if preset.get("fine_tune_untrained") and "random" not in preset["baselines"]:
        raise InputError(f"{path}: fine_tune_untrained needs random among the baselines.")
    for labels in (ALL_LABELS, FEW_LABELS):
        tasks = preset.get(labels) or {}
        _check_tasks(path, labels, tasks)
        kinds = [settings or {} for kinds in tasks.values() for settings in kinds.values()]
        if any(UNTRAINED in settings for settings in kinds) and not preset.get("fine_tune_untrained"):
            raise InputError(f"{path}: {UNTRAINED} needs fine_tune_untrained: True.")
    return preset


def _check_numbers(path: Path, name: str, numbers: Any) -> None:
    whole = isinstance(numbers, list) and numbers and all(isinstance(one, int) for one in numbers)
    if not whole or len(set(numbers)) < len(numbers):
        raise InputError(f"{path}: {name} is a list of different whole numbers, such as [1, 2], not {numbers!r}.")


def _check_updates(path: Path, preset: Mapping[str, Any]) -> None:
    """Of all methods alike, or of each its own."""
    updates, methods = preset["updates"], preset["pretraining"]
    if not isinstance(updates, dict):
        _check_numbers(path, "updates", updates)
    elif updates.keys() != methods.keys():
        known = ", ".join(methods)
        raise InputError(f"{path}: updates has to be one list, or a mapping that has one for each of {known}.")
    for method, settings in methods.items():
        numbers = updates_of(preset, method)
        _check_numbers(path, f"updates of {method}", numbers)
        limit = settings["options"].get("optimizer_step_limit")
        if limit is not None and max(numbers) > limit:
            raise InputError(f"{path}: updates go to {max(numbers)}, and {method} is trained for {limit}.")


def _check_tasks(path: Path, labels: str, tasks: Any) -> None:
    if not isinstance(tasks, dict):
        raise InputError(f"{path}: {labels} has to have tasks: {', '.join(TASKS)}.")
    if unknown := tasks.keys() - TASKS.keys():
        raise InputError(f"{path}: tasks are {', '.join(TASKS)}, not {', '.join(sorted(unknown))}.")
    for task, kinds in tasks.items():
        if not isinstance(kinds, dict) or not kinds.keys() <= {FROZEN, FINE_TUNED}:
            raise InputError(f"{path}: {task} has to have {FROZEN} or {FINE_TUNED}, and nothing else.")
        for kind, settings in kinds.items():
            if settings is None:
                continue
            _check_settings(path, f"{task}'s {kind}", settings)
            few = TASKS[task].few_option
            if UNTRAINED in settings and (kind == FROZEN or not isinstance(settings[UNTRAINED], dict)):
                raise InputError(f"{path}: {task}: {UNTRAINED} is a mapping of options, in {FINE_TUNED}.")
            if others := settings.get(UNTRAINED, {}).keys() & {few, "label_seed", "seed"}:
                raise InputError(f"{path}: {task}: {UNTRAINED} learns from the same labels: leave {min(others)} out.")
            if labels == FEW_LABELS and settings["options"].get(few) is None:
                raise InputError(f"{path}: {labels}: {task}'s {kind} does not say how few: give {few} in its options.")


def _check_settings(path: Path, name: str, settings: Any) -> None:
    if not isinstance(settings, dict) or "yaml" not in settings or not isinstance(settings.get("options"), dict):
        raise InputError(f"{path}: {name} has to have yaml and options, which may be {{}}.")


def yaml_value(path: Path, key: str) -> Any:
    """A plain value at the top of a recipe's YAML, without building what else it says.

    Arguments
    ---------
    path : Path
        The YAML.
    key : str

    Returns
    -------
    object
        None if the key is not there.

    Example
    -------
    >>> yaml_value(RECIPES / PRETRAINING / "hparams" / "bestrq.yaml", "sample_rate")
    16000
    """
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{key}:"):
            return yaml.safe_load(line.split(":", 1)[1].split("#")[0])
    return None


def make_plan(
    preset: Mapping[str, Any],
    corpora: Mapping[str, str | Path],
    folder: Path,
    language_model: str | Path | None = None,
    pretraining_devices: int = 1,
    options: Mapping[str, Any] | None = None,
    extra_folders: Sequence[str | Path] = (),
    pretrained: Sequence[str] = (),
) -> list[Stage]:
    """Make the stages of a preset.

    Arguments
    ---------
    preset : mapping
        As :func:`read_preset` gives it.
    corpora : mapping
        Folders of "librispeech", "voxceleb", "iemocap", "slurp". Tasks whose corpus is
        missing are left out; LibriSpeech must be there, for a pre-training. With
        ``synthetic`` in the preset, they are made.
    folder : Path
        Of the plan, absolute.
    language_model : str or Path, optional
        For recognition, as train.py takes it.
    pretraining_devices : int
        More than 1: the pre-trainings run under torchrun on so many.
    options : mapping, optional
        Options that every train.py gets, such as "num_workers".
    extra_folders : sequence of str or Path, optional
        Of other audio, which the pre-trainings get as well.
    pretrained : sequence of str, optional
        "<method>=<folder>" each: pre-trainings that were done elsewhere, which take the place of the
        preset's own, of the same seed where it has one for each.

    Returns
    -------
    list of Stage
        Each after those that it needs.

    Raises
    ------
    InputError
        If there is no corpus to pre-train on, or the recipes are not there, or one of ``pretrained`` is of no use.
    """
    if not (RECIPES / PRETRAINING / "train.py").is_file():
        raise InputError(
            f"{RECIPES} does not exist: install the package where its recipes are, with pip install --editable . in a "
            "checkout of the repository."
        )
    plan = _Plan(
        preset,
        dict(corpora),
        Path(folder),
        language_model,
        pretraining_devices,
        dict(options or {}),
        extra_folders,
        _take_runs(preset, Path(folder), pretrained),
    )
    if preset.get("synthetic"):
        if corpora:
            raise InputError(f"this preset makes its own speech: leave out --{next(iter(corpora))}, or take another.")
        plan.add_synthetic()
    if "librispeech" not in plan.corpora and plan.trains:
        raise InputError("there is nothing to pre-train on: give --librispeech.")
    plan.add_pretraining()
    for task in TASKS:
        if TASKS[task].corpus in plan.corpora:
            plan.add_task(task)
    if preset.get("masking"):
        plan.add_masking()
    return plan.stages


def updates_of(preset: Mapping[str, Any], method: str) -> list[int]:
    """After how many updates of its pre-training a method's encoders are compared.

    Example
    -------
    >>> updates_of({"updates": [720]}, "bestrq")
    [720]
    >>> updates_of({"updates": {"bestrq": [4000], "wav2vec2": [1000]}}, "wav2vec2")
    [1000]
    """
    updates = preset["updates"]
    return updates[method] if isinstance(updates, Mapping) else updates


def encoder_names(preset: Mapping[str, Any]) -> list[str]:
    """Names of what the tasks listen with, in the order of the tables: "fbank", "random", "bestrq-1000"...

    Example
    -------
    >>> encoder_names(read_preset("small"))
    ['fbank', 'random', 'wav2vec2-2880', 'bestrq-2880']
    """
    methods = sorted(preset["pretraining"], reverse=True)
    trained = [f"{method}-{updates}" for method in methods for updates in updates_of(preset, method)]
    return [*sorted(preset["baselines"]), *trained]


def settings_of(preset: Mapping[str, Any], labels: str, task: str, kind: str) -> Mapping[str, Any] | None:
    """What a preset says of a kind of probe: its YAML and options; None if it has none.

    Example
    -------
    >>> settings_of(read_preset("three_seeds"), ALL_LABELS, "intent", FROZEN)
    {'yaml': 'probe_small', 'options': {'number_of_epochs': 10}}
    """
    return (preset.get(labels) or {}).get(task, {}).get(kind)


def probe_name(task: str, kind: str, labels: str, encoder: str, seed: int) -> str:
    """Name the stage of a probe.

    Example
    -------
    >>> probe_name("asr", FROZEN, ALL_LABELS, "fbank", 1), probe_name("asr", FROZEN, FEW_LABELS, "fbank", 1)
    ('asr-frozen/fbank/1', 'asr-frozen-few/fbank/1')
    """
    return f"{task}-{kind}{'-few' if labels == FEW_LABELS else ''}/{encoder}/{seed}"


def probed_encoders(preset: Mapping[str, Any], kind: str) -> list[str]:
    """Of :func:`encoder_names`, those that a kind of probe listens with.

    Example
    -------
    >>> probed_encoders(read_preset("small"), FINE_TUNED)
    ['wav2vec2-2880', 'bestrq-2880']
    """
    names = encoder_names(preset)
    if kind == FROZEN:
        return names
    untrained = {"random"} if preset.get("fine_tune_untrained") else set()
    return [name for name in names if name not in set(preset["baselines"]) - untrained]


def pretraining_names(preset: Mapping[str, Any]) -> dict[str, tuple[str, int | None]]:
    """Stages of the pre-trainings that the tasks compare, each with its method and its seed.

    One of each method, of its YAML's own seed (here None), for all seeds of the tasks; with
    ``pretrain_each_seed`` in the preset one for each of them.

    Example
    -------
    >>> pretraining_names(read_preset("demo"))
    {'pretraining/bestrq': ('bestrq', None), 'pretraining/wav2vec2': ('wav2vec2', None)}
    """
    if not preset.get("pretrain_each_seed"):
        return {f"pretraining/{method}": (method, None) for method in preset["pretraining"]}
    return {
        f"pretraining/{method}/{seed}": (method, seed) for method in preset["pretraining"] for seed in preset["seeds"]
    }


def _take_runs(preset: Mapping[str, Any], folder: Path, words: Sequence[str]) -> dict[str, FinishedRun]:
    """Of the stages of pre-trainings, those that runs done elsewhere take the place of."""
    methods = preset["pretraining"]
    updates = {method: updates_of(preset, method) for method in methods}
    found = assign_runs(words, pretraining_names(preset), updates, folder)
    for name, run in found.items():
        if folder in run.folder.resolve().parents:
            raise InputError(f"{run.folder} lies in the reproduction itself: give another --output_folder.")
        method = pretraining_names(preset)[name][0]
        check_model(method, run, RECIPES / PRETRAINING / "hparams" / f"{methods[method]['yaml']}.yaml")
    return found


class _Plan:
    def __init__(
        self,
        preset: Mapping[str, Any],
        corpora: dict[str, Any],
        folder: Path,
        language_model: str | Path | None,
        pretraining_devices: int,
        options: dict[str, Any],
        extra_folders: Sequence[str | Path],
        finished: Mapping[str, FinishedRun],
    ):
        self.extra_folders, self.finished = extra_folders, finished
        self.preset, self.corpora, self.folder = preset, corpora, folder
        self.language_model, self.pretraining_devices, self.options = language_model, pretraining_devices, options
        self.stages: list[Stage] = []
        self.caches: dict[str, str] = {}
        """Of a folder of hidden states, the stage that makes it."""
        self.speech: dict[str, str] = {}
        """Of a corpus that is made, the stage that makes it."""

    @property
    def trains(self) -> bool:
        """Whether anything is left to be pre-trained."""
        return bool(pretraining_names(self.preset).keys() - self.finished.keys())

    def add_synthetic(self) -> None:
        for corpus, hours in self.preset["synthetic"].items():
            name = f"speech/{corpus}"
            self.corpora[corpus] = self.folder / name / corpus
            self.speech[corpus] = name
            speakers = max(round(320 * hours), 2)  # many, for each has rooms of its own (docs/LOG.md)
            words = ["--layout", corpus, "--output_folder", str(self.corpora[corpus]), "--hours", str(hours)]
            words += [] if corpus == "iemocap" else ["--speakers", str(speakers)]
            command = (sys.executable, "-m", "speechbrain_bestrq", "synthesize", *words)
            self.stages.append(Stage(name, command, (corpus,), same_as=command[1:]))

    def add_pretraining(self) -> None:
        for name, (method, seed) in pretraining_names(self.preset).items():
            if name in self.finished:
                self._add_finished(name, updates_of(self.preset, method))
                continue
            settings = self.preset["pretraining"][method]
            options = settings["options"] if seed is None else {**settings["options"], "seed": seed}
            if settings["yaml"].startswith("bestrq"):  # has labels before it is trained
                self._add_codebook_check(name, {**settings, "options": options})
            self._add_pretraining(name, {**settings, "options": options}, updates_of(self.preset, method))

    def _add_finished(self, name: str, updates: Sequence[int]) -> None:
        run = self.finished[name]
        command = command_of(run, self.folder / name, updates)
        products = tuple(f"encoder@{number}" for number in updates)
        self.stages.append(Stage(name, command, products, same_as=tuple(run.mark(updates)), is_brief=True))

    def _add_codebook_check(self, pretraining: str, settings: Mapping[str, Any]) -> None:
        """Nothing waits for it: what it finds is told, and the pre-training goes on."""
        name = pretraining.replace("pretraining", CODEBOOK_CHECK, 1)
        path = RECIPES / PRETRAINING / "hparams" / f"{settings['yaml']}.yaml"
        words = {
            "data_folder": self.corpora["librispeech"],
            "output_folder": self.folder / name,
            **settings["options"],
            **self._extra(),
        }
        program, more = [sys.executable, "-m", "speechbrain_bestrq", "check-codebook"], _options(words)
        same_as = (*program[1:], path.name, *more)
        speech = (self.speech["librispeech"],) if "librispeech" in self.speech else ()
        self.stages.append(Stage(name, (*program, str(path), *more), (CODEBOOK_PICTURE,), speech, same_as=same_as))

    def _extra(self) -> dict[str, str]:
        """The option for other audio, where there is some."""
        if not self.extra_folders:
            return {}
        return {"extra_folders": f"[{', '.join(json.dumps(str(path)) for path in self.extra_folders)}]"}

    def _add_pretraining(self, name: str, settings: Mapping[str, Any], updates: Sequence[int]) -> None:
        # the preset may name more encoders, to look at with `sb-bestrq report --evidence`
        steps = sorted({*updates, *yaml.safe_load(str(settings["options"].get("encoder_at_steps", [])))})
        given = {**settings["options"], "encoder_at_steps": str(steps), **self._extra()}
        products = tuple(f"encoder@{number}" for number in updates)
        self._add(name, PRETRAINING, settings["yaml"], "librispeech", given, products, ())

    def add_task(self, task: str) -> None:
        for seed in self.preset["seeds"]:
            for kind in (FROZEN, FINE_TUNED):
                for encoder in probed_encoders(self.preset, kind):
                    for labels in (ALL_LABELS, FEW_LABELS):
                        self._add_task(task, seed, kind, encoder, labels)

    def _add_task(self, task: str, seed: int, kind: str, encoder: str, labels: str) -> None:
        settings = settings_of(self.preset, labels, task, kind)
        if settings is None:
            return
        if encoder == "random":
            # what is good for a pre-trained encoder, such as a low rate, may be bad for one from scratch
            settings = {**settings, "options": {**settings["options"], **(settings.get(UNTRAINED) or {})}}
        source, needs = self._source(encoder, seed)
        cache = None
        if kind == FROZEN:  # another seed is another untrained encoder, and may be another trained one
            trained = encoder not in self.preset["baselines"]
            own = encoder == "random" or trained and self.preset.get("pretrain_each_seed")
            cache = f"{encoder}-{seed}" if own else encoder
        if labels == FEW_LABELS:  # another seed is another draw of them
            settings = {**settings, "options": {"label_seed": seed, **settings["options"]}}
            if cache is not None and not self._caches_all(task):
                cache = f"{encoder}-few-{seed}"
        self._add_probe(probe_name(task, kind, labels, encoder, seed), task, settings, source, seed, needs, cache)

    def _caches_all(self, task: str) -> bool:
        """Whether the hidden states of all of a task's audio are kept anyway, those for few labels among them."""
        settings = settings_of(self.preset, ALL_LABELS, task, FROZEN)
        return (
            settings is not None
            and settings["yaml"] == "probe_small"
            and TASKS[task].few_option not in settings["options"]
        )

    def _source(self, encoder: str, seed: int) -> tuple[str, tuple[str, ...]]:
        """The source of an encoder for a seed of the tasks, and the stage that makes it."""
        if encoder == "fbank":
            return encoder, ()
        method = "bestrq" if encoder == "random" else encoder.rsplit("-", 1)[0]
        names = pretraining_names(self.preset).items()
        name = next(name for name, made in names if made[0] == method and made[1] in (None, seed))
        updates = max(updates_of(self.preset, method)) if encoder == "random" else encoder.rsplit("-", 1)[1]
        path = f"{self.folder / name / f'encoder@{updates}'}"
        return (f"random:{path}" if encoder == "random" else path), (name,)

    def _add_probe(
        self,
        name: str,
        task: str,
        settings: Mapping[str, Any],
        source: str,
        seed: int,
        needs: tuple[str, ...],
        cache: str | None = None,
    ) -> None:
        given = {**settings["options"], "encoder": source, "seed": seed}
        after: tuple[str, ...] = ()
        if cache is not None and settings["yaml"] == "probe_small":
            given["cache_folder"] = str(self.folder / "cache" / task / cache)
            # the first makes it, alone
            after = tuple(filter(None, [self.caches.get(given["cache_folder"])]))
            self.caches.setdefault(given["cache_folder"], name)
        if task == "asr" and self.language_model is not None and not name.startswith("masking-"):
            given["language_model"] = str(self.language_model)
        recipe = TASKS[task]
        self._add(name, recipe.recipe, settings["yaml"], recipe.corpus, given, (recipe.results,), needs, after)

    def add_masking(self) -> None:
        """Table 3: the same pre-training with other masks, each probed on the validation set without language model."""
        sweep, method = self.preset["masking"], self.preset["pretraining"]["bestrq"]
        if not self.preset["tasks"].get("asr", {}).get(FROZEN) or "librispeech" not in self.corpora:
            return
        for share, probability in sweep["mask_prob"].items():
            name = f"masking/{share}"
            options = {**method["options"], **sweep.get("options", {})}
            options |= {"optimizer_step_limit": sweep["updates"], "mask_prob": probability}
            self._add_pretraining(name, {"yaml": method["yaml"], "options": options}, [sweep["updates"]])
            source = str(self.folder / name / f"encoder@{sweep['updates']}")
            settings, seed = self.preset["tasks"]["asr"][FROZEN], self.preset["seeds"][0]
            # tested where it is validated, as the paper's: for the interval
            settings = {**settings, "options": {**settings["options"], "test_splits": f"[{MASKING_SPLIT}]"}}
            self._add_probe(f"masking-asr/{share}/{seed}", "asr", settings, source, seed, (name,))

    def _accumulation(self, hparams: str, given: Mapping[str, Any]) -> int:
        """Micro-batches of an update on one device; they are shared by the devices, so that the update stays."""
        path = RECIPES / PRETRAINING / "hparams" / f"{hparams}.yaml"
        return int(given.get("grad_accumulation_factor", yaml_value(path, "grad_accumulation_factor")))

    def _check_devices(self, hparams: str, factor: int) -> None:
        if factor % self.pretraining_devices:
            raise InputError(
                f"--pretraining_devices {self.pretraining_devices} does not divide the {factor} micro-batches of an "
                f"update ({hparams}.yaml and the preset): give a number that does."
            )

    def _add(
        self,
        name: str,
        recipe: str,
        hparams: str,
        corpus: str,
        given: Mapping[str, Any],
        products: tuple[str, ...],
        needs: tuple[str, ...],
        after: tuple[str, ...] = (),
    ) -> None:
        path = RECIPES / recipe
        words = {"data_folder": self.corpora[corpus], "output_folder": self.folder / name, **self.options, **given}
        same_as = (f"{recipe}/train.py", f"hparams/{hparams}.yaml", "--noprogressbar", *_options(words))
        program, devices = [sys.executable], 1
        if recipe == PRETRAINING and self.pretraining_devices > 1:
            factor = self._accumulation(hparams, given)
            if name.startswith("masking/"):  # of smaller updates, on fewer devices
                devices = math.gcd(factor, self.pretraining_devices)
            else:
                self._check_devices(hparams, factor)
                devices = self.pretraining_devices
            program += ["-m", "torch.distributed.run", f"--nproc_per_node={devices}"]
            # a free port, for two at once
            program += ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
            words |= {"grad_accumulation_factor": factor // devices}
        command = [*program, str(path / "train.py"), str(path / "hparams" / f"{hparams}.yaml"), "--noprogressbar"]
        command += _options(words)
        speech = (self.speech[corpus],) if corpus in self.speech else ()
        self.stages.append(Stage(name, tuple(command), products, (*speech, *needs), devices, after, same_as))


def _options(words: Mapping[str, Any]) -> list[str]:
    """Options of a command."""
    return [word for key, value in words.items() for word in (f"--{key}", str(value))]
