"""Encoders from SpeechBrain's own BEST-RQ runs, and to its inference interface."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from speechbrain.utils.fetching import FetchConfig, FetchSource, LocalStrategy, fetch
from speechbrain.utils.parameter_transfer import Pretrainer
from torch import Tensor, nn

from speechbrain_bestrq.artefact import (
    CARD_FILE,
    CONFIG_FILE,
    WEIGHTS_FILE,
    build_encoder,
    encoder_config,
    load_encoder,
    save_encoder,
)
from speechbrain_bestrq.encoder import SpeechEncoder
from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.safe_reading import file_inside, read_card, read_json
from speechbrain_bestrq.sources import find_encoder
from speechbrain_bestrq.speechbrain_checkpoint import (
    HPARAMS_FILE,
    find_checkpoint,
    find_hyperparameters,
    read_speechbrain_checkpoint,
)


class ExportedEncoder(nn.Module):
    """An encoder for ``speechbrain.inference.encoders.WaveformEncoder``, which builds it from YAML.

    Arguments
    ---------
    config : dict
        Of the encoder's ``config.json``.

    Example
    -------
    >>> import torch
    >>> from speechbrain_bestrq import ConformerEncoder, ConvSubsampling, LogMel, SpeechEncoder
    >>> speech_encoder = SpeechEncoder(
    ...     LogMel(normalize="utterance"),
    ...     ConvSubsampling(d_model=16),
    ...     ConformerEncoder(16, num_layers=1, num_heads=2, d_ffn=32),
    ... )
    >>> exported = ExportedEncoder(encoder_config(speech_encoder)).eval()
    >>> exported(torch.randn(2, 16000), torch.tensor([1.0, 0.5]))["embeddings"].shape
    torch.Size([2, 25, 16])
    """

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.speech_encoder = build_encoder(config)

    def load(self, path: str | os.PathLike) -> None:
        """Load the weights.

        Arguments
        ---------
        path : str or Path
            A safetensors file.

        Raises
        ------
        InputError
            If it is missing or does not fit.
        """
        try:
            self.speech_encoder.load_state_dict(load_file(path))
        except (RuntimeError, OSError, ValueError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{path} does not fit {HPARAMS_FILE} ({reason}): copy the folder again.") from error

    def forward(self, wavs: Tensor, wav_lens: Tensor | None = None) -> dict[str, Tensor]:
        """Encode waveforms.

        Arguments
        ---------
        wavs : Tensor
            In [-1, 1], shape (B, N).
        wav_lens : Tensor, optional
            Relative lengths, shape (B,); None when nothing is padded.

        Returns
        -------
        dict
            "embeddings", the last hidden states, shape (B, T, d_model), and "lengths",
            their frames, shape (B,). SpeechBrain's ``encode_file`` takes the first.
        """
        features = self.speech_encoder.frontend(wavs, wav_lens)
        last, lengths = self.speech_encoder.encode(*features, all_states=False)
        return {"embeddings": last, "lengths": lengths}


class EncoderPretrainer(Pretrainer):
    """Fetches and loads an :class:`ExportedEncoder`'s weights where its YAML came from.

    SpeechBrain's own looks for a pickle beside the YAML (``encoder.ckpt``), or for a
    fixed path; this one for ``model.safetensors``, so that the folder can be moved.

    Example
    -------
    >>> EncoderPretrainer(loadables={}).collect_files(default_source="a/folder")
    {}
    """

    def collect_files(
        self,
        default_source: str | os.PathLike | FetchSource | None = None,
        local_strategy: LocalStrategy = LocalStrategy.SYMLINK,
        fetch_config: FetchConfig | None = None,
    ) -> dict[str, Path]:
        """Fetch the weights from the source of the YAML, a folder or a hub id."""
        for name in self.loadables:
            source = default_source if isinstance(default_source, FetchSource) else str(default_source)
            path = fetch(
                WEIGHTS_FILE,
                source,
                savedir=self.collect_in,
                local_strategy=local_strategy,
                fetch_config=fetch_config or FetchConfig(),
            )
            self.paths[name] = str(path)
        return {name: Path(self.paths[name]) for name in self.loadables}

    def load_collected(self) -> None:
        """Load what was fetched."""
        for name, exported in self.loadables.items():
            exported.load(self.paths[name])


def from_speechbrain(
    checkpoint: str | os.PathLike, out: str | os.PathLike, hparams: str | os.PathLike | None = None
) -> dict[str, Any]:
    """Make an encoder folder of a checkpoint of SpeechBrain's BEST-RQ recipe.

    Arguments
    ---------
    checkpoint : str or Path
        A ``CKPT+...`` folder, or a folder that has some, itself or in ``save/``: then
        the newest.
    out : str or Path
        The encoder folder, new or empty.
    hparams : str or Path, optional
        The run's ``hyperparams.yaml``, if it is not where the run wrote it.

    Returns
    -------
    dict
        Plain JSON: "encoder" (the folder), "checkpoint", "hyperparams", "parameters",
        "config".

    Raises
    ------
    InputError
        If a file is missing, of another kind of model, or has no counterpart here; or
        if ``out`` holds anything.

    Example
    -------
    >>> from_speechbrain("/nowhere", "encoder")
    Traceback (most recent call last):
    speechbrain_bestrq.errors.InputError: /nowhere does not exist: give a CKPT+... folder of a SpeechBrain run.
    """
    out = _check_out(out)
    checkpoint = find_checkpoint(checkpoint)
    hparams = Path(hparams) if hparams is not None else find_hyperparameters(checkpoint)
    speech_encoder = read_speechbrain_checkpoint(checkpoint, hparams)
    parameters = sum(parameter.numel() for parameter in speech_encoder.parameters())
    config = encoder_config(speech_encoder)
    with _new_folder(out) as folder:
        card = _converted_card(checkpoint.name, config, parameters)
        save_encoder(speech_encoder, folder, card, model="BEST-RQ of SpeechBrain", checkpoint=checkpoint.name)
    return {
        "encoder": str(out),
        "checkpoint": str(checkpoint),
        "hyperparams": str(hparams),
        "parameters": parameters,
        "config": config,
    }


def to_speechbrain(source: str | os.PathLike, out: str | os.PathLike) -> dict[str, Any]:
    """Make a folder that SpeechBrain's ``WaveformEncoder.from_hparams`` loads.

    It is an encoder folder with a ``hyperparams.yaml``: other uses of an encoder folder
    remain. It can be moved, or put on a hub.

    Arguments
    ---------
    source : str or Path
        An encoder folder, the output folder of a pre-training run, or a hub id.
    out : str or Path
        The folder, new or empty.

    Returns
    -------
    dict
        Plain JSON: "folder", "source", "parameters".

    Raises
    ------
    InputError
        If ``source`` is no encoder or ``out`` holds anything.

    Example
    -------
    >>> to_speechbrain("/none", "exported")
    Traceback (most recent call last):
    speechbrain_bestrq.errors.InputError: /none is no folder: give an encoder folder, a run's output folder or a hub id.
    """
    out, source = _check_out(out), find_encoder(source)
    speech_encoder = load_encoder(source)
    facts = read_json(source / CONFIG_FILE).get("training")
    text = "# Speech encoder\n"
    if (source / CARD_FILE).is_file():  # a link that leaves the folder is refused: this text is made to be published
        text = read_card(file_inside(source, CARD_FILE))
    with _new_folder(out) as folder:
        facts = facts if isinstance(facts, dict) else {}
        facts = {name: value for name, value in facts.items() if name not in _NO_FACTS}
        save_encoder(speech_encoder, folder, text.rstrip() + _SPEECHBRAIN_USE, **facts)
        (folder / HPARAMS_FILE).write_text(_hyperparameters(speech_encoder), encoding="utf-8")
    parameters = sum(parameter.numel() for parameter in speech_encoder.parameters())
    return {"folder": str(out), "source": str(source), "parameters": parameters}


def _check_out(out: str | os.PathLike) -> Path:
    out = Path(out)
    if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{out} exists and is not an empty folder: nothing is overwritten; give another OUT.")
    if out.resolve() == Path.cwd().resolve():
        raise InputError(f"{out} is the folder that you are in: give a new one as OUT.")
    return out.resolve()  # of a link to an empty folder, that folder


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A path beside ``out`` to write a folder at, which becomes ``out`` once it is whole."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise InputError(f"{out.parent} cannot be written to ({error.strerror}): give another OUT.") from error
    try:
        yield beside / "folder"
        try:
            (beside / "folder").rename(out)  # an empty folder of that name is replaced
        except OSError as error:
            raise InputError(f"{out} cannot be written ({error.strerror}): give another OUT.") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _hyperparameters(speech_encoder: SpeechEncoder) -> str:
    """The YAML for ``from_hparams``."""
    described = yaml.safe_dump(encoder_config(speech_encoder), sort_keys=False)
    indented = "".join(f"        {line}\n" for line in described.splitlines())
    return f"""\
# Written by sb-bestrq export. To load it (the package speechbrain_bestrq has to be installed):
#     from speechbrain.inference.encoders import WaveformEncoder
#     encoder = WaveformEncoder.from_hparams(source="path/to/this/folder")

sample_rate: {speech_encoder.frontend.sample_rate}

encoder: !new:speechbrain_bestrq.export.ExportedEncoder
    config:
{indented}
audio_normalizer: !new:speechbrain.dataio.preprocess.AudioNormalizer
    sample_rate: !ref <sample_rate>

modules:
    encoder: !ref <encoder>

pretrainer: !new:speechbrain_bestrq.export.EncoderPretrainer
    loadables:
        encoder: !ref <encoder>
"""


#: Names that a stranger's folder may give its facts, and that are arguments of what writes them.
_NO_FACTS = ("speech_encoder", "folder", "card")
_SPEECHBRAIN_USE = """

## In SpeechBrain

With `speechbrain_bestrq` installed:

```python
from speechbrain.inference.encoders import WaveformEncoder

encoder = WaveformEncoder.from_hparams(source="path/to/this/folder")
embeddings = encoder.encode_file("speech.wav")  # (1, frames, d_model), any sample rate
encoded = encoder.encode_batch(wavs, wav_lens)  # encoded["embeddings"], and encoded["lengths"] in frames
```
"""


def _converted_card(checkpoint: str, config: dict[str, Any], parameters: int) -> str:
    """The README of a converted encoder."""
    frontend, encoder = config["frontend"], config["encoder"]
    return f"""\
# Speech encoder converted from SpeechBrain's BEST-RQ

{frontend["sample_rate"]} Hz waveforms in, hidden states of every layer out, one for each 4 feature frames of
{frontend["hop_ms"]} ms. `config.json` has the architecture, `model.safetensors` the weights; loading them runs no code.

```python
from speechbrain_bestrq import load_encoder

hidden, lengths = load_encoder("path/to/this/folder")(wavs, wav_lens)  # (layers + 1, batch, frames, d_model)
```

| | |
|---|---|
| checkpoint | {checkpoint} |
| parameters | {parameters} |
| encoder | {encoder["num_layers"]} layers, d_model {encoder["d_model"]}, {encoder["num_heads"]} heads, \
{encoder["attention"]} attention, {encoder["activation"]} |
| normalisation | {frontend["normalize"]} |

On unpadded waveforms the output is that of SpeechBrain's `Fbank`, `InputNormalization`, `ConvolutionFrontEnd` and
`TransformerASR.encode` with this checkpoint. In a padded batch no utterance depends on the others, which it does there.
"""
