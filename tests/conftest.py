"""Small models, batches and runs that several tests share."""

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest
import torch
from speechbrain.utils.importutils import LazyModule

from speechbrain_bestrq.encoder import ConformerEncoder, SpeechEncoder
from speechbrain_bestrq.frontend import ConvSubsampling, LogMel

# hypothesis asks every module for its file; SpeechBrain's lazy ones would import what is not installed (k2), and raise
LazyModule.__file__ = None

# examples take what they take on a busy machine
hypothesis.settings.register_profile("no_deadline", deadline=None)
hypothesis.settings.load_profile("no_deadline")


@pytest.fixture(scope="session", autouse=True)
def heed_ctrl_c():
    """Have SIGINT interrupt, here and in what is started: a shell's job in the background is born ignoring it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def torchrun():
    """Return a function that runs a script on two devices, to its end."""

    def run(script, arguments, timeout=300):
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d"]
        command += ["--rdzv_endpoint=127.0.0.1:0", str(script), *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
        # what the ranks said: the launcher's account of it is long, and says nothing of the cause
        assert done.returncode == 0, done.stderr.split("] failed (exitcode")[0][-5000:]

    return run


@pytest.fixture
def make_speech_encoder():
    """Return a function that builds a tiny speech encoder in eval mode, with weights of every kind away from zero."""

    def make(attention="rotary", normalize="utterance", num_layers=2, dropout=0.0, layer_drop=0.0, seed=0, **frontend):
        torch.manual_seed(seed)
        speech_encoder = SpeechEncoder(
            LogMel(normalize=normalize, **frontend),
            ConvSubsampling(d_model=16, channels=(8, 4), dropout=dropout),
            ConformerEncoder(
                d_model=16,
                num_layers=num_layers,
                num_heads=2,
                d_ffn=32,
                kernel_size=7,
                dropout=dropout,
                layer_drop=layer_drop,
                attention=attention,
            ),
        )
        with torch.no_grad():
            for parameter in speech_encoder.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape))
        if normalize == "global":
            speech_encoder.frontend.measure([(torch.randn(2, 16000) * 0.1, None)])
        return speech_encoder.eval()

    return make


@pytest.fixture
def padded_with_junk():
    """Return a function that makes utterances of given lengths and one batch of them, with loud noise as padding."""

    def make(samples, seed=0):
        generator = torch.Generator().manual_seed(seed)
        utterances = [0.1 * torch.randn(count, generator=generator) for count in samples]
        batch = 50.0 * torch.randn(len(samples), max(samples), generator=generator)
        for row, utterance in zip(batch, utterances, strict=True):
            row[: len(utterance)] = utterance
        return utterances, batch, torch.tensor(samples) / max(samples)

    return make


@pytest.fixture
def relative_difference():
    """Return the measure of the project's tolerances: max|a - b| / max|a|."""
    return lambda a, b: float(((a - b).abs().max() / a.abs().max()).detach())


@pytest.fixture(scope="session")
def toy():
    """The module tests/helpers/toy.py."""
    return load_helper("toy")


@pytest.fixture(scope="session")
def absent_gpu():
    """The module tests/helpers/absent_gpu.py."""
    return load_helper("absent_gpu")


@pytest.fixture(scope="session")
def load_script():
    """Return the function that loads a file of the checkout that is no module of the package, from its path."""
    return load_file


def load_helper(name):
    """A module of tests/helpers."""
    return load_file(Path(__file__).parent / "helpers" / f"{name}.py")


def load_file(path):
    """A module, from its path."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def after_forward(monkeypatch):
    """Return a function that has another one called after each ``compute_forward`` of a kind of Brain."""

    def watch(kind, note):
        compute_forward = kind.compute_forward

        def noting(brain, batch, stage):
            outcome = compute_forward(brain, batch, stage)
            note(batch, stage.name, outcome)
            return outcome

        monkeypatch.setattr(kind, "compute_forward", noting)

    return watch
