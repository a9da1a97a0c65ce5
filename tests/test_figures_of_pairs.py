"""The figure of pairs of heads: the values of its map, the finding in its title, and no overlapping texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from ablation.errors import InvalidResult
from ablation.figures.labels import MINUS, NO_BREAK
from ablation.figures.of_pairs import draw_pairs
from ablation.results import AblationKey, Result
from ablation.studies.pairs import Pairs, sets_of_two
from tests.synthetic import synthetic, synthetic_sets
from tests.test_figures import assert_composed, decode, drawn, legend_of, names_of_heads, title_of  # noqa: F401 (fixture)

Heads = Sequence[tuple[int, int]]


def grid(layers: int, heads: int) -> Heads:
    return [(layer, head) for layer in range(layers) for head in range(heads)]


def pairs_result(
    heads: Heads,
    prompts: int = 1,
    *,
    imputations: Sequence[str] = ("zero",),
    with_head: Heads | None = None,
    interactions: dict[Any, float] | None = None,
    flips: Any = 0,
) -> Result:
    """A result of pairs. interactions: {pair: of P(target)}; by default random ones. flips: the pairs that flip."""
    keys = [AblationKey(of, name) for name in imputations for of in sets_of_two(heads, with_head)]
    random = np.random.RandomState(0)
    alone = dict(zip(heads, 0.02 * random.randn(len(heads)), strict=True))
    extra = (
        0.01 * random.randn(len(keys)) ** 3 if interactions is None else [interactions.get(k.heads, 0) for k in keys]
    )
    effects = [sum(alone[head] for head in key.heads) for key in keys] + np.array(
        [len(k.heads) > 1 for k in keys]
    ) * extra
    argmax = [1 if len(key.heads) > 1 and (flips == "all" or key.heads in (flips or ())) else 0 for key in keys]
    return synthetic_sets(keys, prompts, target_probability=np.clip(0.3 + effects, 0.001, 0.98), argmax=argmax)


def title(figure: Figure) -> str:
    return " ".join(title_of(figure)).replace(NO_BREAK, " ")


def shown_maps(figure: Figure) -> list[np.ndarray[Any, Any]]:
    """The maps of the effects and of the interactions; NaN where nothing is shown."""
    return [np.ma.filled(np.ma.asarray(image.get_array()), np.nan) for image in figure.axes[0].images]


def test_map_of_pairs_shows_interactions_and_effects(tmp_path: Path, drawn: list[Figure]) -> None:  # noqa: F811
    strong, flip = ((0, 1), (2, 0)), ((0, 0), (1, 1))
    result = pairs_result(grid(3, 2), interactions={strong: -0.05}, flips=[flip])
    assert draw_pairs(result, tmp_path, "gpt2", decode) == tmp_path / "interactions.png"
    (figure,) = drawn
    assert_composed(figure)
    pairs = Pairs.of(result)
    lower, upper = shown_maps(figure)
    together = pairs.map_of(100 * pairs.effect("target_probability")[0])
    alone = 100 * result.change("target_probability")[0, :6]
    above, below = np.triu_indices(6, 1), np.tril_indices(6, -1)
    assert np.allclose(lower[below], together[below]) and np.allclose(np.diag(lower), alone)
    assert np.isnan(lower[above]).all() and np.isnan(upper[below]).all() and np.isnan(np.diag(upper)).all()
    assert upper[1, 4] == pytest.approx(-5) and np.allclose(np.delete(upper[above], 7), 0)
    for image, values in zip(figure.axes[0].images, (lower, upper), strict=True):
        assert image.get_clim() == pytest.approx((-np.nanmax(np.abs(values)), np.nanmax(np.abs(values))))
    rings = [line.get_xydata() for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert np.asarray(rings[-1]).tolist() == [[3, 0]]
    assert [text.get_text() for text in names_of_heads(figure)] == ["L0H1+L2H0", "L0H1+L2H0"]
    total, both = 100 * (together[1, 4] / 100 + 0.05), together[1, 4]
    words = title(figure)
    assert words.startswith(f"L0H1 and L2H0 interact most, by {MINUS}5 pp: both change P(“␣Germany”) by ")
    assert f"below the sum of their effects, {total:+.2g} pp; 1 of 15 pairs changes a ".replace("-", MINUS) in words
    assert f"{both:+.2g}".replace("-", MINUS) in words


@pytest.mark.end_to_end
def test_title_of_pairs_says_what_is_missing(tmp_path: Path, drawn: list[Figure]) -> None:  # noqa: F811 (fixture)
    draw_pairs(pairs_result(grid(2, 2), 3, interactions={}), tmp_path, "gpt2", decode)
    assert title(drawn[0]) == (
        "No two heads interact: all their effects on P(target) add up; none of 6 pairs changes a prediction that "
        "neither head changes alone gpt2: 3 prompts"
    )
    assert "pair not measured" not in legend_of(drawn[0])
    some = pairs_result(grid(2, 2), 3, with_head=[(0, 0)], flips="all", imputations=("zero", "mean"))
    draw_pairs(some, tmp_path, "gpt2", decode)
    assert "3 of 3 pairs change a prediction" in title(drawn[1]) and "pair not measured" in legend_of(drawn[1])
    assert "[" in title(drawn[1]).split("]")[0], "the interval of the strongest interaction"
    assert "both heads change the prediction, neither does alone, for some prompt" in legend_of(drawn[1])


def test_map_of_pairs_has_no_value_where_none_is_measured(tmp_path: Path, drawn: list[Figure]) -> None:  # noqa: F811
    draw_pairs(pairs_result(grid(2, 2), with_head=[(0, 0)]), tmp_path, "gpt2", decode)
    lower, upper = shown_maps(drawn[0])
    assert np.argwhere(np.isfinite(upper)).tolist() == [[0, 1], [0, 2], [0, 3]]
    assert np.argwhere(np.isfinite(lower)).tolist() == [[0, 0], [1, 0], [1, 1], [2, 0], [2, 2], [3, 0], [3, 3]]
    assert drawn[0].axes[0].patch.get_hatch()


SIZES: dict[str, dict[str, Any]] = {
    "2 heads": {"heads": grid(1, 2)},
    "one layer": {"heads": grid(1, 9), "flips": "all"},
    "nothing changes": {"heads": grid(3, 3), "prompts": 2},
    "24 heads": {"heads": [(layer * 7 % 24, layer % 5) for layer in range(24)], "prompts": 3},
    "60 layers": {"heads": [(layer, layer % 3) for layer in range(60)], "imputations": ("zero", "日本 βγ " * 9)},
    "gaps": {"heads": [(layer, head) for layer in (0, 7, 31) for head in range(12)], "with_head": [(7, 3)]},
    "seven imputations": {"heads": grid(3, 3), "imputations": tuple("abcdefg"), "flips": "all"},
    "144 heads": {"heads": grid(12, 12), "prompts": 5},
    "270 heads": {"heads": grid(30, 9), "with_head": grid(1, 2)},
}


@pytest.mark.end_to_end
@pytest.mark.parametrize("name", SIZES)
def test_pairs_of_every_size_have_no_overlaps(name: str, tmp_path: Path, drawn: list[Figure]) -> None:  # noqa: F811
    result = pairs_result(**SIZES[name])
    if name == "nothing changes":
        result.ablated["target_probability"][:] = 0.3
    draw_pairs(result, tmp_path, "gpt2 $x$ 日本: " + "word " * 60, decode)
    assert_composed(drawn[0])
    if name == "nothing changes":
        assert [text.get_text() for text in names_of_heads(drawn[0])] == ["no change"]


def test_single_heads_have_no_figure_of_pairs(tmp_path: Path) -> None:
    with pytest.raises(InvalidResult, match="no pairs"):
        draw_pairs(synthetic(2, 2), tmp_path, "x", decode)
    assert not list(tmp_path.iterdir())
