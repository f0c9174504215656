"""The error that is the user's to mend, and the exit statuses of every command."""

#: Exit status after an :class:`InputError`, and after an interruption.
USER_ERROR, INTERRUPTED = 2, 130
#: Exit status of a run that ended in order before it was done (EX_TEMPFAIL): the same command goes on with it.
START_AGAIN = 75
#: Exit status of a rank that has lost another one.
LOST_RANK = 1


class InputError(ValueError):
    """Something given by the user cannot be used.

    The message is one line: it names the file, the folder or the key, says what
    is wrong with it, and what to do. Command lines print it without a traceback.

    Example
    -------
    >>> raise InputError("data_folder '/nowhere' does not exist: give the path of your corpus.")
    Traceback (most recent call last):
    speechbrain_bestrq.errors.InputError: data_folder '/nowhere' does not exist: give the path of your corpus.
    """
