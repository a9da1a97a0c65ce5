"""Chapter 5, masks: an attention mask means the same in every form, and hidden tokens have no influence."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ablation.checks.assertions import assert_close
from ablation.checks.cases import Case, CaseSpec, token_positions
from ablation.checks.check import check, unsupported_features
from ablation.checks.driving import ablate, made, run
from ablation.checks.observe import WITH_VALUE_PROJECTION
from ablation.checks.protocol import FROM_REFERENCE, Factory
from ablation.heads import find_heads

MASK_DTYPES = (torch.bool, torch.int32, torch.int8, torch.float32)
PLACES = {"before": (2, 0, 0), "between": (0, 2, 0), "after": (0, 0, 2), "before, between and after": (1, 1, 1)}
"""Where hidden tokens go: how many before the row, after its first token, and after the row."""


@check(
    "masks.dtype",
    "The dtype of an attention mask (bool, int8, int32, int64 or float32) changes the logits only by rounding.",
    cases=CaseSpec(max_rows=3, ragged=True, max_heads=2, dtypes=("float32",)),
    needs=("batch", "padding"),
)
def dtype(factory: Factory, case: Case) -> None:
    inputs = case.inputs()
    real = inputs["attention_mask"].bool()
    with made(factory, case.model()) as implementation:
        ablate(implementation, case)
        want = implementation.run(**inputs).clone()
        for kind in MASK_DTYPES:
            got = implementation.run(**inputs | {"attention_mask": inputs["attention_mask"].to(kind)})
            assert_close(got[real], want[real], f"the logits with an attention mask of {kind}, against int64")


@check(
    "masks.single_row",
    "The logits of a row change only by rounding if a mask of ones is given, or if tokens that the mask hides are put "
    "before, between or after the row's own tokens.",
    cases=CaseSpec(without=("resample",), max_heads=2, min_tokens=2),
    needs=("padding",),
)
def single_row(factory: Factory, case: Case) -> None:
    with made(factory, case.model()) as implementation:
        ablate(implementation, case)
        alone = implementation.run(case.tensor(*case.rows)).clone()
        for what, inputs in forms_of_row(case, "position_ids" not in unsupported_features(factory)):
            real = inputs["attention_mask"].bool()
            got = implementation.run(**inputs)
            assert_close(got[real], alone[0], f"the logits of one row {what}, against a run without a mask")


def forms_of_row(case: Case, takes_positions: bool = True) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the row of a case in other forms: what is added, and the inputs, with positions that count real tokens.

    takes_positions: whether the implementation passes `position_ids` on; if not, tokens are only added after the row.
    """
    (row,) = case.rows
    yield "with a mask of ones", case.inputs()
    for name, (before, between, after) in PLACES.items():
        if not takes_positions and before + between:
            continue
        hidden = [(token + 5) % case.decoder.vocabulary for token in row]
        ids = [*hidden[:before], row[0], *hidden[:between], *row[1:], *hidden[:after]]
        mask = case.tensor([*[0] * before, 1, *[0] * between, *[1] * (len(row) - 1), *[0] * after])
        yield (
            f"with hidden tokens {name}",
            {
                "input_ids": case.tensor(ids),
                "attention_mask": mask,
                "position_ids": token_positions(mask),
                "use_cache": False,
            },
        )


@check(
    "masks.empty_row",
    "A row that consists of padding changes the logits of the other rows only by rounding.",
    cases=CaseSpec(without=("resample",), max_rows=3, ragged=True, max_heads=2, dtypes=("float32",)),
    needs=("batch", "padding"),
)
def empty_row(factory: Factory, case: Case) -> None:
    inputs = case.inputs()
    real = inputs["attention_mask"].bool()

    with made(factory, case.model()) as implementation:
        ablate(implementation, case)
        want = implementation.run(**inputs).clone()
        for first in (True, False):
            logits = implementation.run(**{name: with_empty_row(given, first) for name, given in inputs.items()})
            got = logits[1:] if first else logits[:-1]
            what = f"the logits of the other rows, with a row of padding only {'before' if first else 'after'} them"
            assert_close(got[real], want[real], what)


def with_empty_row(given: Any, first: bool) -> Any:
    """Return an input with one more row, of zeros, before or after the others; a flag as it is."""
    if not isinstance(given, Tensor):
        return given
    empty = torch.zeros_like(given[:1])
    return torch.cat([empty, given] if first else [given, empty])


@check(
    "masks.non_finite",
    "NaN in the z of padding changes the logits of real tokens only by rounding.",
    cases=CaseSpec(
        without=FROM_REFERENCE,  # whose batches may have other padding
        families=WITH_VALUE_PROJECTION,
        max_rows=3,
        ragged=True,
        dtypes=("float32",),
    ),
    needs=("batch", "padding", "observable", "non_finite"),
)
def non_finite(factory: Factory, case: Case) -> None:
    """Queries of padding become NaN in the last layer, above which tokens do not see each other."""
    inputs, model = case.inputs(), case.model()
    real = inputs["attention_mask"].bool()
    last = find_heads(model).layers[-1]
    case = replace(case, heads=((last.index, case.heads[0][1]),))
    with made(factory, model) as implementation:
        ablate(implementation, case)
        want = implementation.run(**inputs).clone()

    def spoil(module: Any, args: Any, out: Tensor) -> Tensor:
        return out.masked_fill(~real[..., None], float("nan"))

    last.block.get_submodule("self_attn.q_proj").register_forward_hook(spoil)
    assert_close(run(model, inputs)[real], run(case.model(), inputs)[real], "the logits of the model itself")
    with made(factory, model) as implementation:
        ablate(implementation, case)
        got = implementation.run(**inputs)
    assert_close(got[real], want[real], "the logits of real tokens, with NaN in the z of padding")
