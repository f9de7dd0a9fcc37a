"""A prompt loop over one running text."""

from __future__ import annotations

from collections.abc import Callable

from stackwise.inference.settings import GenerationSettings
from stackwise.inference.text import Codec, Completion, complete
from stackwise.model.rack import Rack


class ChatSession:
    """A conversation with a language model that was not trained to converse: one text, written in turns.

    Every line of the user is added to the running text, and the model continues it. What no longer fits into the
    model's context is forgotten from the front.
    """

    def __init__(self, rack: Rack, tokenizer: Codec, settings: GenerationSettings | None = None) -> None:
        self.rack, self.tokenizer = rack, tokenizer
        self.settings = settings or GenerationSettings()
        self.text = ""
        """All turns so far."""
        self.turns = 0

    def say(self, line: str, stream: Callable[[str], object] | None = None) -> Completion:
        """Add a line of the user and continue. `stream` receives the reply piece by piece.

        Each turn has a seed of its own, counted up from `settings.seed`. A turn that raises or is interrupted
        leaves the text as it was before.
        """
        if self.text and not self.text.endswith("\n"):
            line = "\n" + line
        text = f"{self.text}{line}\n"
        settings = self.settings.model_copy(update={"seed": self.settings.seed + self.turns})
        reply = complete(self.rack, self.tokenizer, text, settings, stream)
        self.text = text + reply.text
        self.turns += 1
        return reply

    def loop(self, read: Callable[[], str], write: Callable[[str], object]) -> None:
        """Turn after turn, until `read` raises EOFError or Ctrl-C is pressed, in a reply as well.

        A ValueError of a turn, such as a character the tokenizer does not know, is written and the loop goes on.
        """
        try:
            while True:
                line = read()
                if not line:
                    continue
                try:
                    self.say(line, write)
                except ValueError as error:
                    write(str(error))
                write("\n")
        except (EOFError, KeyboardInterrupt):
            write("\n")
