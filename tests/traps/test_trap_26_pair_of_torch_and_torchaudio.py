"""The versions asked for are a pair that imports."""

import configparser
import re
from pathlib import Path

import torch
import torchaudio

SETUP = Path(__file__).parents[2] / "setup.cfg"


def test_torch_and_torchaudio_are_held_to_one_minor_release():
    """Trap: without bounds pip takes a torch for which no torchaudio was built, and ``import torchaudio`` raises.

    Mutation: in setup.cfg, ``torch==2.11.*`` -> ``torch>=2.9``.
    """
    parser = configparser.ConfigParser()
    parser.read(SETUP, encoding="utf-8")
    required = parser["options"]["install_requires"].split()
    minors = {}
    for requirement in required:
        match = re.fullmatch(r"(torch|torchaudio)==(\d+\.\d+)\.\*", requirement)
        if match:
            minors[match[1]] = match[2]
    assert minors.keys() == {"torch", "torchaudio"}, required
    assert minors["torch"] == minors["torchaudio"] == "2.11"
    # and the two at hand belong together
    assert torch.__version__.split(".")[:2] == torchaudio.__version__.split(".")[:2]
