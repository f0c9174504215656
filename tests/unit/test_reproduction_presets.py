"""A preset that cannot be carried through is refused when it is read, in one line."""

import json
from pathlib import Path

import pytest

from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.reproduction.plan import PRESETS, make_plan, read_preset

#: A preset of one pre-training for each method.
TWO_SEEDS = str(Path(__file__).parents[1] / "helpers" / "two_seeds.yaml")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"baselines": ["random", "mfcc"]}, "baselines can be fbank"),
        ({"pretraining": {"wav2vec2": {"yaml": "wav2vec2", "options": {}}}}, "not random"),
        ({"pretraining": {"my-bestrq": {"yaml": "bestrq", "options": {}}}, "baselines": []}, "name it without"),
        ({"pretraining": {"bestrq": {"yaml": "bestrq_small"}}}, "bestrq has to have yaml and options"),
        ({"tasks": {"asr": {"frozen": {"yaml": "bestrq"}}}}, "asr's frozen has to have yaml and options"),
        ({"tasks": {"asr": None}}, "asr has to have frozen or fine-tuned"),
        ({"tasks": {"asr": {"fine_tuned": None}}}, "asr has to have frozen or fine-tuned, and nothing else"),
        ({"tasks": {"asr": {"frozen": {"yaml": "bestrq", "options": None}}}}, "asr's frozen has to have yaml and opt"),
        ({"few_labels": ["asr"]}, "few_labels has to have tasks"),
        ({"few_labels": {"translation": {}}}, "not translation"),
        (
            {"few_labels": {"asr": {"frozen": {"yaml": "probe_small", "options": {}}}}},
            "give label_hours in its options",
        ),
        ({"fine_tune_untrained": True, "baselines": ["fbank"]}, "needs random among the baselines"),
        ({"baselines": None}, "baselines is a list"),
        ({"pretraining": None}, "pretraining is a mapping of methods"),
        ({"seeds": 1}, r"seeds is a list of different whole numbers, such as \[1, 2\], not 1"),
        ({"seeds": [1, 1]}, "seeds is a list of different whole numbers"),
        ({"updates": []}, "updates is a list of different whole numbers"),
        ({"updates": [{}]}, "updates is a list of different whole numbers"),
        (
            {"tasks": {"asr": {"frozen": {"yaml": "probe_small", "options": {}, "untrained": {}}}}},
            "asr: untrained is a mapping of options, in fine-tuned",
        ),
        (
            {
                "tasks": {
                    "asr": {"fine-tuned": {"yaml": "bestrq_finetune", "options": {}, "untrained": {"label_seed": 1}}}
                }
            },
            "asr: untrained learns from the same labels: leave label_seed out",
        ),
        (
            {"tasks": {"asr": {"fine-tuned": {"yaml": "bestrq_finetune", "options": {}, "untrained": {}}}}},
            "untrained needs fine_tune_untrained: True",
        ),
        (
            {"tasks": {"asr": {"fine-tuned": {"yaml": "bestrq_finetune", "options": {}, "untrained": 1}}}},
            "asr: untrained is a mapping of options, in fine-tuned",
        ),
        (
            {"updates": {"bestrq": [720]}},
            "updates has to be one list, or a mapping that has one for each of bestrq, wav2",
        ),
        ({"updates": {"bestrq": [720], "wav2vec2": 720}}, "updates of wav2vec2 is a list of different whole numbers"),
        ({"updates": {"bestrq": [720], "wav2vec2": [900]}}, "updates go to 900, and wav2vec2 is trained for 720"),
        (
            {
                "pretraining": {"wav2vec2": {"yaml": "wav2vec2", "options": {}}},
                "baselines": [],
                "masking": {"updates": 1},
            },
            "masking needs a pre-training named bestrq",
        ),
    ],
)
def test_presets_that_would_fail_later_are_refused(tmp_path, change, said):
    path = tmp_path / "own.yaml"
    path.write_text(json.dumps({**read_preset(TWO_SEEDS), **change}))
    with pytest.raises(InputError, match=said):
        read_preset(str(path))


def test_presets_that_are_none_are_refused(tmp_path):
    with pytest.raises(
        InputError, match="no preset 'large': give one of demo, fine_tuned, long_seeds, paper, small, three_seeds"
    ):
        read_preset("large")
    path = tmp_path / "own.yaml"
    path.write_text("seeds: [1]\n")
    with pytest.raises(InputError, match="has to have baselines, pretraining"):
        read_preset(str(path))
    path.write_text("a: [")
    with pytest.raises(InputError, match="is no YAML"):
        read_preset(str(path))
    small = (PRESETS / "small.yaml").read_text()
    path.write_text(small.replace("  intent:", "  translation:"))
    with pytest.raises(InputError, match="not translation"):
        read_preset(str(path))
    with pytest.raises(InputError, match="give --librispeech"):
        make_plan(read_preset(TWO_SEEDS), {"slurp": tmp_path}, tmp_path)
    with pytest.raises(InputError, match="makes its own speech: leave out --slurp"):
        make_plan(read_preset("demo"), {"slurp": tmp_path}, tmp_path)
    path.write_text(Path(TWO_SEEDS).read_text().replace("updates: [720]", "updates: [720, 2000]"))
    with pytest.raises(InputError, match="updates go to 2000, and bestrq is trained for 720"):
        read_preset(str(path))
