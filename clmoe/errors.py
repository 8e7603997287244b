"""The one error that users are meant to see."""


class ClmoeError(Exception):
    """Something the user can mend: the message names the file, row or field, and the fix.

    The command line prints it as one line and exits with code 2.
    """
