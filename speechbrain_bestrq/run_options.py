"""Run options of SpeechBrain's that a training does not heed, and numbers that it cannot."""

from collections.abc import Mapping, MutableMapping
from typing import Any

from speechbrain.utils.run_opts import RunOptions

from speechbrain_bestrq.errors import InputError

#: Of a pre-training, whose Brain does in its own way what they are for; what to give instead.
OF_PRETRAINING = {
    "jit": "give --compile",
    "jit_module_keys": "give --compile",
    "compile_module_keys": "--compile takes each layer of the encoder",
    "data_parallel_count": "start it by torchrun",
    "find_unused_parameters": "leave it out",
    "test_only": "sb-bestrq report --evidence measures what it has learned",
    "nonfinite_patience": "set max_skipped_updates in the YAML",
    "skip_nonfinite_grads": "updates that are not finite are skipped in any case",
}
#: Of a task.
OF_TASKS = {
    "jit": "leave it out",
    "jit_module_keys": "leave it out",
    "data_parallel_count": "start it by torchrun",
}


def check_run_options(run_opts: RunOptions, without_effect: Mapping[str, str]) -> None:
    """Refuse run options that would do nothing.

    Arguments
    ---------
    run_opts : RunOptions
        Of the command line.
    without_effect : mapping
        :data:`OF_PRETRAINING` or :data:`OF_TASKS`.

    Raises
    ------
    InputError
        Naming one, and what to do instead; or a mode of compilation that would spoil gradients.

    Example
    -------
    >>> check_run_options(RunOptions.from_dictionary({"jit": True}), OF_PRETRAINING)
    Traceback (most recent call last):
    speechbrain_bestrq.errors.InputError: --jit has no effect here: give --compile.
    """
    for name in sorted(without_effect.keys() & run_opts.overridden_args):
        raise InputError(f"--{name} has no effect here: {without_effect[name]}.")
    if run_opts["compile_mode"] in ("reduce-overhead", "max-autotune"):
        raise InputError(
            f"--compile_mode {run_opts['compile_mode']} keeps gradients in graphs that the next micro-batch writes "
            "over: give max-autotune-no-cudagraphs, or leave it out."
        )


def take_given_interval(hparams: MutableMapping[str, Any], run_opts: RunOptions, overrides: str) -> str:
    """Let an interval of checkpoints on the command line, updates or minutes, take the place of the YAML's other one.

    SpeechBrain refuses both together.

    Arguments
    ---------
    hparams : mutable mapping
        Of the YAML.
    run_opts : RunOptions
        Of the command line.
    overrides : str
        Of the YAML, as the run's copy of it is written with.

    Returns
    -------
    str
        The overrides, with the other interval's 0 where it had to be.

    Example
    -------
    >>> hparams = {"ckpt_interval_steps": 0, "ckpt_interval_minutes": 15}
    >>> take_given_interval(hparams, RunOptions.from_dictionary({"ckpt_interval_steps": 500}), "")
    '\\nckpt_interval_minutes: 0'
    >>> hparams["ckpt_interval_minutes"]
    0
    """
    intervals = ("ckpt_interval_steps", "ckpt_interval_minutes")
    given = [name for name in intervals if name in run_opts.overridden_args and run_opts[name] > 0]
    others = [name for name in intervals if len(given) == 1 and name not in given and hparams.get(name)]
    hparams.update(dict.fromkeys(others, 0))
    return overrides + "".join(f"\n{name}: 0" for name in others)


def check_counts(hparams: MutableMapping[str, Any]) -> None:
    """Refuse counts of updates and of micro-batches that are none, before any work; 2e5 becomes a whole number.

    Arguments
    ---------
    hparams : mutable mapping
        Of the YAML of a pre-training.

    Raises
    ------
    InputError
        Naming one.

    Example
    -------
    >>> hparams = {"optimizer_step_limit": 2e5, "log_interval": 20, "valid_interval": None, "encoder_at_steps": [1e3]}
    >>> check_counts(hparams)
    >>> hparams
    {'optimizer_step_limit': 200000, 'log_interval': 20, 'valid_interval': None, 'encoder_at_steps': [1000]}
    """
    for name in ("optimizer_step_limit", "log_interval", "valid_interval", "grad_accumulation_factor"):
        if hparams.get(name) is not None:
            hparams[name] = whole_number(name, hparams[name])
    steps = hparams["encoder_at_steps"]
    if not isinstance(steps, list):
        raise InputError(f"--encoder_at_steps {steps}: give a list of updates, such as '[1000, 2000]'.")
    hparams["encoder_at_steps"] = [whole_number("encoder_at_steps", step) for step in steps]


def whole_number(name: str, value: Any) -> int:
    """Read a count, of a YAML or as a run option's text.

    Arguments
    ---------
    name : str
        Of the option.
    value : object

    Returns
    -------
    int

    Raises
    ------
    InputError
        If it is none, or less than 1.

    Example
    -------
    >>> whole_number("optimizer_step_limit", "2e5")
    200000
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not number.is_integer() or number < 1:
        raise InputError(f"--{name} {value}: give a whole number, 1 at least.")
    return int(number)
