"""Published claims, checked on a sweep of one prompt. The claims are in golden/MODEL/claims.toml."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ablation.reports.report import Decode, flips, trend
from ablation.results import Result
from tests.golden import FOLDER, agreement_arrays, probability_change


def claims_of(model: str) -> dict[str, dict[str, Any]]:
    """Return {id: claim} of a model; empty if nothing was published."""
    path = FOLDER / model / "claims.toml"
    content = tomllib.loads(path.read_text()) if path.exists() else {}
    return {key: value for key, value in content.items() if isinstance(value, dict)}


def clean_prediction(claim: Mapping[str, Any], sweep: Result, decode: Decode) -> None:
    found = decode(sweep.clean["argmax"][0])
    assert found == claim["prediction"], f"the clean argmax is {found!r}"


def argmax_robustness(claim: Mapping[str, Any], sweep: Result, decode: Decode) -> None:
    turned = flips(sweep, claim["imputation"])
    heads = int(sweep.has_head.sum())
    kept = heads - len(turned)
    where = ", ".join(f"L{layer}H{head} to {decode(token)!r}" for layer, head, token in turned) or "no head flips it"
    assert heads == claim["of"], f"{heads} heads were ablated"
    if "kept" in claim:
        assert kept == claim["kept"], f"kept {kept} of {heads}: {where}"
        assert sorted(decode(token) for *_, token in turned) == sorted(claim["turned_to"]), where
    else:
        assert kept >= claim["kept_at_least"], f"kept {kept} of {heads}: {where}"


def target_sensitivity(claim: Mapping[str, Any], sweep: Result, decode: Decode) -> None:
    for name, change in zip(sweep.imputations, 100 * probability_change(sweep)[0][:, sweep.has_head], strict=True):
        low, high = change.min(), change.max()
        found = f"{name}: from {low:+.2f} to {high:+.2f} pp"
        assert low < 0 < high and high - low >= claim["range_at_least_pp"], found


def control_stability(claim: Mapping[str, Any], sweep: Result, decode: Decode) -> None:
    worst = 100 * np.abs(probability_change(sweep)[1][:, sweep.has_head]).max()
    assert worst <= claim["at_most_pp"], f"the control changes by up to {worst:.2f} pp"


def zero_mean_agreement(claim: Mapping[str, Any], sweep: Result, decode: Decode) -> None:
    difference = agreement_arrays(sweep)["mean_minus_zero"]
    worst = 100 * np.abs(difference[:, sweep.has_head]).max()
    assert worst <= claim["at_most_pp"], f"mean - zero is up to {worst:.2f} pp"


def head_means(claim: Mapping[str, Any], sweep: Result, decode: Decode) -> None:
    means = sweep.head_mean[0][sweep.has_head]
    average, size, spread = means.mean(), np.median(np.abs(means)), means.std()
    drift = trend(sweep.head_mean[0]).drift
    assert size <= claim["size_at_most"], f"the median size of a head's mean is {size:.3f}"
    assert abs(average) <= claim["size_at_most"], f"head means are {average:+.3f} on average"
    assert abs(drift) < spread, f"head means drift by {drift:+.3f} over all layers; their spread is {spread:.3f}"


CHECKS: dict[str, Callable[[Mapping[str, Any], Result, Decode], None]] = {
    "clean_prediction": clean_prediction,
    "argmax_robustness_zero": argmax_robustness,
    "argmax_robustness_mean": argmax_robustness,
    "target_sensitivity": target_sensitivity,
    "control_stability": control_stability,
    "zero_mean_agreement": zero_mean_agreement,
    "head_means": head_means,
}


def check(key: str, claim: Mapping[str, Any], sweep: Result, decode: Decode) -> None:
    """Raise AssertionError, with the words of the claim, if a sweep contradicts it."""
    __tracebackhide__ = True
    try:
        CHECKS[key](claim, sweep, decode)
    except AssertionError as error:
        raise AssertionError(f"published: {claim['claim']} Found: {error}") from None
