"""The one exception that means *the input is at fault, not the program*, and others in one line."""

MESSAGE_LENGTH = 240


class UserError(Exception):
    """Bad input: its message is one line that says what is wrong and what to do.

    The command prints the line and ends with exit status 2; in Python it is an ordinary exception.
    """


def one_line(error: BaseException) -> str:
    """What a library says, which may be a page, or just the key that it did not find."""
    text = " ".join(str(error).split()).rstrip(".")
    if not text or isinstance(error, KeyError):
        text = f"{type(error).__name__} {text}".strip()
    return text if len(text) <= MESSAGE_LENGTH else f"{text[:MESSAGE_LENGTH]}..."
