"""What the YAML says is not overwritten by the defaults of options that nobody gave."""

import re
from pathlib import Path

import pytest

RECIPE = Path(__file__).parents[2] / "recipes" / "LibriSpeech" / "pretrain"


class Reached(Exception):  # noqa: N818 - not an error
    """The Brain was made."""


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
    yaml = (RECIPE / "hparams" / "bestrq_small.yaml").read_text(encoding="utf-8")
    settings = {"precision": "bf16", "grad_accumulation_factor": 2, "max_grad_norm": 7.0, "ckpt_interval_steps": 321}
    for name, value in (settings | {"num_layers": 1}).items():
        yaml, found = re.subn(rf"(?m)^({name}): .*$", rf"\1: {value}", yaml)
        assert found == 1, name
    (tmp_path / "toy.yaml").write_text(yaml, encoding="utf-8")
    audio = toy.write_noise(tmp_path / "audio", [0.8] * 12)
    arguments = {"data_folder": audio, "corpus": "folder", "output_folder": tmp_path / "run", "num_workers": 0, **given}
    with pytest.raises(Reached):
        recipe.main([str(tmp_path / "toy.yaml"), *(f"--{name}={value}" for name, value in arguments.items())])
    (brain,) = made
    assert brain.precision == given.get("precision", "bf16")
    assert brain.max_grad_norm == float(given.get("max_grad_norm", 7.0))
    assert brain.grad_accumulation_factor == 2 and brain.ckpt_interval_steps == 321
