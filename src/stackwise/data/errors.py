"""Errors about text, tokenizers and prepared corpora."""


class DataError(ValueError):
    """Text, a tokenizer or a setting about them that cannot be used.

    `message` says what is wrong, `where` names the file and the place in it (`notes.jsonl:3`,
    `book.txt: byte 17`; empty when no file is concerned), `hint` is the way out.
    """

    def __init__(self, message: str, *, where: str = "", hint: str = "") -> None:
        self.message = message
        self.where = where
        self.hint = hint
        super().__init__(message)

    def __str__(self) -> str:
        text = f"{self.where}: {self.message}" if self.where else self.message
        return f"{text}; {self.hint}" if self.hint else text


class DamagedDataError(DataError):
    """A file whose bytes are broken: invalid UTF-8, broken JSON, a shard of the wrong size."""
