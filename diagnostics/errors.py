"""The one exception that means *the input is at fault, not the program*."""


class UserError(Exception):
    """Bad input: its message is one line that says what is wrong and what to do.

    The command prints the line and ends with exit status 2; in Python it is an ordinary exception.
    """
