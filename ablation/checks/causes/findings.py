"""Findings of a check that name the mistake themselves, or nearly: those about hygiene and refusals."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from ablation.checks.causes.histories import History
from ablation.checks.causes.side_effects import PLACES
from ablation.checks.causes.simulation import RIGHT, Attempt, Setting, same_logits, simulated
from ablation.checks.driving import ablate
from ablation.checks.lifecycle import Place

Said = tuple[str, str, str]
"""A check, a pattern in what it found, and the cause of it."""

CLOSED_IN_TURN = (
    "closing one implementation undoes another one on the same model: it restores what it found when it was made, not "
    "only its own change"
)
FAILED_REGISTRATION = (
    "if the registration of a hook fails, those that were registered before remain: keep each handle at once, and "
    "remove them in a `finally`"
)
LEFT_BY_EXCEPTION = "an exception in the forward pass skips the removal of the hooks: use a `finally`"
SAID: tuple[Said, ...] = (
    (
        "locality.input_untouched",
        "captured by a hook before the ablation",
        "z is edited in place: change a copy (`z.clone()`), and return it",
    ),
    (
        "locality.input_untouched",
        "captured by a hook after the projection",
        "the edited z is written into a buffer that another layer or a later run overwrites: make a new tensor instead",
    ),
    (
        "independence.cache_kept",
        "that the cache held",
        "the caller's key/value cache is written to: replace z at the projection",
    ),
    (
        "hygiene.copies",
        "of a copy that was made",
        "a copy of the model carries the hooks and the heads that they ablate: `copy.deepcopy` copies the object that "
        "they refer to",
    ),
    ("hygiene.exception", "while hooks are registered in .* left a hook", FAILED_REGISTRATION),
    ("hygiene.exception", "was swallowed", "an exception of the forward pass is caught, and not raised again"),
    (
        "hygiene.exception",
        "left gradients disabled",
        "gradients stay disabled after an exception: use `with torch.no_grad()`, or a `finally`",
    ),
    ("hygiene.exception", "left a hook", LEFT_BY_EXCEPTION),
    ("hygiene.exception", "the user's .* hooks fired", "after an exception, the user's hooks are removed, too"),
    (
        "hygiene.later_hooks",
        "registered later",
        "the output of the projection is computed again, after the user's hooks",
    ),
    (
        "hygiene.later_hooks",
        "with the user's hooks, after close",
        "`close` removes hooks that the user registered in the meantime: remove hooks by their handles",
    ),
    (
        "hygiene.later_patch",
        "after close",
        "`close` removes or overwrites the `forward` of a projection, although the user has replaced it since",
    ),
    (
        "hygiene.later_patch",
        "that the user replaced later",
        "the `forward` that the user has put in the place of the projection's is not called: another one was kept, or "
        "the output is computed from the weights",
    ),
    ("hygiene.global_state", "^gradient mode", "the gradient mode is set and not restored: use `with torch.no_grad()`"),
    ("hygiene.global_state", "^the default dtype", "torch's default dtype is set, and not restored"),
    (
        "hygiene.global_state",
        "^(torch|numpy|Python)'s random",
        "{0}'s global random number generator is seeded or used",
    ),
    ("hygiene.global_state", "^the table of global hooks", "a hook on all modules of the process remains"),
    ("hygiene.global_state", "^the list of heads", "the caller's list of heads is changed in place"),
    ("hygiene.global_state", "^the (.*) that were passed in", "the caller's {0} are written to in place: clone them"),
    (
        "locality.user_hooks",
        "but head",
        "the user's edit of z is lost: the hook edits a tensor that it captured before the user's hook",
    ),
    (
        "oracle.non_finite",
        r"\bnan\b",
        "z is multiplied by 0 or subtracted from itself, which gives NaN if z is not finite: write the value instead",
    ),
    (
        "masks.non_finite",
        r"\bnan\b",
        "z is multiplied by the mask to leave out the padding, and NaN times 0 is NaN: use `torch.where`",
    ),
    (
        "locality.non_finite",
        "is not finite",
        "the value is computed with a product over all heads, so NaN in another head reaches it: slice the head first",
    ),
    (
        "layouts.low_rank",
        "merged into W_O",
        "the hook is on the layer inside the wrapper, so the adapter beside it still reads the head: hook the wrapper",
    ),
    (
        "locality",
        "was called 0 times",
        "the projection is not called, so no hook on it fires: it is computed from its weights, or a copy of the model "
        "runs",
    ),
    ("refusal.head", "without a reason", "a missing head is refused by an error without a message"),
    (
        "refusal.head",
        "^head too large: [^;]*only after a forward",
        "heads are validated only in the forward pass, not in `ablate`",
    ),
    (
        "refusal.type",
        r"^(?!.*(0\.0|'0')).*(True|False)",
        "True and False are accepted as numbers: they are integers in Python (`isinstance`)",
    ),
    ("refusal.type", r"^(?!.*(True|False|'0')).*0\.0", "a float is accepted as the number of a head or layer"),
    ("refusal.type", r"^(?!.*(True|False|0\.0)).*'0'", "a string is accepted as the number of a head or layer"),
    ("refusal.type", ".", "the types of layers and heads are not checked, or not before the forward pass"),
    (
        "refusal.no_side_effect",
        "so was the valid",
        "a rejected head stays in the list of heads, where the next call of `ablate` finds it",
    ),
)
"""Findings that name the mistake themselves."""


IF_RIGHT = (
    "locality",
    "locality.user_hooks",
    "locality.non_finite",
    "oracle.non_finite",
    "masks.non_finite",
    "layouts.low_rank",
    "hygiene.later_hooks",
    "hygiene.later_patch",
)
"""Checks of a special case: what they find names the mistake only if the ablation is right in an ordinary case."""


def said(history: History, check_id: str, found: str) -> str | None:
    """Return the cause that a finding names itself."""
    if check_id in IF_RIGHT and not _is_right(history):
        return None
    for id, pattern, cause in SAID:
        if id == check_id and (match := re.search(pattern, found)):
            return cause.format(*match.groups())
    return None


def _is_right(history: History) -> bool:
    case, real = history.case, history.inputs["attention_mask"].bool()
    want = simulated(Setting(case, case.model(), history.inputs), RIGHT).logits
    return same_logits(history.fresh(list(case.heads))[real], want)


def after_failure(history: History, found: str) -> str | None:
    """Return the cause if hooks remain at the end of a sequence with an error."""
    failures = [step for step in history.steps if step[0] == "fail"]
    if not failures or "not as it was found" not in found or "_hooks" not in found:
        return None
    return FAILED_REGISTRATION if failures[-1][1] == Place.REGISTERING else LEFT_BY_EXCEPTION


def replaced_in_turn(steps: tuple[tuple[Any, ...], ...]) -> str | None:
    """Return the cause if a second implementation fails after the first one is closed."""
    return CLOSED_IN_TURN if steps and steps[-1][0] in ("replace_implementation", "nest") else None


MISSING = {
    "head negative": "a negative head is accepted: Python counts it from the end, or its slice is empty",
    "head too large": "a head after the last one is accepted: its slice is empty, so nothing is ablated",
    "layer negative": "a negative layer is accepted: Python counts it from the end",
    "layer too large": "a layer after the last one is accepted, and never reached",
}


def accepted_heads(history: History, found: str) -> str | None:
    """Return which missing heads are accepted: if all of them, in which places of the list."""
    accepted = [what for what in MISSING if re.search(rf"{what}: [^;]*was accepted", found)]
    if len(accepted) == 1:
        return MISSING[accepted[0]]
    layer, heads = history.case.heads[0][0], history.case.decoder.num_heads
    good, missing = list(history.case.heads), (layer, heads)
    verdicts = [_is_accepted(history, pairs) for pairs in ([missing], [missing, *good], [*good, missing])]
    if verdicts == [False, True, False]:
        return "only the last head of the list is validated"
    if verdicts == [False, False, True]:
        return "only the first head of the list is validated"
    return "heads are not validated" if all(verdicts) else None


def _is_accepted(history: History, heads: list[tuple[int, int]]) -> bool:
    with Attempt(), history.made() as implementation:
        ablate(implementation, history.case, heads)
        return True
    return False


def accepted_imputations(history: History, found: str) -> str | None:
    """Return how unknown imputations come to be accepted."""
    accepted = set(re.findall(r"imputation (\S+): \[", found))
    if accepted == {"''", "'zer'"}:
        return "the imputation is looked up in a string, where every part of a name is found: a comma may be missing"
    if len(accepted) < 4:
        return None
    real = history.inputs["attention_mask"].bool()
    with history.made() as implementation:
        implementation.ablate(list(history.case.heads), "median")
        got = implementation.run(**history.inputs).detach()[real]
    for name in ("zero", "mean"):
        with history.made() as implementation:
            implementation.ablate(list(history.case.heads), name)
            if same_logits(got, implementation.run(**history.inputs).detach()[real]):
                return f"every unknown imputation is treated as {name}, for example by an `else`"
    return None


def from_finding(history: History, check_id: str, found: str) -> Iterator[str | None]:
    """Yield causes that follow from what a check found."""
    if check_id == "hygiene.exception":
        yield after_failure(history, found)
    if check_id == "hygiene.lifecycle":
        yield replaced_in_turn(history.steps)
    if check_id == "refusal.head":
        if "not as it was found" in found and "_hooks" in found:
            yield "the hooks of the first heads remain if a later head is rejected: validate all heads first"
        elif changed := re.search("not as it was found: (.*?) changed", found):
            names = changed[1].split(", ")
            yield next((text for place, text in PLACES if any(re.search(place, name) for name in names)), None)
        elif "was accepted" in found:
            yield accepted_heads(history, found)
    if check_id == "refusal.imputation":
        yield accepted_imputations(history, found)
    yield said(history, check_id, found)
