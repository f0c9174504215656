"""The versions asked for are a pair that imports."""

import configparser
import re
from pathlib import Path

import torch
import torchaudio

SETUP = Path(__file__).parents[2] / "setup.cfg"


def test_torch_and_torchaudio_are_held_to_one_release_each():
    """Trap: with looser bounds pip takes a pair that was not built together, and ``import torchaudio`` raises.

    It did with no bounds at all, by a newer torch, and with one minor release for both, by a torchaudio 2.11.1
    that was built against a newer torch than 2.11.0.

    Mutation: in setup.cfg, ``torchaudio==2.11.0`` -> ``torchaudio==2.11.*``.
    """
    parser = configparser.ConfigParser()
    parser.read(SETUP, encoding="utf-8")
    required = parser["options"]["install_requires"].split()
    releases = {}
    for requirement in required:
        match = re.fullmatch(r"(torch|torchaudio)==(\d+\.\d+\.\d+)", requirement)
        if match:
            releases[match[1]] = match[2]
    assert releases == {"torch": "2.11.0", "torchaudio": "2.11.0"}, required
    # and the two at hand belong together
    assert torch.__version__.split(".")[:2] == torchaudio.__version__.split(".")[:2]
