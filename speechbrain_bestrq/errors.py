"""The errors that are the user's to mend, and the exit statuses of every command."""

import errno

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


#: What the system says no to because of permissions or of a full disk.
_OF_THE_SYSTEM = {
    errno.EACCES: "mend its permissions, or give another",
    errno.EPERM: "mend its permissions, or give another",
    errno.EROFS: "give one that can be written to",
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
}


def name_file(error: OSError, path: object) -> None:
    """Put the name of a file into the error of a full disk, which writing leaves without one.

    Example
    -------
    >>> error = OSError(28, "No space left on device")
    >>> name_file(error, "a.csv")
    >>> explain_refusal(error)
    "'a.csv': No space left on device: make room."
    """
    if error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT):
        error.filename = str(path)


def explain_refusal(error: OSError) -> str | None:
    """Say in one line what a file system refused, if that is the user's to mend.

    Arguments
    ---------
    error : OSError
        That nobody caught.

    Returns
    -------
    str or None
        None for all errors but missing permissions and a full disk, where they name a file.

    Example
    -------
    >>> explain_refusal(PermissionError(13, "Permission denied", "/data/a.flac"))
    "'/data/a.flac': Permission denied: mend its permissions, or give another."
    >>> explain_refusal(FileNotFoundError(2, "No such file or directory", "a"))
    """
    if error.errno not in _OF_THE_SYSTEM or error.filename is None:  # a traceback tells more than a line without a name
        return None
    return f"'{error.filename}': {error.strerror}: {_OF_THE_SYSTEM[error.errno]}."
