"""Options of the tasks' YAMLs arrive where they have an effect."""

import inspect
import re
from pathlib import Path

import pytest
from hyperpyyaml import load_hyperpyyaml

from speechbrain_bestrq.artefact import save_encoder
from speechbrain_bestrq.corpora import prepare_iemocap, prepare_librispeech, prepare_slurp, prepare_voxceleb

RECIPES = Path(__file__).parents[2] / "recipes"
PREPARE = {
    "LibriSpeech/ASR": prepare_librispeech,
    "VoxCeleb/verification": prepare_voxceleb,
    "IEMOCAP/emotion": prepare_iemocap,
    "SLURP/intent": prepare_slurp,
}
YAMLS = [path for recipe in PREPARE for path in sorted((RECIPES / recipe / "hparams").glob("*.yaml"))]
#: Not the preparation's in a YAML: the run's seed, and where its checkpoints are.
OTHERS = {"seed", "save_folder"}


@pytest.mark.parametrize("recipe", PREPARE)
def test_the_preparation_is_told_every_option_that_a_yaml_has_for_it(recipe, load_script):
    train = load_script(RECIPES / recipe / "train.py")
    known = inspect.signature(PREPARE[recipe]).parameters.keys() - OTHERS
    for path in sorted((RECIPES / recipe / "hparams").glob("*.yaml")):
        written = set(re.findall(r"^(\w+):", path.read_text(), re.MULTILINE))
        assert set(train.PREPARATION) == written & known, path.name
    assert {"data_folder", "sample_rate", "resample", "max_unreadable"} <= set(train.PREPARATION)


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: f"{path.parts[-3]}/{path.stem}")
def test_what_is_fine_tuned_is_masked_where_that_is_asked_for(path, make_speech_encoder, tmp_path):
    encoder = save_encoder(make_speech_encoder(normalize="global"), tmp_path / "encoder", "# Card")
    given = {"data_folder": "none", "output_folder": str(tmp_path / "run"), "encoder": str(encoder)}
    if "finetune" not in path.stem:
        with open(path) as file:
            assert load_hyperpyyaml(file, given)["speech_encoder"].freeze
        return
    for asked in (True, False):
        with open(path) as file:
            made = load_hyperpyyaml(file, {**given, "apply_spec_augment": asked})
        assert made["speech_encoder"].describe()["masked"] is asked
        assert not made["speech_encoder"].freeze
