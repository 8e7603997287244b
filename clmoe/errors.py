"""The one error that users are meant to see, and the way out when a command is told to stop."""


class ClmoeError(Exception):
    """Something the user can fix: the message names the file, row or field, and the fix.

    The command line prints it as one line and exits with code 2.
    """


class Interrupted(BaseException):
    """The command was told to stop; what is finished is on disk, and the same command continues from there.

    Not an ``Exception``, so that nothing that handles failures takes it for one.
    """
