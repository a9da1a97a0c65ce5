"""Known mistakes in channels, tokens and modules: what is edited instead of the z of the head."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ablation.checks.causes.simulation import Mistake, Places, Setting, Site
from ablation.checks.imputed import Pair
from ablation.heads import AttentionLayer


def _sliced(width: Callable[[Site], int]) -> Callable[[Site, int], Any]:
    return lambda site, head: slice(head * width(site), (head + 1) * width(site))


def _share(site: Site) -> int:
    """Return the channels of a head if the edited tensor consisted of heads."""
    return site.x.shape[-1] // site.layer.num_heads


def _config(site: Site) -> Any:
    return site.setting.model.config.get_text_config()


WRONG_WIDTH = "the width of a head is not that of this model"

CHANNELS: tuple[tuple[str, Callable[[Site, int], Any]], ...] = (
    (
        "a head is taken as every n-th channel: z is reshaped to [head_dim, heads], but holds [heads, head_dim]",
        lambda site, head: slice(head, None, site.layer.num_heads),
    ),
    ("the number of the head is used as a channel", lambda site, head: slice(head, head + 1)),
    ("the slice of the head starts at channel 0", lambda site, head: slice(0, (head + 1) * site.layer.head_dim)),
    ("the slice of the head has no end", lambda site, head: slice(head * site.layer.head_dim, None)),
    (
        "the slice of the head ends one channel too early",
        lambda site, head: slice(head * site.layer.head_dim, (head + 1) * site.layer.head_dim - 1),
    ),
    (
        "the slice of the head ends one channel too late",
        lambda site, head: slice(head * site.layer.head_dim, (head + 1) * site.layer.head_dim + 1),
    ),
    (
        "head_dim is taken as hidden_size / heads, but this model has another: use projection.in_features / heads, or "
        "config.head_dim",
        _sliced(lambda site: _config(site).hidden_size // site.layer.num_heads),
    ),
    (
        "the number of the head is taken as that of a key/value head, so all query heads that share one are ablated: "
        "head_dim is computed from num_key_value_heads, or the values are edited",
        _sliced(lambda site: site.x.shape[-1] // site.layer.key_value_heads),
    ),
    *(
        (
            f"the number of heads is taken as {count}, whatever the model has",
            _sliced(lambda site, count=count: site.x.shape[-1] // count),  # type: ignore[misc]
        )
        for count in (2, 4, 8, 12, 16, 32)
    ),
    (WRONG_WIDTH + ": it is that of the whole layer, as of one head", _sliced(lambda site: site.x.shape[-1])),
    *(
        (f"{WRONG_WIDTH}: it is taken as {width}, whatever the model has", _sliced(lambda _, width=width: width))  # type: ignore[misc]
        for width in (32, 64, 80, 96, 128, 256)
    ),
    (
        "the slice of the head is shifted by one channel",
        lambda site, head: slice(head * site.layer.head_dim + 1, (head + 1) * site.layer.head_dim + 1),
    ),
    (
        "the slice of the head is shifted by one channel",
        lambda site, head: slice(max(0, head * site.layer.head_dim - 1), (head + 1) * site.layer.head_dim - 1),
    ),
    (
        "only the first half of the head's channels is ablated",
        lambda site, head: slice(head * site.layer.head_dim, head * site.layer.head_dim + site.layer.head_dim // 2),
    ),
    (
        "only the second half of the head's channels is ablated",
        lambda site, head: slice(
            head * site.layer.head_dim + site.layer.head_dim // 2, (head + 1) * site.layer.head_dim
        ),
    ),
)

Tokens = Callable[[Site, int], Tensor]


def _of_columns(site: Site, chosen: Callable[[Tensor], Tensor]) -> Tensor:
    at = site.setting.at
    return at & chosen(torch.arange(at.shape[1], device=at.device)).expand_as(at)


def _of_rows(site: Site, chosen: Callable[[Tensor], Tensor]) -> Tensor:
    at = site.setting.at
    return at & chosen(torch.arange(len(at), device=at.device))[:, None]


def _by_columns(site: Site, number: int) -> Tensor:
    at = torch.zeros_like(site.setting.real)
    at[:, list(site.setting.case.positions or ())] = True
    return at


def _moved_from_end(site: Site, number: int) -> Tensor:
    positions = site.setting.case.positions
    return site.setting.at_positions(positions and tuple(at - (at < 0) for at in positions))


TOKENS: tuple[tuple[str, Tokens], ...] = (
    (
        "only the last token is ablated",
        lambda site, _: site.setting.at & (site.setting.position == site.setting.real.sum(dim=1, keepdim=True) - 1),
    ),
    ("only the last token is ablated", lambda site, _: _of_columns(site, lambda at: at == len(at) - 1)),
    ("the first token is not ablated", lambda site, _: _of_columns(site, lambda at: at > 0)),
    ("the last token is not ablated", lambda site, _: _of_columns(site, lambda at: at < len(at) - 1)),
    ("only the first token is ablated", lambda site, _: _of_columns(site, lambda at: at == 0)),
    (
        "nothing is ablated in a prompt of one token",
        lambda site, _: site.setting.at & (site.setting.at.shape[1] > 1),
    ),
    ("nothing is ablated in a batch of several rows", lambda site, _: site.setting.at & (len(site.setting.at) == 1)),
    *(
        (
            f"only the first {count} tokens are ablated, however long the prompt is",
            lambda site, _, count=count: _of_columns(site, lambda at: at < count),
        )
        for count in (2, 3, 4, 5, 6, 7, 8, 16, 32, 64)
    ),
    ("only the first row of a batch is ablated", lambda site, _: _of_rows(site, lambda at: at == 0)),
    ("only the last row of a batch is ablated", lambda site, _: _of_rows(site, lambda at: at == len(at) - 1)),
    *(
        (
            f"only the first {count} rows of a batch are ablated",
            lambda site, _, count=count: _of_rows(site, lambda at: at < count),
        )
        for count in (2, 4, 8, 16)
    ),
    (
        "rows with padding are not ablated",
        lambda site, _: site.setting.at & site.setting.real.all(dim=1, keepdim=True),
    ),
    (
        "the first n columns of a row are taken as its n real tokens, which is right only for padding on the right",
        lambda site, _: _of_columns(site, lambda at: at[None] < site.setting.real.sum(dim=1, keepdim=True)),
    ),
    (
        "each of several heads is ablated in one row only: the position in the list of heads is used as an index of "
        "the batch",
        lambda site, number: _of_rows(site, lambda at: at == number),
    ),
    (
        "the first head of a layer is ablated in all rows, the others in the first row only",
        lambda site, number: _of_rows(site, lambda at: (at == 0) | (number == 0)),
    ),
)

POSITIONS: tuple[tuple[str, Tokens], ...] = (
    (
        "the axes of tokens and rows are swapped in the mask of positions",
        lambda site, _: site.setting.at.T.reshape(site.setting.at.shape),
    ),
    ("padding counts as a position: the positions are used as columns of the batch", _by_columns),
    (
        "negative positions are one too low: -1 means the last token, not the one before it",
        _moved_from_end,
    ),
    (
        "only the first of several positions is used",
        lambda site, _: site.setting.at_positions(site.setting.case.positions and site.setting.case.positions[:1]),
    ),
    (
        "the columns of the positions in the first row are used for all rows",
        lambda site, _: site.setting.at[:1].expand_as(site.setting.at),
    ),
    ("the positions are ignored: z is replaced at all tokens", lambda site, _: torch.ones_like(site.setting.real)),
)


def _submodule(layer: AttentionLayer, *names: str) -> nn.Module | None:
    found = dict(layer.block.named_modules())
    return next((found[name] for name in names if name in found), None)


def _at(names: tuple[str, ...], is_output: bool, *, also_right: bool = False) -> Places:
    def places(setting: Setting) -> list[tuple[AttentionLayer, nn.Module, bool]]:
        found = [(layer, _submodule(layer, *names), is_output) for layer in setting.found.layers]
        right = [(layer, layer.projection, False) for layer in setting.found.layers] if also_right else []
        if all(module is None for _, module, _ in found):
            raise LookupError(f"this model has no module {' or '.join(names)}")
        return right + [(layer, module, is_output) for layer, module, _ in found if module is not None]

    return places


def _by_last_name(setting: Setting) -> list[tuple[AttentionLayer, nn.Module, bool]]:
    ends = {layer.projection_name.rpartition(".")[2] for layer in setting.found.layers}
    modules = [m for name, m in setting.model.named_modules() if name.rpartition(".")[2] in ends]
    return [(layer, modules[layer.index], False) for layer in setting.found.layers]


MLPS = ("mlp", "fc1", "feed_forward", "block_sparse_moe")
DOWNSTREAM = "the edit is downstream of the projection, in its output: there, the heads are mixed already"
UPSTREAM = "the edit is upstream of the heads, in the input of the layer: the residual stream has no heads"
PLACES: tuple[tuple[str, Places], ...] = (
    (DOWNSTREAM, lambda setting: [(layer, layer.projection, True) for layer in setting.found.layers]),
    (UPSTREAM, lambda setting: [(layer, layer.block, False) for layer in setting.found.layers]),
    (
        "the output of the whole layer is edited, downstream of the projection: the residual stream has no heads",
        lambda setting: [(layer, layer.block, True) for layer in setting.found.layers],
    ),
    (
        "the queries of the head are replaced, not its z: attention is then uniform, not off",
        _at(("self_attn.q_proj",), True),
    ),
    ("the input of the MLP is edited, not z", _at(MLPS, False)),
    ("the input of the MLP is edited as well as z", _at(MLPS, False, also_right=True)),
    (
        "modules are chosen by the last part of their names, and the MLPs have modules of that name, too",
        _by_last_name,
    ),
)


def _minus_bias(site: Site, out: Tensor, *, shared: bool) -> Tensor:
    bias: Any = site.layer.projection.bias
    if bias is None:
        return out
    without: Tensor = out - (bias / site.layer.num_heads if shared else bias)
    return without


def _others_rescaled(site: Site, edited: Tensor) -> Tensor:
    heads, width = site.layer.num_heads, site.layer.head_dim
    out = edited * (heads / max(1, heads - len(site.named)))
    for head in site.named:
        channels = slice(head * width, (head + 1) * width)
        out[..., channels] = edited[..., channels]
    return out


def _others_zero(site: Site, edited: Tensor) -> Tensor:
    at, out = site.setting.at, edited.clone()
    for head in site.named:
        channels = site.layer.channels(head)
        out[..., channels] = edited[..., channels].where(at[..., None], 0)
    return out


def _value_bias(site: Site, own: Tensor, pair: Pair) -> Any:
    c_attn = _submodule(site.layer, "attn.c_attn")
    if c_attn is None:
        raise LookupError("no module for keys and values")
    bias: Any = c_attn.bias
    return bias.chunk(3)[2][site.layer.channels(pair[1])].expand_as(own)


def _output_channels(site: Site, out: Tensor) -> Tensor:
    out, bias = out.clone(), site.layer.projection.bias
    for head in site.named:
        channels = site.layer.channels(head)
        out[..., channels] = 0.0 if bias is None else bias[channels].to(out.dtype)  # type: ignore[index]
    return out


WRONG_PLACES = (
    *(Mistake(cause, channels=channels) for cause, channels in CHANNELS),
    *(Mistake(cause, tokens=tokens, needs=lambda case: case.positions is None) for cause, tokens in TOKENS),
    *(Mistake(cause, tokens=tokens, needs=lambda case: case.positions is not None) for cause, tokens in POSITIONS),
    *(
        Mistake(cause, places=places, channels=channels)
        for cause, places in PLACES
        for channels in (_sliced(lambda site: site.layer.head_dim), _sliced(_share))
    ),
    Mistake(
        "the bias of the projection is lost: it is removed together with the head, but belongs to no head",
        output=partial(_minus_bias, shared=False),
    ),
    Mistake(
        "a share of the projection's bias is removed together with the head, but the bias belongs to no head",
        output=partial(_minus_bias, shared=True),
    ),
    Mistake(
        "the axes of W_O are swapped, so output channels are removed: transformers' Conv1D keeps [in, out], nn.Linear "
        "[out, in]",
        value=lambda site, own, pair: own,
        output=_output_channels,
    ),
    Mistake(
        "the output of the whole attention is removed, not only that of the head",
        output=lambda site, out: torch.zeros_like(out),
    ),
    Mistake(
        "the bias of the values is kept in z, which should be 0",
        value=_value_bias,
        needs=lambda case: case.kind == "zero",
    ),
    Mistake("the other heads of the layer are scaled up to compensate for the ablated ones", rest=_others_rescaled),
    Mistake(
        "z is set to 0 at the tokens that are not named",
        rest=_others_zero,
        needs=lambda case: case.positions is not None and case.kind != "zero",
    ),
    *(
        Mistake(
            f"the whole layer is rounded to {name}, with the heads that are not ablated",
            rest=lambda site, edited, dtype=dtype: edited.to(dtype).to(edited.dtype),  # type: ignore[misc]
        )
        for name, dtype in (("float16", torch.float16), ("bfloat16", torch.bfloat16))
    ),
)
