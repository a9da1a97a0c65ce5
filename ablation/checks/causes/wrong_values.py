"""Known mistakes in values: what replaces z instead of the imputed value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ablation.checks.cases import Case
from ablation.checks.causes.simulation import Mistake, Site, channel_means, row_means
from ablation.checks.imputed import Pair

Value = Callable[[Site, Tensor, Pair], Any]


def _for(kinds: str) -> Callable[[Case], bool]:
    names = kinds.split()
    return lambda case: case.kind in names


def _over(mask: Callable[[Site], Tensor]) -> Value:
    """Return the value of a mean over other tokens than the real ones: of the row, or per channel."""

    def value(site: Site, own: Tensor, pair: Pair) -> Any:
        chosen = mask(site)
        chosen = chosen.where(chosen.any(dim=-1, keepdim=True), site.setting.real)
        return (row_means if site.setting.case.kind == "mean" else channel_means)(own, chosen)

    return value


def _one_sided(site: Site) -> Tensor:
    """Return the mask with the padding of all rows on the side on which the first row has it."""
    real = site.setting.real
    count, column = real.sum(dim=-1, keepdim=True), torch.arange(real.shape[1], device=real.device)[None]
    return column < count if real[:, 0].all() else column >= real.shape[1] - count


def _span(site: Site) -> Tensor:
    real = site.setting.real
    return (real.cumsum(dim=-1) > 0) & (real.flip(-1).cumsum(dim=-1).flip(-1) > 0)


def _window(site: Site) -> Tensor:
    real = site.setting.real
    window = getattr(site.setting.model.config.get_text_config(), "sliding_window", None) or real.shape[1]
    return real & (torch.arange(real.shape[1], device=real.device) >= real.shape[1] - window)


def _no_padding_token(site: Site) -> Tensor:
    pad = site.setting.model.config.get_text_config().pad_token_id
    ids: Tensor = site.setting.inputs["input_ids"]
    return site.setting.real if pad is None else ids != pad


def _mean(site: Site, own: Tensor) -> Tensor:
    return row_means(own, site.setting.real)


def _of_pieces(size: int) -> Value:
    def value(site: Site, own: Tensor, pair: Pair) -> Any:
        rows = zip(own, site.setting.real, strict=True)
        means = [torch.stack([piece.mean() for piece in row[here].split(size)]).mean() for row, here in rows]
        return torch.stack(means)[:, None, None]

    return value


def _up_to_token(site: Site, own: Tensor, pair: Pair) -> Any:
    real = site.setting.real
    summed = own.double().mean(dim=-1).where(real, 0).cumsum(dim=-1)
    return (summed / real.cumsum(dim=-1).clamp(min=1))[..., None]


def _median(site: Site, own: Tensor, pair: Pair) -> Any:
    return torch.stack([row[here].median() for row, here in zip(own, site.setting.real, strict=True)])[:, None, None]


def _in_float32(site: Site, own: Tensor, pair: Pair) -> Any:
    per_token = own.float().mean(dim=-1).where(site.setting.real, 0)
    return (per_token.sum(dim=-1) / site.setting.real.sum(dim=-1))[:, None, None]


def _of_set(site: Site, own: Tensor, pair: Pair) -> Any:
    return _mean(site, torch.cat([site.own(head) for head in site.named], dim=-1))


def _less_one(site: Site, own: Tensor, pair: Pair) -> Any:
    count = (site.setting.real.sum(dim=-1) * own.shape[-1])[:, None, None].double()
    return _mean(site, own) * count / (count - 1)


def _padding_in_count(site: Site, own: Tensor, pair: Pair) -> Any:
    return _mean(site, own) * site.setting.real.double().mean(dim=-1)[:, None, None]


def _unmasked_below_first(site: Site, own: Tensor, pair: Pair) -> Any:
    first = min(layer for layer, _ in site.setting.case.heads)
    real = site.setting.real
    return row_means(own, real if site.layer.index == first else torch.ones_like(real))


def _unmasked_after_first(site: Site, own: Tensor, pair: Pair) -> Any:
    real = site.setting.real
    return row_means(own, real if pair[1] == site.named[0] else torch.ones_like(real))


OVER_ROWS = "z is replaced by one mean over all rows of the batch"

MEANS: tuple[tuple[str, Value], ...] = (
    (
        "z is replaced by a mean for each channel; mean imputation is one number, over tokens and channels",
        lambda site, own, pair: channel_means(own, site.setting.real),
    ),
    (
        "z is replaced by a mean for each token; mean imputation is one number, over tokens and channels",
        lambda site, own, pair: own.mean(dim=-1, keepdim=True),
    ),
    ("z is replaced by a mean over the rows of the batch", lambda site, own, pair: own.mean(dim=0, keepdim=True)),
    (f"{OVER_ROWS}: of real tokens", lambda site, own, pair: own[site.setting.real].mean()),
    (f"{OVER_ROWS}: padding included", lambda site, own, pair: own.mean()),
    (f"{OVER_ROWS}, for each channel: of real tokens", lambda site, own, pair: own[site.setting.real].mean(dim=0)),
    (f"{OVER_ROWS}, for each channel: padding included", lambda site, own, pair: own.mean(dim=(0, 1))),
    ("the mean of the first row is used for all rows", lambda site, own, pair: _mean(site, own)[:1]),
    ("the mean is divided by the number of all tokens, padding included", _padding_in_count),
    *(
        (f"the mean is a mean of means of pieces of {size} tokens, of unequal length", _of_pieces(size))
        for size in (2, 3, 4)
    ),
    ("each token gets the mean of the tokens up to it, not that of the row", _up_to_token),
    ("the mean is divided by n - 1, not by n", _less_one),
    ("0 is written, not the mean", lambda site, own, pair: 0.0),
    (
        "the mean is taken over the padding, not over the real tokens: the mask is read the wrong way round",
        lambda site, own, pair: row_means(own, ~site.setting.real),
    ),
    (
        "the mean is that of all heads of the layer, not that of the head",
        lambda site, own, pair: _mean(site, site.x),
    ),
    ("one mean is used for all ablated heads of a layer", _of_set),
    ("z is replaced by the mean of its absolute values", lambda site, own, pair: _mean(site, own.abs())),
    ("z is replaced by its median, not by its mean", _median),
    ("the mean is subtracted from z; it should replace z", lambda site, own, pair: own - _mean(site, own)),
    (
        "z is moved only half of the way to the mean: it should be replaced",
        lambda site, own, pair: (own + _mean(site, own)) / 2,
    ),
    (
        "the means of the rows that have tokens are written to the first rows of the batch",
        lambda site, own, pair: torch.cat(
            [_mean(site, own)[site.setting.real.any(dim=1)], _mean(site, own)[~site.setting.real.any(dim=1)]]
        ),
    ),
    *(
        (
            f"the mean is rounded to {name}",
            lambda site, own, pair, dtype=dtype: _mean(site, own).to(dtype),
        )
        for name, dtype in (("float16", torch.float16), ("bfloat16", torch.bfloat16), ("float32", torch.float32))
    ),
    (
        "only the first layer with an ablated head has the mask: the mean of later layers includes padding",
        _unmasked_below_first,
    ),
    (
        "only the first head of a layer has the mask: the mean of the other heads includes padding",
        _unmasked_after_first,
    ),
)

ZEROS: tuple[tuple[str, Value], ...] = (
    ("zero imputation writes the mean of z", lambda site, own, pair: _mean(site, own)),
    ("zero imputation writes a small number, not 0", lambda site, own, pair: 1e-6),
    ("zero imputation scales z down, and does not set it to 0", lambda site, own, pair: own * 1e-3),
    ("zero imputation changes the sign of z: it is subtracted twice", lambda site, own, pair: -own),
    ("zero imputation replaces half of z", lambda site, own, pair: own / 2),
)

OVER: tuple[tuple[str, Callable[[Site], Tensor]], ...] = (
    ("the mean includes the padding", lambda site: torch.ones_like(site.setting.real)),
    (
        "the mean is that of the last real token alone",
        lambda site: site.setting.position.eq(site.setting.real.sum(dim=-1, keepdim=True) - 1) & site.setting.real,
    ),
    (
        "padding on the left is read as padding on the right: the mean covers the wrong tokens",
        lambda site: site.setting.real.flip(1),
    ),
    ("the first token is left out of the mean", lambda site: site.setting.real & (site.setting.position > 0)),
    ("the padding of all rows is assumed on the side of the first row's", _one_sided),
    ("tokens that the mask hides between real ones are included in the mean", _span),
    ("only the tokens of the last sliding window are included in the mean", _window),
    ("every padding token is left out of the mean, even where the mask says that it is real", _no_padding_token),
)


def _scaled(factor: Callable[[float], float]) -> Value:
    return lambda site, own, pair: own * factor(float(site.setting.case.factor))


def _given(site: Site, pair: Pair) -> Tensor:
    values: Tensor = site.setting.case.values()[pair].double()
    return values


def _of_next_layer(site: Site, own: Tensor, pair: Pair) -> Any:
    values, next_layer = site.setting.case.values(), (pair[0] + 1, pair[1])
    value = values[next_layer if next_layer in values else pair].double()
    return value[site.setting.position] if value.ndim == 2 else value


def _first_position(site: Site, own: Tensor, pair: Pair) -> Any:
    value = _given(site, pair)
    return value[0] if value.ndim == 2 else value


def _at_columns(site: Site, own: Tensor, pair: Pair) -> Any:
    value = _given(site, pair)
    return value[torch.arange(own.shape[1], device=value.device)] if value.ndim == 2 else value


Batch = tuple[Tensor, Tensor]
"""The z of one head in a batch of a reference, [rows, tokens, head_dim], and its mask, [rows, tokens]."""


def _from_reference(statistic: Callable[[list[Batch]], Tensor]) -> Value:
    """Return the value of another statistic of a reference: [head_dim] or [positions, head_dim]."""

    def value(site: Site, own: Tensor, pair: Pair) -> Any:
        layer, head = pair
        found = statistic([(z[layer][:, :, head].double(), real) for z, real in site.setting.reference])
        return found[site.setting.position] if found.ndim == 2 else found

    return value


def _all(batches: list[Batch]) -> Tensor:
    return torch.cat([z[real] for z, real in batches]).mean(dim=0)


def _prompts(batches: list[Batch]) -> list[Tensor]:
    return [row[here] for z, real in batches for row, here in zip(z, real, strict=True)]


def _by_column(batches: list[Batch]) -> Tensor:
    longest = max(z.shape[1] for z, _ in batches)
    return torch.stack(
        [torch.cat([z[:, at] for z, _ in batches if z.shape[1] > at]).mean(dim=0) for at in range(longest)]
    )


def _short_as_zero(batches: list[Batch]) -> Tensor:
    prompts = _prompts(batches)
    return torch.stack(
        [
            sum((z[at] for z in prompts if len(z) > at), torch.zeros((), device=prompts[0].device)) / len(prompts)
            for at in range(max(map(len, prompts)))
        ]
    )


def _of_group(site: Site, own: Tensor, pair: Pair) -> Any:
    group = site.layer.num_heads // site.layer.key_value_heads
    return _from_reference(_all)(site, own, (pair[0], pair[1] - pair[1] % group))


REFERENCE_MEANS: tuple[tuple[str, Value], ...] = (
    (
        "the means of the batches are averaged: batches with fewer tokens weigh too much",
        _from_reference(lambda batches: torch.stack([_all([batch]) for batch in batches]).mean(dim=0)),
    ),
    (
        "the means of the prompts are averaged: short prompts weigh too much",
        _from_reference(lambda batches: torch.stack([z.mean(dim=0) for z in _prompts(batches)]).mean(dim=0)),
    ),
    (
        "the mean of the reference includes its padding",
        _from_reference(lambda batches: _all([(z, torch.ones_like(real)) for z, real in batches])),
    ),
    (
        "only the last row of each batch of the reference is measured",
        _from_reference(lambda batches: _all([(z[-1:], real[-1:]) for z, real in batches])),
    ),
    (
        "only the last batch of the reference is measured: each batch overwrites the one before it",
        _from_reference(lambda batches: _all(batches[-1:])),
    ),
    ("only the first batch of the reference is measured", _from_reference(lambda batches: _all(batches[:1]))),
    (
        "only the last token of each prompt of the reference is measured",
        _from_reference(lambda batches: torch.stack([z[-1] for z in _prompts(batches)]).mean(dim=0)),
    ),
    ("the statistics of the first head that shares the key/value head are used", _of_group),
)

WRONG_VALUES = (
    *(Mistake(cause, value=value, needs=_for("mean")) for cause, value in MEANS),
    Mistake(
        "the mean is computed in float32, whatever the dtype of z",
        value=_in_float32,
        needs=lambda case: case.kind == "mean" and case.decoder.dtype == "float64",
    ),
    Mistake(
        "the mean is taken over the ablated tokens; it should be that of the whole row",
        value=lambda site, own, pair: row_means(own, site.setting.at),
        needs=lambda case: case.kind == "mean" and case.positions is not None,
    ),
    *(Mistake(cause, value=value, needs=_for("zero")) for cause, value in ZEROS),
    *(Mistake(cause, value=_over(mask), needs=_for("mean channel-mean")) for cause, mask in OVER),
    Mistake("the factor is applied twice", value=_scaled(lambda factor: factor**2), needs=_for("scale")),
    Mistake(
        "the factor is read as the share that is removed, not as the share that is kept",
        value=_scaled(lambda f: 1 - f),
        needs=_for("scale"),
    ),
    Mistake(
        "the mean is taken over channels, not over tokens",
        value=lambda site, own, pair: own.mean(dim=-1, keepdim=True),
        needs=_for("channel-mean"),
    ),
    *(
        Mistake(
            f"each channel is replaced by one mean over all rows of the batch: {over}",
            value=value,
            needs=_for("channel-mean"),
        )
        for over, value in (
            ("of real tokens", lambda site, own, pair: own[site.setting.real].mean(dim=0)),
            ("padding included", lambda site, own, pair: own.mean(dim=(0, 1))),
        )
    ),
    Mistake("the given values of the next layer are used", value=_of_next_layer, needs=_for("values")),
    Mistake(
        "the given values of the first position are used at all tokens", value=_first_position, needs=_for("values")
    ),
    Mistake(
        "padding is counted in the position at which the given values are read", value=_at_columns, needs=_for("values")
    ),
    *(Mistake(cause, value=value, needs=_for("reference-mean")) for cause, value in REFERENCE_MEANS),
    Mistake(
        "the column in a padded reference is taken for the position",
        value=_from_reference(_by_column),
        needs=_for("reference-mean-by-position"),
    ),
    Mistake(
        "prompts of the reference that are too short for a position count as 0 there",
        value=_from_reference(_short_as_zero),
        needs=_for("reference-mean-by-position"),
    ),
    Mistake(
        "each row is resampled from the row below it in the reference",
        value=lambda site, own, pair: site.setting.frozen[pair].roll(-1, dims=0),
        needs=_for("resample"),
    ),
    Mistake(
        "all rows are resampled from the first row of the reference",
        value=lambda site, own, pair: site.setting.frozen[pair][:1],
        needs=_for("resample"),
    ),
)
