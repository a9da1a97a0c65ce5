"""Every error that the package raises on purpose. All say what is wrong and what to do about it."""


class AblationError(Exception):
    """Base of all errors below."""


class UnsupportedModel(AblationError, TypeError):
    """The model has no heads that can be ablated honestly; the message says why."""


class InvalidHead(AblationError, IndexError):
    """A (layer, head) pair that the model does not have, or that is not a pair of integers."""


class UnknownImputation(AblationError, ValueError):
    """An imputation that is neither a known name nor an `Imputation`."""


class InvalidAblation(AblationError, RuntimeError):
    """The ablation cannot be carried out in this state of the hook or of the model."""


class AblationNotApplied(AblationError, RuntimeError):
    """A forward ran, but the ablation that it should have carried did not take place as asked."""


class NonFiniteLogits(AblationError, ArithmeticError):
    """A forward gave NaN or infinite logits: their argmax means nothing."""


class ModelUnavailable(AblationError, OSError):
    """A model cannot be loaded: unknown, not on this machine, or damaged."""


class InvalidPrompt(AblationError, ValueError):
    """A prompt or a token that cannot be used as it stands."""
