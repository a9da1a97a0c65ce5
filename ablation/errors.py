"""Every error that the package raises on purpose. A message says what is wrong and, where needed, what to do."""


class AblationError(Exception):
    """Base of all errors that this package raises on purpose."""


class UnsupportedModel(AblationError, TypeError):
    """The model has no heads that a hook can ablate correctly; the message says why."""


class InvalidHead(AblationError, IndexError):
    """A (layer, head) pair that the model does not have, or that is not a pair of integers."""


class UnknownImputation(AblationError, ValueError):
    """An imputation that is neither a known name nor an `Imputation`."""


class InvalidAblation(AblationError, RuntimeError):
    """An ablation that cannot be run, because of its arguments, the state of the hook, or the state of the model."""


class AblationNotApplied(AblationError, RuntimeError):
    """A forward pass ran, but its receipt does not show that the requested ablation took place."""


class NonFiniteLogits(AblationError, ArithmeticError):
    """A forward pass gave logits that are NaN or infinite, so their argmax means nothing."""


class ModelUnavailable(AblationError, OSError):
    """A model that cannot be loaded: unknown, damaged, not on this machine, or without a package or device it needs."""


class InvalidPrompt(AblationError, ValueError):
    """A prompt or a token that cannot be used as given."""


class InvalidDeclaration(AblationError, ValueError):
    """A declaration that names something that does not exist, or code that no adapter can be made from."""


class InvalidOutput(AblationError, OSError):
    """A folder that cannot take a result: it cannot be written, or holds something that would be lost."""


class InvalidResult(AblationError, OSError, ValueError):
    """A folder without a saved result, or a saved result that is damaged."""


LONGEST_LINE = 500
"""Letters of a message that is shown in one line."""


def one_line(text: object) -> str:
    """Return a text, or an error with its type, as one line; the middle of a long one is left out."""
    lines = (f"{type(text).__name__}: {text}" if isinstance(text, BaseException) else str(text)).splitlines()
    return shortened(" ".join(filter(None, map(str.strip, lines))), LONGEST_LINE)


def shortened(text: str, longest: int) -> str:
    """Return a text without its middle if it has more than `longest` characters."""
    return text if len(text) <= longest else f"{text[: longest // 2]} ... {text[len(text) - longest // 2 :]}"
