"""The figure of removal curves: the finding in its title, its scales, and no overlapping texts at any size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from ablation.errors import InvalidResult
from ablation.figures.labels import MINUS, NO_BREAK
from ablation.figures.of_curves import draw_curve
from ablation.results import AblationKey, Result
from ablation.studies.curves import ORDERED, RANDOM, Curve, Series, random_orders
from tests.synthetic import synthetic, synthetic_sets
from tests.test_figures import assert_composed, drawn, legend_of, title_of  # noqa: F401 (fixture)

Heads = list[tuple[int, int]]
HEADS: Heads = [(layer, head) for layer in range(4) for head in range(4)]
SIZES: dict[str, dict[str, Any]] = {
    "one head": {"ks": (1,), "orders": 1, "prompts": 1},
    "one size": {"ks": (3,), "orders": 20},
    "two sizes": {"ks": (1, 16), "kinds": ()},
    "all sizes": {"ks": range(1, 17), "orders": 20},
    "two imputations": {"imputations": ("zero", "mean")},
    "long name": {"imputations": ("zero", "reference-mean-by-position", "x" * 300)},
    "seven imputations": {"imputations": ("zero", "mean", "日本語 αβγ " * 3, "a", "b", "c", "resample"), "orders": 3},
    "144 heads": {"heads": [(layer, head) for layer in range(12) for head in range(12)], "ks": range(1, 145)},
    "1024 heads": {
        "heads": [(layer, head) for layer in range(32) for head in range(32)],
        "ks": [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000, 1024],
    },
}


def curve_result(
    ks: Sequence[int] = (1, 2, 4, 8),
    *,
    heads: Heads = HEADS,
    orders: int = 2,
    imputations: Sequence[str] = ("zero",),
    prompts: int = 4,
    kinds: Sequence[str] = RANDOM,
    wrong: dict[str, int] | None = None,
    **arrays: Any,
) -> Result:
    """A removal curve. wrong: {kind: the size from which all answers are wrong}; {} for no wrong answer."""
    series = [Series(ORDERED, 0, tuple(heads))]
    series += [one for one in random_orders(heads, heads, orders, 0) if one.kind in kinds]
    sets = [(name, one, k) for name in imputations for one in series for k in ks]
    if wrong is not None:
        arrays["argmax"] = [int(k >= wrong.get(one.kind, 10**6)) for _, one, k in sets]
    keys = [AblationKey(one.heads[:k], name, name=one.name(k)) for name, one, k in sets]
    return synthetic_sets(keys, prompts, **arrays)


def title(result: Result, folder: Path, drawn: list[Figure]) -> str:  # noqa: F811 (fixture)
    draw_curve(result, folder, title="gpt2: ")
    return " ".join(title_of(drawn[-1])).replace(NO_BREAK, " ").removesuffix(f" gpt2: {len(result.prompts)} prompts")


def test_curve_shows_the_values_of_the_result(tmp_path: Path, drawn: list[Figure]) -> None:  # noqa: F811 (fixture)
    result = curve_result(prompts=3, orders=5)
    assert draw_curve(result, tmp_path, title="gpt2") == tmp_path / "curve.png"
    (figure,) = drawn
    assert_composed(figure)
    curve = Curve.of(result)
    for axes, (metric, factor) in zip(
        figure.axes, {"correct": 100, "logit_difference": 1, "kl": 1}.items(), strict=True
    ):
        clean, *random, ordered = axes.lines
        assert np.allclose(np.asarray(clean.get_ydata()), factor * curve.clean[metric])
        assert np.allclose(np.asarray(ordered.get_ydata()), factor * curve.ordered[metric][0])
        means = [factor * curve.random[kind][metric][0].mean(axis=0) for kind in RANDOM]
        assert np.allclose([np.asarray(line.get_ydata()) for line in random], means)
        ends = np.array([path.vertices[:, 1] for path in axes.collections[-1].get_paths()]).T
        assert np.allclose(ends, [factor * curve.low[metric][0], factor * curve.high[metric][0]])
        assert axes.get_xscale() == "log" and axes.get_xticks().tolist() == [1, 2, 4, 8]
    assert legend_of(figure) == [
        "heads in their order; lines: 95% interval over 3 prompts",
        "random heads: mean of 5 orders",
        "their 5th to 95th percentile",
        "random heads of the same layers: mean of 5 orders",
        "their 5th to 95th percentile",
        "clean run, no head ablated",
    ]


@pytest.mark.end_to_end
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (
            {"ordered": 2},
            "The first 2 heads halve the accuracy of 100%; 8 random heads and 8 random heads of the same layers do "
            "not (median of 2 orders)",
        ),
        (
            {"ordered": 1, "uniform": 4},
            "The first head halves the accuracy of 100%, as do 4 random heads; 8 random heads of the same layers "
            "do not (median of 2 orders)",
        ),
        (
            {"ordered": 2, "uniform": 1, "layers": 2},
            "The first 2 heads halve the accuracy of 100%, as do 1 random head and 2 random heads of the same "
            "layers (median of 2 orders)",
        ),
        (
            {"uniform": 8},
            "The first 8 heads do not halve the accuracy of 100%: 100% is left; 8 random heads do (median of 2 orders)",
        ),
    ],
)
def test_title_says_how_many_heads_halve_accuracy(
    wrong: dict[str, int],
    said: str,
    tmp_path: Path,
    drawn: list[Figure],  # noqa: F811 (fixture)
) -> None:
    assert title(curve_result(wrong=wrong), tmp_path, drawn) == said


@pytest.mark.end_to_end
def test_title_counts_half_and_takes_the_median_order(tmp_path: Path, drawn: list[Figure]) -> None:  # noqa: F811
    result = curve_result(orders=3, kinds=["uniform"])
    values = {"ordered 2": 0.5, "ordered 4": 0.5, "ordered 8": 0.5}
    values |= {f"uniform {k} #{draw}": 0.25 for k, draw in ((2, 0), (4, 0), (4, 1), (8, 1), (8, 2))}
    result.ablated["correct"][:] = [values.get(key.name, 0.75) for key in result.ablations]
    assert title(result, tmp_path, drawn) == (
        "The first 2 heads halve the accuracy of 100%, as do 4 random heads (median of 3 orders)"
    )


@pytest.mark.end_to_end
def test_title_without_accuracy_is_of_logit_difference(tmp_path: Path, drawn: list[Figure]) -> None:  # noqa: F811
    one = curve_result(prompts=1, kinds=(), target_probability=0.1, control_probability=0.1)
    assert title(one, tmp_path, drawn).startswith("The first head halves the logit difference of 3.4")
    never = curve_result(prompts=3)
    never.clean["correct"][:] = 0
    assert title(never, tmp_path, drawn).startswith("The model answers no prompt correctly; the ")
    never.clean["logit_difference"][:] = -1
    never.ablated["logit_difference"][:] = -1.5
    assert title(never, tmp_path, drawn) == (
        f"The model answers no prompt correctly; the first 8 heads change the logit difference of {MINUS}1 by "
        f"{MINUS}0.5; 8 random heads by {MINUS}0.5; 8 random heads of the same layers by {MINUS}0.5"
    )


@pytest.mark.end_to_end
def test_title_names_sizes_of_other_imputations(tmp_path: Path, drawn: list[Figure]) -> None:  # noqa: F811 (fixture)
    result = curve_result(imputations=("zero", "mean", "noise"), kinds=(), wrong={"ordered": 4})
    mean, noise = (np.array([key.imputation == name for key in result.ablations]) for name in ("mean", "noise"))
    result.ablated["correct"][:, mean] = 1
    result.ablated["correct"][:, noise] = 0
    assert title(result, tmp_path, drawn) == (
        "Under zero, the first 4 heads halve the accuracy of 100% (mean: no number, noise: 1)"
    )


@pytest.mark.end_to_end
@pytest.mark.parametrize("options", SIZES.values(), ids=SIZES)
def test_curves_of_every_size_have_no_overlaps(
    options: dict[str, Any],
    tmp_path: Path,
    drawn: list[Figure],  # noqa: F811 (fixture)
) -> None:
    draw_curve(curve_result(**options), tmp_path, title="gpt2 $x$ 日本: " + "word " * 60)
    assert_composed(drawn[0])
    geometric = len(options.get("ks", range(4))) in (4, 12)
    assert {axes.get_xscale() for axes in drawn[0].axes} == {"log" if geometric else "linear"}


def test_curve_refuses_results_of_other_studies(tmp_path: Path) -> None:
    with pytest.raises(InvalidResult, match="not a set of a removal curve"):
        draw_curve(synthetic(2, 2), tmp_path, title="x")
    assert not list(tmp_path.iterdir())
