"""The README of an encoder folder: what it was trained on, for how long, and how it went."""

from collections.abc import Sequence
from typing import Any

_COLUMNS = (
    ("updates", "step", "d"),
    ("audio-hours", "audio_hours", ".1f"),
    ("loss", "loss", ".3f"),
)
#: Of models that predict labels: title, name in the log, format.
_GAIN_COLUMNS = (
    *_COLUMNS,
    ("gain", "gain", ".3f"),
    ("accuracy", "accuracy", ".4f"),
    ("commonest label", "commonest_share", ".4f"),
)
_GAIN_NOTE = "Gain: the unigram cross-entropy of the set's own labels minus the loss, nats."
#: Of models that learn their codes.
_CODE_COLUMNS = (
    *_COLUMNS,
    ("information", "information", ".3f"),
    ("accuracy", "accuracy", ".4f"),
    ("code perplexity", "code_perplexity", ".1f"),
    ("probability perplexity", "probability_perplexity", ".1f"),
)
_CODE_NOTE = (
    "Information: what predictions tell of their targets, nats. Perplexities: of the codes chosen, and of their mean "
    "probabilities."
)


def write_card(facts: dict[str, Any], validations: Sequence[dict[str, Any]]) -> str:
    """Write the card of an encoder.

    Arguments
    ---------
    facts : dict
        Of the run and the step: "model", "corpus", "train_hours", "train_utterances",
        "step", "audio_hours", "device_hours", "device", "world_size", "precision",
        "parameters", "seed", "command"; "frames_per_second" of the encoder, 25 if left out.
    validations : sequence of dict
        The validation lines of the log, in order.

    Returns
    -------
    str
        Markdown.

    Example
    -------
    >>> facts = dict(
    ...     model="BestRQ", corpus="LibriSpeech", train_hours=960.0, train_utterances=281241, step=1000,
    ...     audio_hours=2000.0, device_hours=1.5, device="NVIDIA H200", world_size=1, precision="bf16",
    ...     parameters=90033888, seed=1000, command="python train.py hparams/bestrq.yaml",
    ... )
    >>> print(write_card(facts, []).splitlines()[0])
    # Speech encoder pre-trained by BestRQ on LibriSpeech
    """
    rate, kilohertz = facts.get("frames_per_second", 25), facts.get("sample_rate", 16000) / 1000
    lines = [
        f"# Speech encoder pre-trained by {facts['model']} on {facts['corpus']}",
        "",
        f"{kilohertz:g} kHz waveforms in, hidden states of every layer out, {rate:g} a second. `config.json` has the",
        "architecture, `model.safetensors` the weights and the front end's statistics; loading them runs no code.",
        "",
        "```python",
        "from speechbrain_bestrq import PretrainedEncoder",
        "",
        'encoder = PretrainedEncoder("path/to/this/folder", freeze=True, output_all_hiddens=True)',
        "hidden = encoder(wavs, wav_lens)  # (layers + 1, batch, frames, d_model)",
        "```",
        "",
        "| | |",
        "|---|---|",
        f"| data | {facts['corpus']}: {facts['train_hours']:.1f} h, {facts['train_utterances']} utterances |",
        f"| updates | {facts['step']} |",
        f"| audio seen | {facts['audio_hours']:.1f} h |",
        f"| cost | {facts['device_hours']:.2f} device-hours on {facts['world_size']} x {facts['device']}, "
        f"{facts['precision']} |",
        f"| parameters in pre-training | {facts['parameters']} |",
        f"| seed | {facts['seed']} |",
        f"| command | `{facts['command']}` |",
        "",
    ]
    if validations:
        predicts = "gain" in validations[-1]
        columns, note = (_GAIN_COLUMNS, _GAIN_NOTE) if predicts else (_CODE_COLUMNS, _CODE_NOTE)
        lines += ["## Validation", "", note, ""]
        lines += [f"| {' | '.join(title for title, _, _ in columns)} |", "|---" * len(columns) + "|"]
        # a card shows the course, not every epoch of a long run
        shown = validations[:: -(-len(validations) // 40)]
        if shown[-1] is not validations[-1]:
            shown = [*shown, validations[-1]]
        for line in shown:  # a value that was not finite is null in the log, and one of before may not be there
            cells = ["-" if line.get(name) is None else format(line[name], form) for _, name, form in columns]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)
