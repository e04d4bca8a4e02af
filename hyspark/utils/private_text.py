"""Texts with private parts: names of files and what headers say. The terminal shows them, records of data sets do not.

Private parts lie between Unicode's isolates, so that they are recognised wherever the text was composed.
"""

import re

START, END = "\u2068", "\u2069"
REMOVED = "[...]"
"""What stands for a private part."""


class PrivateError(ValueError):
    """An error whose text has private parts.

    Attributes:
        text: the message with marked private parts; that of the error itself has no marks.
    """

    def __init__(self, text: str) -> None:
        super().__init__(shown(text))
        self.text = text


def private(text: object) -> str:
    """Mark a text as private."""
    return f"{START}{shown(str(text))}{END}"


def shown(text: str) -> str:
    """Remove the marks of private parts, for the terminal."""
    return text.replace(START, "").replace(END, "")


def without_private(text: str) -> str:
    """Replace private parts, for a record."""
    return re.sub(f"{START}[^{END}]*{END}", REMOVED, text)
