"""Adapters without a class: the helpers make one from a context manager, or from a function that returns logits.

The helpers pass arguments by name, each only to a parameter of that name. From the signature follows, too, what the
code does not support. A signature that the checks cannot use is refused when the adapter is made.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from ablation.checks.cases import with_factor
from ablation.checks.check import offered_imputations
from ablation.checks.decoders import ALL_FAMILIES
from ablation.checks.protocol import CACHES, DEFAULT_IMPUTATIONS, FROM_REFERENCE
from ablation.errors import InvalidAblation, InvalidDeclaration

FORMS = (("heads",), ("heads_by_layer",), ("layer", "head"))
"""The parameters that name heads: (layer, head) pairs, {layer: [heads]}, or one head. The user's code has one form."""
SETTINGS = ("model", *(name for form in FORMS for name in form), "imputation", "values", "positions")
INPUTS = ("input_ids", "attention_mask", "position_ids", "use_cache", *CACHES)
NEEDED = {
    "padding": ({"attention_mask"}, "it has no parameter `attention_mask`"),
    "position_ids": ({"position_ids"}, "it has no parameter `position_ids`"),
    "cache": (set(CACHES), "it has no parameter for a key/value cache"),
}
"""Feature -> the parameters of a function that the feature needs, one of them, and what to say if it has none."""


class MadeAdapter:
    """Calls the user's code in each run. The helpers make its subclasses.

    code: the user's function. parameters: the names that it takes, of SETTINGS and INPUTS. takes_more: whether it takes
    any other keyword argument. expression: Python that makes the adapter, for messages.
    """

    code: ClassVar[Callable[..., Any]]
    parameters: ClassVar[Mapping[str, inspect.Parameter]]
    takes_more: ClassVar[bool]
    expression: ClassVar[str]
    imputations: ClassVar[tuple[str, ...]]
    families: ClassVar[tuple[str, ...]]
    unsupported: ClassVar[dict[str, str]]

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.ablate([], with_factor(offered_imputations(type(self))[0]))

    def ablate(self, heads: Sequence[tuple[int, int]], imputation: str, **given: Any) -> None:
        """Keep the arguments. The same objects are passed in each run, as by code that calls the function twice."""
        if "head" in self.parameters and len(set(heads)) > 1:
            raise InvalidAblation(f"{type(self).__qualname__} takes one head, not {len(set(heads))}")
        self.settings = {"model": self.model, "heads": list(heads), "imputation": imputation, **given}
        if "heads_by_layer" in self.parameters:
            by_layer: dict[int, list[int]] = {}
            for layer, head in heads:
                by_layer.setdefault(layer, []).append(head)
            self.settings["heads_by_layer"] = by_layer
        self.idle = "head" in self.parameters and not heads
        if "head" in self.parameters and heads:
            self.settings["layer"], self.settings["head"] = heads[0]

    def call(self, inputs: dict[str, Any]) -> Any:
        """Call the user's code with the arguments in force and the inputs of a run."""
        inputs = {**inputs}
        for name in CACHES:
            if name in inputs and (own := [other for other in CACHES if other in self.parameters]):
                inputs[own[0]] = inputs.pop(name)  # the user's code names it as its version of transformers does
        given = {**self.settings, **inputs}
        arguments = {
            name: given.get(name, {} if name == "values" else None)
            for name, parameter in self.parameters.items()
            if name in given or parameter.default is parameter.empty
        }
        if self.takes_more:
            arguments |= {name: value for name, value in inputs.items() if name not in arguments}
        by_place = [
            arguments.pop(name)
            for name, parameter in self.parameters.items()
            if parameter.kind is parameter.POSITIONAL_ONLY and name in arguments
        ]
        return type(self).code(*by_place, **arguments)

    def run(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Tensor:
        """Return the logits, [rows, tokens, vocabulary]. Code for one head is not called if no head is ablated."""
        inputs = {"attention_mask": attention_mask, "use_cache": False} | inputs
        logits: Tensor = self.model(input_ids, **inputs).logits if self.idle else self.logits(input_ids, inputs)
        return logits

    def logits(self, input_ids: Tensor, inputs: dict[str, Any]) -> Tensor:
        """Run the model by the user's code, and return the logits."""
        raise NotImplementedError

    def clear(self) -> None:
        """Name no heads in the following runs."""
        self.ablate([], self.settings["imputation"])

    def close(self) -> None:
        """Do nothing: no run leaves anything behind that this class knows of."""


class ContextAdapter(MadeAdapter):
    """Runs the model inside the user's context manager."""

    def logits(self, input_ids: Tensor, inputs: dict[str, Any]) -> Tensor:
        """Return the logits of the model. Raises RuntimeError if the context manager suppresses an error."""
        logits: Tensor | None = None
        with self.call({"input_ids": input_ids, **inputs}):
            logits = self.model(input_ids, **inputs).logits
        if logits is None:
            raise RuntimeError(f"{type(self).__qualname__} suppressed an error of the model")
        return logits


class FunctionAdapter(MadeAdapter):
    """Returns what the user's function returns."""

    def logits(self, input_ids: Tensor, inputs: dict[str, Any]) -> Tensor:
        """Return the logits of the function. Raises TypeError if it returns none."""
        returned = self.call({"input_ids": input_ids, **inputs})
        logits = getattr(returned, "logits", returned)
        if not isinstance(logits, Tensor) or logits.ndim != 3:
            what = f"a tensor of shape {list(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
            name = type(self).__qualname__
            raise TypeError(f"{name} returned {what}, but should return logits, a tensor [rows, tokens, vocabulary]")
        return logits


def adapter_from_context(
    context: Callable[..., Any],
    *,
    imputations: Sequence[str] | None = None,
    families: Sequence[str] | None = None,
    unsupported: Mapping[str, str] | None = None,
) -> type[ContextAdapter]:
    """Return the adapter class of a context manager, within which the model is ablated.

    context: a function or class that makes a context manager, such as `my_hook(model, heads, imputation)`. It is called
    in each run. Its parameters may be `model`; `heads`, a list of (layer, head) pairs, or `heads_by_layer`,
    {layer: [heads]}, or `layer` and `head`; `imputation`, `values` and `positions` (docs/checking.md); and the names of
    the inputs of a run, such as `attention_mask`. Other parameters need defaults.

    imputations: those that it offers; by default zero, and mean if it has a parameter `imputation`. families: those of
    models that it supports, such as ["gpt2"]; by default all. unsupported: {feature: reason}, in addition to what
    follows from the signature. Raises InvalidDeclaration.
    """
    adapter: type[ContextAdapter] = _adapter(
        ContextAdapter, "adapter_from_context", context, imputations, families, unsupported
    )
    return adapter


def adapter_from_function(
    function: Callable[..., Any],
    *,
    imputations: Sequence[str] | None = None,
    families: Sequence[str] | None = None,
    unsupported: Mapping[str, str] | None = None,
) -> type[FunctionAdapter]:
    """Return the adapter class of a function that runs the model with heads ablated, and returns the logits.

    function: such as `run_ablated(model, input_ids, attention_mask, heads)`. It returns a tensor [rows, tokens,
    vocabulary], or an object with such an attribute `logits`. It may have the parameters of `adapter_from_context`, and
    receives the inputs of the run: `input_ids`, `attention_mask`, `position_ids`, `use_cache`, and a key/value cache,
    `past_key_values` or `cache`. `**inputs` stands for all of these. If it does not take the mask, the positions or the
    cache, the adapter does not support what needs them.

    imputations, families, unsupported: as for `adapter_from_context`. Raises InvalidDeclaration.
    """
    adapter: type[FunctionAdapter] = _adapter(
        FunctionAdapter, "adapter_from_function", function, imputations, families, unsupported
    )
    return adapter


def _adapter(
    base: type[MadeAdapter],
    helper: str,
    code: Callable[..., Any],
    imputations: Sequence[str] | None,
    families: Sequence[str] | None,
    unsupported: Mapping[str, str] | None,
) -> Any:
    name, signature = _name(code), _signature(code)
    shown = f"{name}({', '.join(signature.parameters)})"
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    named = {key: p for key, p in signature.parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    takes_more = base is FunctionAdapter and inspect.Parameter.VAR_KEYWORD in kinds
    if problem := _parameter_problem(named, needs_ids=base is FunctionAdapter and not takes_more):
        raise InvalidDeclaration(f"{shown}: {problem}; pass a function of such parameters that calls yours")
    if not isinstance(unsupported or {}, Mapping):
        raise InvalidDeclaration(f"{shown}: `unsupported` should be a dict, feature: reason")
    given = {"imputations": imputations, "families": families, "unsupported": unsupported}
    arguments = "".join(f", {key}={value!r}" for key, value in given.items() if value is not None)
    adapter: Any = type(
        name,
        (base,),
        {
            "__doc__": f"The adapter of {name}, made by {helper}.",
            "__module__": sys._getframe(2).f_globals.get("__name__"),
            "__qualname__": name,
            "code": staticmethod(code),
            "parameters": {key: parameter for key, parameter in named.items() if key in (*SETTINGS, *INPUTS)},
            "takes_more": takes_more,
            "expression": f"{helper}({name}{arguments})",
            "imputations": DEFAULT_IMPUTATIONS[: 1 + ("imputation" in named)] if imputations is None else imputations,
            "families": ALL_FAMILIES if families is None else families,
            "unsupported": {**_lacking(named, base, takes_more), **(unsupported or {})},
        },
    )
    if "positions" in named:
        adapter.ablate = _ablate_with_positions
    try:
        problem = _imputation_problem(named, offered_imputations(adapter))
    except InvalidDeclaration as error:
        problem = str(error)
    if problem:
        raise InvalidDeclaration(f"{shown}: {problem}")
    return adapter


def _lacking(named: Mapping[str, Any], base: type[MadeAdapter], takes_more: bool) -> dict[str, str]:
    """Return {feature: reason} of what code with these parameters does not support."""
    lacking = {"checkpointing": "the ablation has ended when the backward pass runs the layers again"}
    if "head" in named:
        lacking["multiple_heads"] = "it takes one head, by `layer` and `head`"
    if base is FunctionAdapter:
        if "head" in named:
            lacking["gradients"] = "it is not called without a head, so it does not tell whether it returns gradients"
        if not takes_more:
            lacking |= {feature: reason for feature, (names, reason) in NEEDED.items() if not names & named.keys()}
    return lacking


def _ablate_with_positions(
    self: MadeAdapter,
    heads: Sequence[tuple[int, int]],
    imputation: str,
    *,
    positions: tuple[int, ...] | None = None,
    **given: Any,
) -> None:
    """Ablate at some positions: the parameter tells the checks that the adapter offers them."""
    MadeAdapter.ablate(self, heads, imputation, **given | ({} if positions is None else {"positions": positions}))


def _name(code: Any) -> str:
    """Return the name of the user's code, as messages give it."""
    while isinstance(code, partial):
        code = code.func
    name = getattr(code, "__qualname__", type(code).__qualname__)
    return str(name).rpartition("<locals>.")[2]


def _signature(code: Any) -> inspect.Signature:
    """Return the signature of the user's code. Raises InvalidDeclaration if it is not what the helpers take."""
    name = _name(code)
    if hasattr(code, "__enter__") and not isinstance(code, type):
        raise InvalidDeclaration(f"{name} is one context manager: pass the function that makes it, without calling it")
    if not callable(code):
        raise InvalidDeclaration(f"{code!r} is no function")
    if inspect.isgeneratorfunction(code):
        raise InvalidDeclaration(f"{name} is a generator: decorate it with contextlib.contextmanager")
    wrapped = inspect.unwrap(code)
    if inspect.iscoroutinefunction(wrapped) or inspect.isasyncgenfunction(wrapped):
        raise InvalidDeclaration(f"{name} is asynchronous, and the checks call functions that are not")
    try:
        return inspect.signature(code)
    except (TypeError, ValueError):
        raise InvalidDeclaration(f"{name} has no signature: pass a function that calls it") from None


def _parameter_problem(parameters: Mapping[str, inspect.Parameter], needs_ids: bool) -> str | None:
    """Return why the checks cannot pass arguments to these parameters, or None."""
    known = (*SETTINGS, *INPUTS)
    if unknown := [key for key, p in parameters.items() if key not in known and p.default is p.empty]:
        return f"the checks know no {unknown[0]!r}, but {', '.join(known)}"
    if "model" not in parameters:
        return "it has no parameter 'model', and each check uses models of its own"
    if needs_ids and "input_ids" not in parameters:
        return "it has no parameter 'input_ids', and each check uses prompts of its own"
    forms = [form for form in FORMS if any(name in parameters for name in form)]
    if len(forms) != 1 or any(name not in parameters for name in forms[0]):
        return "it should receive heads as 'heads', or as 'heads_by_layer', or as 'layer' and 'head'"
    return None


def _imputation_problem(parameters: Mapping[str, inspect.Parameter], offered: Sequence[str]) -> str | None:
    """Return why a function with these parameters cannot offer these imputations, or None."""
    if not offered:
        return "it offers no imputation"
    if "imputation" not in parameters and len(offered) > 1:
        return f"it has no parameter 'imputation', so it offers one imputation, not {', '.join(offered)}"
    if "imputation" not in parameters and "scale" in offered:
        return "it has no parameter 'imputation', by which it would receive the factor of 'scale'"
    if "values" in offered and "values" not in parameters:
        return "it has no parameter 'values', which the imputation 'values' needs"
    if needing := [name for name in offered if name in FROM_REFERENCE]:
        return f"{needing[0]!r} needs a run of the model on a reference, in `ablate`: write the adapter as a class"
    return None
