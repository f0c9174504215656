"""The README of an encoder folder: what it was trained on, for how long, and how it went."""

from collections.abc import Sequence
from typing import Any


def write_card(facts: dict[str, Any], validations: Sequence[dict[str, Any]]) -> str:
    """Write the card of an encoder.

    Arguments
    ---------
    facts : dict
        Of the run and the step: "model", "corpus", "train_hours", "train_utterances",
        "step", "audio_hours", "device_hours", "device", "world_size", "precision",
        "parameters", "seed", "command".
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
    lines = [
        f"# Speech encoder pre-trained by {facts['model']} on {facts['corpus']}",
        "",
        "16 kHz waveforms in, hidden states of every layer out, 25 a second. `config.json` has the architecture,",
        "`model.safetensors` the weights and the front end's statistics; loading them runs no code.",
        "",
        "```python",
        "from speechbrain_bestrq.pretrained import load_encoder",
        "",
        'hidden, lengths = load_encoder("path/to/this/folder")(wavs, wav_lens)  # (layers + 1, batch, frames, d_model)',
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
        lines += [
            "## Validation",
            "",
            "Gain: the unigram cross-entropy of the set's own labels minus the loss, nats.",
            "",
            "| updates | audio-hours | loss | gain | accuracy | commonest label |",
            "|---|---|---|---|---|---|",
        ]
        # a card shows the course, not every epoch of a long run
        shown = validations[:: -(-len(validations) // 40)]
        if shown[-1] is not validations[-1]:
            shown = [*shown, validations[-1]]
        columns = (("step", "d"), ("audio_hours", ".1f"), ("loss", ".3f"), ("gain", ".3f"))
        columns += (("accuracy", ".4f"), ("commonest_share", ".4f"))
        for line in shown:  # a value that was not finite is null in the log
            cells = ["-" if line[name] is None else format(line[name], form) for name, form in columns]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)
