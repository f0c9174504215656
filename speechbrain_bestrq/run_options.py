"""Run options of SpeechBrain's that a pre-training does not heed."""

from speechbrain.utils.run_opts import RunOptions

from speechbrain_bestrq.errors import InputError

#: They are for what the Brain of pre-training does in its own way; what to give instead.
WITHOUT_EFFECT = {
    "jit": "give --compile",
    "jit_module_keys": "give --compile",
    "compile_module_keys": "--compile takes each layer of the encoder",
    "data_parallel_backend": "start it by torchrun",
    "data_parallel_count": "start it by torchrun",
    "find_unused_parameters": "leave it out",
    "nonfinite_patience": "set max_skipped_updates in the YAML",
    "skip_nonfinite_grads": "updates that are not finite are skipped in any case",
}


def check_run_options(run_opts: RunOptions) -> None:
    """Refuse run options that would do nothing.

    Arguments
    ---------
    run_opts : RunOptions
        Of the command line.

    Raises
    ------
    InputError
        Naming one, and what to do instead.

    Example
    -------
    >>> check_run_options(RunOptions.from_dictionary({"jit": True}))
    Traceback (most recent call last):
    speechbrain_bestrq.errors.InputError: --jit has no effect on a pre-training: give --compile.
    """
    for name in sorted(WITHOUT_EFFECT.keys() & run_opts.overridden_args):
        raise InputError(f"--{name} has no effect on a pre-training: {WITHOUT_EFFECT[name]}.")
