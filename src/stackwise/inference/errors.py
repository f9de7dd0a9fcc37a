"""What a model cannot be asked."""


class AskedError(ValueError):
    """A text or an option that the model or the sampler has no use for; the message holds the way out."""

    exit_code = 2
