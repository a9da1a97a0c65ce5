"""Whether the checks can use an adapter at all.

A wrong declaration or signature is reported once, in one line, instead of as a failure of every check.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

from ablation.checks.check import isolated_process_state, offered_imputations, unsupported_features
from ablation.checks.decoders import DTYPES, FAMILIES, Decoder
from ablation.checks.protocol import KEYWORDS, Factory
from ablation.errors import InvalidDeclaration

Call = tuple[str, tuple[str, ...], tuple[str, ...]]
CALLS: tuple[Call, ...] = (
    ("ablate", ("heads", "imputation"), ()),
    ("run", ("input_ids",), ()),
    ("run", ("input_ids",), ("attention_mask",)),
    ("run", (), ("input_ids", "attention_mask", "position_ids", "use_cache")),
    ("clear", (), ()),
    ("close", (), ()),
)
"""The calls that the checks make of any adapter: method, positional arguments, keyword arguments."""


def _calls(factory: Factory) -> list[Call]:
    """Return the calls that the checks make of an adapter."""
    keywords = dict.fromkeys(KEYWORDS[name] for name in offered_imputations(factory) if name in KEYWORDS)
    at = () if "positions" in unsupported_features(factory) else ("positions",)
    needed = [(keyword, *at) for keyword in keywords] or [at] * len(at)
    return [*CALLS, *(("ablate", ("heads", "imputation"), names) for names in needed)]


def adapter_problem(factory: Factory) -> str | None:
    """Return why the checks cannot use an adapter, in one line, or None: a wrong declaration, or a wrong signature."""
    try:
        return signature_problem(factory)
    except InvalidDeclaration as error:
        return str(error)


def signature_problem(factory: Factory) -> str | None:
    """Return the first call that the adapter does not accept, and why, or None if it accepts all calls.

    The function makes an implementation on a small model and closes it, since methods may be attributes of an instance.
    Errors of the implementation are ignored here: the checks report them, each with its case. Raises
    InvalidDeclaration if `unsupported` names something that does not exist.
    """
    unsupported = unsupported_features(factory)
    if inspect.isfunction(factory) and _call_problem(factory, "it", ("model",), ()):
        return (
            "it is a function, not an adapter: make one with adapter_from_context or adapter_from_function of "
            "ablation.checks"
        )
    if problem := _call_problem(factory, "__init__", ("model",), ()):
        return problem
    families = [name for name in FAMILIES if name not in unsupported]
    dtypes = [name for name in DTYPES if name not in unsupported]
    if not families or not dtypes:
        return None
    model = Decoder(families[0], num_layers=1, num_heads=2, head_dim=8, dtype=dtypes[0]).fresh()
    with isolated_process_state(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            implementation = factory(model)
        except KeyboardInterrupt:
            raise
        except BaseException:
            return None
        try:
            return next(filter(None, (_method_problem(implementation, *call) for call in _calls(factory))), None)
        finally:
            try:
                implementation.close()
            except KeyboardInterrupt:
                raise
            except BaseException:  # noqa: S110 (the checks report it)
                pass


def _method_problem(
    implementation: Any, name: str, positional: tuple[str, ...], keywords: tuple[str, ...]
) -> str | None:
    try:
        method = getattr(implementation, name, None)
    except Exception:  # a property; the checks report what it raises
        return None
    if not callable(method):
        return f"the adapter has no method {name}"
    return _call_problem(method, name, positional, keywords)


def _call_problem(
    function: Callable[..., Any], name: str, positional: tuple[str, ...], keywords: tuple[str, ...]
) -> str | None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some callables written in C have no signature
        return None
    try:
        signature.bind(*positional, **dict.fromkeys(keywords))
    except TypeError as error:
        call = ", ".join((*positional, *(f"{keyword}=..." for keyword in keywords)))
        return f"{name} cannot be called as {name}({call}): {error}"
    return None
