"""What the YAML says is not overwritten by the defaults of options that nobody gave."""

import re
from pathlib import Path

import pytest

from speechbrain_bestrq.corpora.synthetic import make_synthetic
from speechbrain_bestrq.task_brain import TaskBrain

RECIPES = Path(__file__).parents[2] / "recipes"
RECIPE = RECIPES / "LibriSpeech" / "pretrain"
#: Each task's layout of the corpus, and the least synthetic speech in it that its recipe takes.
TASKS = {
    "LibriSpeech/ASR": {"layout": "librispeech", "hours": 0.003, "speakers": 3},
    "VoxCeleb/verification": {"layout": "voxceleb", "hours": 0.003, "speakers": 6},
    "IEMOCAP/emotion": {"layout": "iemocap", "hours": 0.03},
    "SLURP/intent": {"layout": "slurp", "hours": 0.003, "speakers": 10},
}


class Reached(Exception):  # noqa: N818 - not an error
    """The Brain was made."""


def edited(path, folder, **settings):
    """A copy of a YAML with other values of some of its keys."""
    yaml = path.read_text(encoding="utf-8")
    for name, value in settings.items():
        yaml, found = re.subn(rf"(?m)^({name}): .*$", rf"\1: {value}", yaml)
        assert found == 1, name
    copy = folder / "toy.yaml"
    copy.write_text(yaml, encoding="utf-8")
    return copy


@pytest.mark.parametrize("given", [{}, {"precision": "fp32", "max_grad_norm": "3.0"}], ids=["YAML", "command line"])
def test_the_yamls_settings_reach_the_brain(toy, load_script, tmp_path, monkeypatch, given):
    """Trap: ``hparams.update(run_opts)`` puts option defaults over the YAML: bf16 -> fp32, accumulation 2 -> 1.

    Mutation: in recipes/LibriSpeech/pretrain/train.py, run, before ``brain = PretrainingBrain(`` add
    ``hparams.update(run_opts.as_dict())``.
    """
    recipe = load_script(RECIPE / "train.py")
    made = []

    class Brain(recipe.PretrainingBrain):
        def measure(self, batches):
            made.append(self)
            raise Reached

    monkeypatch.setattr(recipe, "PretrainingBrain", Brain)
    settings = {"precision": "bf16", "grad_accumulation_factor": 2, "max_grad_norm": 7.0, "ckpt_interval_steps": 321}
    yaml = edited(RECIPE / "hparams" / "bestrq_small.yaml", tmp_path, **settings, num_layers=1)
    audio = toy.write_noise(tmp_path / "audio", [0.8] * 12)
    arguments = {"data_folder": audio, "corpus": "folder", "output_folder": tmp_path / "run", "num_workers": 0, **given}
    with pytest.raises(Reached):
        recipe.main([str(yaml), *(f"--{name}={value}" for name, value in arguments.items())])
    (brain,) = made
    assert brain.precision == given.get("precision", "bf16")
    assert brain.max_grad_norm == float(given.get("max_grad_norm", 7.0))
    assert brain.grad_accumulation_factor == 2 and brain.ckpt_interval_steps == 321


@pytest.mark.parametrize("task", TASKS)
def test_the_yamls_settings_reach_the_brain_of_a_task(task, load_script, tmp_path, monkeypatch):
    """Trap: as above, in the recipes of the tasks, whose YAMLs happen to say what SpeechBrain has as defaults.

    Mutations: in recipes/LibriSpeech/ASR/train.py, run, before ``brain = ASRBrain(`` add
    ``hparams.update(run_opts.as_dict())``; in recipes/VoxCeleb/verification/train.py, run, before ``brain =
    VerificationBrain(`` add ``hparams.update(run_opts.as_dict())``; in recipes/IEMOCAP/emotion/train.py, run_fold,
    before ``run_classification(`` add ``hparams.update(run_opts.as_dict())``; in recipes/SLURP/intent/train.py, run,
    before ``run_classification(`` add ``hparams.update(run_opts.as_dict())``.
    """
    made = []

    def reach(brain, *_):
        made.append(brain)
        raise Reached

    monkeypatch.setattr(TaskBrain, "fit", reach)
    settings = {"precision": "bf16", "max_grad_norm": 7.0, "cache_features": False}
    yaml = edited(RECIPES / task / "hparams" / "probe_small.yaml", tmp_path, **settings)
    make_synthetic(tmp_path / "audio", **TASKS[task])
    arguments = {"data_folder": tmp_path / "audio", "encoder": "fbank", "output_folder": tmp_path / "run"}
    if task == "LibriSpeech/ASR":
        arguments["test_splits"] = "[test-clean]"
    recipe = load_script(RECIPES / task / "train.py")
    with pytest.raises(Reached):
        recipe.main([str(yaml), *(f"--{name}={value}" for name, value in arguments.items())])
    (brain,) = made
    assert brain.precision == "bf16" and brain.max_grad_norm == 7.0
