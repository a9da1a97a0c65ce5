"""Invented results, for tests of what is made of a result. Does not import torch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ablation.results import METRICS, RECEIPTS, AblationKey, PromptRecord, Result

WORDS = [" Germany", " the", " France"]
"""The texts of all tokens. The target is token 0, which is also the clean prediction, and the control is token 2."""
CLEAN = {"target_probability": 0.3, "control_probability": 0.01, "margin": 1.0, "argmax": 0, "kl": 0.0}


def synthetic(
    layers: int,
    heads: int,
    imputations: Sequence[str] = ("zero", "mean"),
    prompts: int = 1,
    seed: int = 0,
    **arrays: ArrayLike,
) -> Result:
    """Return an invented result of a model with this grid of heads, in the order of a sweep.

    arrays: values in place of invented ones. `head_mean`, broadcast to [P, L, H]: there is no head where it is NaN. The
    others, broadcast to maps [P, I, L, H], are receipts and the ablated values of target_probability,
    control_probability, kl, margin and argmax; the other metrics follow from these.
    """
    random = np.random.RandomState(seed)
    grid = (prompts, len(imputations), layers, heads)
    invented: dict[str, Any] = {
        "head_mean": 0.05 * random.randn(prompts, layers, heads),
        "target_probability": np.clip(CLEAN["target_probability"] + 0.02 * random.randn(*grid), 0.001, 0.98),
        "control_probability": np.clip(CLEAN["control_probability"] + 0.0003 * random.randn(*grid), 0.001, 0.019),
        "kl": 0.01 * random.rand(*grid),
        "margin": random.rand(*grid),
        "argmax": np.where(random.rand(*grid) < 0.1, 1, 0),
        **dict.fromkeys(RECEIPTS, 1),
        **arrays,
    }
    head_mean = np.array(np.broadcast_to(invented.pop("head_mean"), (prompts, layers, heads)), dtype=np.float64)
    exists = np.isfinite(head_mean).all(axis=0)
    keys = tuple(
        AblationKey(((layer, head),), imputation)
        for layer, imputation, head in itertools.product(range(layers), imputations, range(heads))
        if exists[layer, head]
    )
    texts = dict(target_text=WORDS[0], control_text=WORDS[2])
    receipts: dict[str, Any] = {name: np.zeros((prompts, len(keys)), dtype=np.int64) for name in RECEIPTS}
    result = Result(
        ablations=keys,
        prompts=tuple(
            PromptRecord((number,), (0,), (2,), prompt=f"prompt {number}", **texts) for number in range(prompts)
        ),
        clean={name: np.full(prompts, value) for name, value in _with_derived(CLEAN).items()},
        ablated={name: np.zeros((prompts, len(keys))) for name in METRICS},
        head_mean=head_mean,
        **receipts,
    )
    return with_maps(result, **invented)


def synthetic_sets(keys: Sequence[AblationKey], prompts: int = 1, seed: int = 0, **arrays: ArrayLike) -> Result:
    """Return an invented result of sets of heads.

    arrays: values in place of invented ones, broadcast to [P, A]: ablated target_probability, control_probability, kl,
    margin and argmax, and correct; the other metrics follow from these.
    """
    random, runs = np.random.RandomState(seed), (prompts, len(keys))
    size = np.array([len(key.heads) for key in keys])
    harm = size * (0.5 + random.rand(*runs))
    invented: dict[str, Any] = {
        "target_probability": CLEAN["target_probability"] * np.exp(-0.1 * harm),
        "control_probability": CLEAN["control_probability"] * np.exp(0.02 * harm),
        "kl": 0.05 * harm,
        "margin": random.rand(*runs),
        "argmax": np.where(random.rand(*runs) < harm / 20, 1, 0),
        **arrays,
    }
    ablated = _with_derived({name: np.array(np.broadcast_to(of, runs)) for name, of in invented.items()})
    whole = synthetic(1, 1, ("zero",), prompts)
    receipts: dict[str, Any] = {name: np.ones(runs, dtype=np.int64) for name in RECEIPTS}
    return replace(whole, ablations=tuple(keys), ablated=ablated, **receipts)


def with_maps(result: Result, **maps: ArrayLike) -> Result:
    """Return a copy of an invented result with other values, as maps that are broadcast to [P, I, L, H].

    maps: as the `arrays` of `synthetic`, without `head_mean`.
    """
    receipts: dict[str, Any] = {
        name: _listed(result, maps.pop(name)).astype(np.int64) for name in RECEIPTS if name in maps
    }
    ablated = {**result.ablated, **{name: _listed(result, values) for name, values in maps.items()}}
    return replace(result, ablated=_with_derived(ablated), **receipts)


def _listed(result: Result, maps: ArrayLike) -> NDArray[Any]:
    """Return the values of maps in the order of the ablations, [P, I, L, H] -> [P, A]: the inverse of `Result.grid`."""
    shape = (len(result.prompts), len(result.imputations), *result.head_mean.shape[1:])
    places = np.array([(result.imputations.index(key.imputation), *key.heads[0]) for key in result.ablations]).T
    return np.array(np.broadcast_to(maps, shape)[:, *places])


def _with_derived(values: dict[str, Any]) -> dict[str, Any]:
    """Return all metrics of a result, given those that are invented."""
    target, control = (np.log(values[f"{name}_probability"]) for name in ("target", "control"))
    argmax = np.asarray(values["argmax"], dtype=np.int64)
    found = values | {
        "target_log_probability": target,
        "control_log_probability": control,
        "logit_difference": target - control,
        "target_rank": np.where(argmax == 0, 1, 2),
        "correct": np.where(argmax == 0, 1.0, 0.0),
        "argmax": argmax,
    }
    return {name: found[name] for name in METRICS}
