"""A run's folder is its own while it lives: the downstream recipes (test_pretrain.py has the pre-training)."""

from pathlib import Path

import pytest

from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.locking import sole_writer
from speechbrain_bestrq.recipe import own_folder

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize(
    ("recipe", "options", "locked"),
    [
        ("LibriSpeech/ASR", [], "run"),
        ("VoxCeleb/verification", [], "run"),
        ("SLURP/intent", [], "run"),
        ("IEMOCAP/emotion", [], "run"),
        ("IEMOCAP/emotion", ["--fold=Ses01F"], "run/Ses01F"),
        ("IEMOCAP/emotion", ["--fold=Ses01F"], "run"),
    ],
)
def test_a_second_run_in_the_folder_is_refused_while_the_first_lives(recipe, options, locked, load_script, tmp_path):
    train = load_script(RECIPES / recipe / "train.py")
    yaml = str(RECIPES / recipe / "hparams" / "probe_small.yaml")
    given = [f"--data_folder={tmp_path}", "--encoder=fbank", f"--output_folder={tmp_path / 'run'}", "--device=cpu"]
    with (
        sole_writer(tmp_path / locked),
        pytest.raises(InputError, match="is being written by another process") as error,
    ):
        train.main([yaml, *given, *options])
    assert "\n" not in str(error.value) and not (tmp_path / "run" / "manifests").exists()
    with pytest.raises(InputError) as error:  # the next hindrance: there is no speech
        train.main([yaml, *given, *options])
    assert "is being written" not in str(error.value)


def test_folds_run_side_by_side_but_not_beside_all_of_them(tmp_path):
    with own_folder(tmp_path / "run", tmp_path / "run" / "Ses01F"):
        with own_folder(tmp_path / "run", tmp_path / "run" / "Ses01M"):
            pass
        with pytest.raises(InputError, match="run' is being written by another process"), own_folder(tmp_path / "run"):
            pass
    with own_folder(tmp_path / "run"):
        pass
