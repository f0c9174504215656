"""What the tests of several recipes share."""

import pytest

from speechbrain_bestrq.artefact import save_encoder


@pytest.fixture
def encoder(make_speech_encoder, tmp_path):
    """An encoder folder."""
    facts = {"model": "BestRQ", "corpus": "Noise", "step": 7, "audio_hours": 1.5, "device_hours": 0.5}
    return save_encoder(make_speech_encoder(normalize="global", dropout=0.1), tmp_path / "encoder", "# Card", **facts)
