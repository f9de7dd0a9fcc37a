"""What can be wrong with a file before anything is made of it."""

from typing import ClassVar


class DamagedFileError(ValueError):
    """Bytes that are not a whole file of their kind: cut short, grown, no JSON, no UTF-8."""

    exit_code: ClassVar[int] = 3


class UnsafeInputError(ValueError):
    """A file that is refused because reading on could do harm.

    It is a pickle or names code, lies outside of its folder, is no regular file, says one thing twice, or asks for
    more memory than a file of its kind can need. Nothing of it was used.
    """

    exit_code: ClassVar[int] = 8
