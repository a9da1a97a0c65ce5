"""Every head of a model ablated in turn, for one prompt: what each does to the prediction."""

from __future__ import annotations

import inspect
import json
import operator
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from ablation import provenance
from ablation.errors import (
    AblationError,
    InvalidAblation,
    InvalidPrompt,
    InvalidReceipt,
    NonFiniteLogits,
    UnsupportedModel,
)
from ablation.heads import Heads, Layer, find_heads
from ablation.hook import Edit, Fired, HeadAblation
from ablation.imputation import IMPUTATIONS, Imputation, as_imputation

# The rows of one pass may take this much memory for their activations, unless `max_rows` says otherwise.
ROW_BUDGET_BYTES = 2**29


@dataclass(frozen=True, eq=False)
class Sweep:
    """What each ablation did. L layers, H heads, I imputations, W watched tokens; all floats are float64.

    Probabilities are in [0, 1], log-probabilities in nats, margins (top-1 logit - top-2 logit) in logits, all at the
    prompt's last token. Of equal logits the lowest token id is the argmax. L counts all decoder layers, H is the
    largest number of heads: where a layer has fewer, or none, floats are NaN and integers -1.
    """

    imputations: tuple[str, ...]
    """[I] names."""
    watched: NDArray[np.int64]
    """[W] token ids."""
    clean_probability: NDArray[np.float64]
    """[W]"""
    clean_log_probability: NDArray[np.float64]
    """[W]"""
    clean_argmax: int
    clean_margin: float
    probability_change: NDArray[np.float64]
    """[W, I, L, H] ablated - clean."""
    log_probability_change: NDArray[np.float64]
    """[W, I, L, H] ablated - clean."""
    argmax: NDArray[np.int64]
    """[I, L, H] token ids."""
    margin: NDArray[np.float64]
    """[I, L, H]"""
    head_mean: NDArray[np.float64]
    """[L, H] mean of z over all tokens and channels in the clean run."""
    calls: NDArray[np.int64]
    """[I, L, H] receipt: calls of the ablated projection in the forward of that ablation; 1."""
    replaced: NDArray[np.int64]
    """[I, L, H] receipt: elements of z that held the imputed value; tokens x width."""
    changed: NDArray[np.int64]
    """[I, L, H] receipt: those of them that the imputation changed; 0 for a head that did nothing anyway."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """What the sweep was made with; values that JSON can hold."""

    @property
    def present(self) -> NDArray[np.bool_]:
        """[L, H] whether there is such a head."""
        there: NDArray[np.bool_] = self.argmax[0] >= 0
        return there

    @property
    def kept(self) -> NDArray[np.bool_]:
        """[I, L, H] whether the argmax is that of the clean run; False where there is no head."""
        return np.equal(self.argmax, self.clean_argmax)

    @property
    def flipped(self) -> NDArray[np.bool_]:
        """[I, L, H] whether the argmax is another than in the clean run; False where there is no head."""
        flipped: NDArray[np.bool_] = self.present & ~self.kept
        return flipped

    def save(self, folder: Path) -> None:
        """Write sweep.npz (the arrays) and sweep.json (the rest) into an existing folder. Raises OSError."""
        arrays: dict[str, Any] = self._arrays()
        np.savez(folder / "sweep.npz", **arrays)
        rest = {"imputations": self.imputations, "provenance": self.provenance}
        (folder / "sweep.json").write_text(json.dumps(rest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read back what `save` wrote, equal to the last bit. Raises OSError, ValueError or KeyError."""
        rest = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
        with np.load(folder / "sweep.npz", allow_pickle=False) as arrays:
            values = {name: array if array.ndim else array.item() for name, array in arrays.items()}
        return cls(imputations=tuple(rest["imputations"]), provenance=rest["provenance"], **values)

    def _arrays(self) -> dict[str, NDArray[Any]]:
        names = (f.name for f in fields(self) if f.name not in ("imputations", "provenance"))
        return {name: np.asarray(getattr(self, name)) for name in names}


class Ablation(NamedTuple):
    """One cell of the sweep: indices into imputations, layers and heads."""

    imputation: int
    layer: int
    head: int


class Rows(NamedTuple):
    """What some ablations gave: last-token logits [rows, vocabulary], and of each the receipt."""

    cells: Sequence[Ablation]
    logits: Tensor
    calls: Sequence[int]
    fired: Sequence[Fired]


Progress = Callable[[float], None]
"""Told the share of the work that is done, in (0, 1]."""


def sweep(
    model: PreTrainedModel,
    token_ids: Sequence[int],
    watch: Sequence[int | None] = (None, None),
    imputations: Sequence[str | Imputation] = tuple(IMPUTATIONS),
    *,
    max_rows: int | None = None,
    progress: Progress | None = None,
) -> Sweep:
    """Ablate every head in turn, with each imputation, in one growing batch: exact, and fast.

    Before layer l the batch holds the clean row and the rows ablated in earlier layers. A pre-hook on layer l appends
    a copy of the clean row for each (imputation, head) of that layer, and `HeadAblation` ablates one head in each
    copy. Whatever an ablation shares with the clean run is thus computed once. At most `max_rows` rows run at once
    (default: as many as fit in ROW_BUDGET_BYTES); further ablations take further passes.

    Where a model's layers do not treat rows alike, so that the batch fails or disagrees with a forward of one row,
    `sweep_sequential` takes over, with a warning; `provenance["method"]` says which it was.

    token_ids: the prompt, one row without padding. watch: token ids whose probability is followed, by convention the
    target and the control; None stands for the most probable token of the clean run that is not watched yet.
    Raises InvalidPrompt, InvalidAblation, UnknownImputation, UnsupportedModel, InvalidReceipt, NonFiniteLogits.
    """
    run = _Run(model, token_ids, watch, imputations)
    size = max_rows if max_rows is not None else run.affordable_rows()
    if size < 2:
        raise InvalidAblation(f"max_rows is {size}: a pass needs 2 rows at least, the clean one and an ablated one")
    passes = [run.cells[i : i + size - 1] for i in range(0, len(run.cells), size - 1)]
    with torch.no_grad():
        clean = run.clean()
        try:
            rows = run.growing(passes, clean, progress)
            return run.result(clean, rows, method="growing batch", passes=len(passes))
        except AblationError:
            raise
        except Exception as error:  # whatever a foreign model's layer raises when given rows that it did not expect
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            warnings.warn(
                f"the growing batch does not suit {type(model).__name__} ({reason}): sequential", stacklevel=2
            )
            return run.result(clean, run.sequential(progress), method="sequential", reason=reason)


def sweep_sequential(
    model: PreTrainedModel,
    token_ids: Sequence[int],
    watch: Sequence[int | None] = (None, None),
    imputations: Sequence[str | Imputation] = tuple(IMPUTATIONS),
    *,
    progress: Progress | None = None,
) -> Sweep:
    """The same as `sweep` by one forward an ablation: the plain double loop, slow and beyond doubt."""
    run = _Run(model, token_ids, watch, imputations)
    with torch.no_grad():
        return run.result(run.clean(), run.sequential(progress), method="sequential")


class _Clean(NamedTuple):
    """The clean run: last-token logits [vocabulary], head means [layer, head], NaN where there is no head."""

    logits: Tensor
    head_mean: NDArray[np.float64]


class _Disagreement(Exception):
    """A row of a growing batch is not what the same forward gives alone."""


class _Run:
    """One prompt on one model, checked; the two ways through it; and the measuring of what they give."""

    def __init__(
        self,
        model: PreTrainedModel,
        token_ids: Sequence[int],
        watch: Sequence[int | None],
        imputations: Sequence[str | Imputation],
    ) -> None:
        self.model = model
        self.heads: Heads = find_heads(model)
        self.imputations = [as_imputation(imputation) for imputation in imputations]
        if not self.imputations or len({i.name for i in self.imputations}) < len(self.imputations):
            raise InvalidAblation("name at least one imputation, and each only once")
        if any(module.training for module in model.modules()):
            raise InvalidAblation("the model is in training mode, where dropout hides effects: call model.eval()")
        self.embedding: Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]  # [vocabulary, channels]
        vocabulary = len(self.embedding)
        self.token_ids = [_token_id(token) for token in token_ids]
        self.watch = [None if token is None else _token_id(token) for token in watch]
        if not self.token_ids or not self.watch:
            raise InvalidPrompt("a sweep needs at least one prompt token and one watched token")
        if strange := [t for t in (*self.token_ids, *self.watch) if t is not None and not 0 <= t < vocabulary]:
            raise InvalidPrompt(f"no token {strange[0]}: the model has {vocabulary} tokens")
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if longest is not None and len(self.token_ids) > longest:
            raise InvalidPrompt(f"the prompt has {len(self.token_ids)} tokens, the model takes at most {longest}")
        # Layer by layer, the order in which a growing batch takes its rows.
        self.cells = [
            Ablation(imputation, layer.index, head)
            for layer in self.heads.layers
            for imputation in range(len(self.imputations))
            for head in range(layer.heads)
        ]

    def forward(self, rows: int = 1, **how: Any) -> Tensor:
        """Logits of the last token, [rows, vocabulary]."""
        ids = torch.tensor([self.token_ids] * rows, device=self.embedding.device)
        logits: Tensor = self.model(ids, use_cache=False, **how).logits
        return logits[:, -1]

    def clean(self) -> _Clean:
        """The clean run, with no hook but one that looks on. Raises InvalidReceipt, NonFiniteLogits."""
        seen: dict[int, list[NDArray[np.float64]]] = {layer.index: [] for layer in self.heads.layers}

        def look(layer: Layer, projection: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            (z, *_) = args or kwargs.values()
            if z.shape != (1, len(self.token_ids), layer.heads * layer.width):
                raise UnsupportedModel(
                    f"{layer.name} was given {tuple(z.shape)}, not [1, {len(self.token_ids)} tokens, "
                    f"{layer.heads * layer.width} channels]"
                )
            per_head = z.double().unflatten(-1, (layer.heads, layer.width))
            seen[layer.index].append(per_head.mean(dim=(0, 1, 3)).cpu().numpy())

        with ExitStack() as hooks:
            for layer in self.heads.layers:
                handle = layer.projection.register_forward_pre_hook(partial(look, layer), with_kwargs=True)
                hooks.callback(handle.remove)
            (logits,) = self.forward()
        for layer in self.heads.layers:
            if len(seen[layer.index]) != 1:
                raise InvalidReceipt(f"{layer.name} was called {len(seen[layer.index])} times in a forward, not once")
        if not logits.isfinite().all():
            raise NonFiniteLogits("the model's clean logits are not finite")
        head_mean = np.full(self.heads.shape, np.nan)
        for layer in self.heads.layers:
            head_mean[layer.index, : layer.heads] = seen[layer.index][0]
        return _Clean(logits, head_mean)

    def sequential(self, progress: Progress | None) -> Generator[Rows]:
        """One forward for each cell."""
        with HeadAblation(self.model) as hook:
            for done, cell in enumerate(self.cells, start=1):
                hook.edits = {cell.layer: (Edit(cell.head, self.imputations[cell.imputation]),)}
                logits = self.forward()
                yield Rows([cell], logits, [hook.receipt.calls[cell.layer]], hook.receipt.fired[cell.layer])
                if progress is not None:
                    progress(done / len(self.cells))

    def growing(
        self, passes: Sequence[Sequence[Ablation]], clean: _Clean, progress: Progress | None
    ) -> Generator[Rows]:
        """One forward for each pass, of a batch that grows from layer to layer."""
        steps, done = len(passes) * len(self.heads.layers), 0

        def step() -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress(done / steps)

        # Unembed no more than is looked at, where the model can be told so.
        last_only = (
            {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(self.model.forward).parameters else {}
        )
        with HeadAblation(self.model) as hook:
            for cells in passes:
                edits: dict[int, tuple[Edit, ...]] = {}
                rows = 1  # the clean one
                for layer, group in groupby(cells, key=lambda cell: cell.layer):
                    here = [Edit(cell.head, self.imputations[cell.imputation]) for cell in group]
                    edits[layer] = tuple(e._replace(rows=slice(rows + i, rows + i + 1)) for i, e in enumerate(here))
                    rows += len(here)
                hook.edits = edits
                with ExitStack() as growth:
                    for layer in self.heads.layers:
                        grow = partial(_grow, edits.get(layer.index, ()), step)
                        growth.callback(layer.block.register_forward_pre_hook(grow, with_kwargs=True).remove)
                    logits = self.forward(**last_only)  # [rows, vocabulary]
                receipt = hook.receipt
                self._agree(hook, clean, cells, logits)
                fired = [f for layer in sorted(receipt.fired) for f in receipt.fired[layer]]
                yield Rows(cells, logits[1:], [receipt.calls[cell.layer] for cell in cells], fired)

    def _agree(self, hook: HeadAblation, clean: _Clean, cells: Sequence[Ablation], logits: Tensor) -> None:
        """Raise unless rows of a pass are, up to rounding, what they are in a batch that does not grow.

        These are the clean row, which was computed alone, and of each layer the row that was added last.
        """
        last = {cell.layer: row for row, cell in enumerate(cells, start=1)}
        hook.edits = {
            layer: (Edit(cells[row - 1].head, self.imputations[cells[row - 1].imputation], slice(i, i + 1)),)
            for i, (layer, row) in enumerate(last.items())
        }
        expected = torch.cat([clean.logits[None], self.forward(len(last))])
        apart = (logits[[0, *last.values()]] - expected).abs().max()
        # Half of the digits: far above rounding, far below what a row that has seen other rows looks like.
        if not apart <= torch.finfo(logits.dtype).eps ** 0.5 * clean.logits.abs().max():
            raise _Disagreement(f"a row differs from the same forward without growth by {apart:.2g}")

    def affordable_rows(self) -> int:
        """Rows whose activations fit in ROW_BUDGET_BYTES: a layer's widest tensors, and float64 logits."""
        widths = [p.shape for layer in self.heads.layers for p in layer.block.parameters() if p.ndim == 2]
        widest = 4 * max((max(shape) for shape in widths), default=1)
        scores = self.heads.shape[1] * len(self.token_ids)
        per_token = (widest + scores) * self.model.dtype.itemsize
        per_row = len(self.token_ids) * per_token + 3 * 8 * len(self.embedding)
        return max(2, ROW_BUDGET_BYTES // per_row)

    def result(self, clean: _Clean, rows: Generator[Rows], **how: Any) -> Sweep:
        """The arrays, from rows in any order. Raises InvalidReceipt unless every cell is there and was ablated."""
        watched = torch.tensor(_most_probable(self.watch, clean.logits))
        before = _measure(clean.logits[None], watched)
        grid = (len(self.imputations), *self.heads.shape)
        probability, log_probability = np.full((2, len(watched), *grid), np.nan)
        argmax, calls, replaced, changed = np.full((4, *grid), -1, dtype=np.int64)
        margin = np.full(grid, np.nan)
        with closing(rows):  # an error in here must not leave the hooks to the garbage collector
            for batch in rows:
                after = _measure(batch.logits, watched)
                if not after.finite.all():
                    raise NonFiniteLogits(
                        f"logits are not finite with {self._name(batch.cells[int(after.finite.argmin())])}"
                    )
                for row, cell in enumerate(batch.cells):
                    probability[:, *cell] = (after.probability - before.probability)[row]
                    log_probability[:, *cell] = (after.log_probability - before.log_probability)[row]
                    argmax[cell], margin[cell] = after.argmax[row], after.margin[row]
                    calls[cell], (replaced[cell], changed[cell]) = batch.calls[row], batch.fired[row]
        for cell in self.cells:
            elements = len(self.token_ids) * self.heads.layer(cell.layer).width
            if calls[cell] != 1 or replaced[cell] != elements:
                raise InvalidReceipt(
                    f"{self._name(cell)}: {calls[cell]} calls, {replaced[cell]} of {elements} elements replaced"
                )
        return Sweep(
            imputations=tuple(imputation.name for imputation in self.imputations),
            watched=watched.numpy(),
            clean_probability=before.probability[0],
            clean_log_probability=before.log_probability[0],
            clean_argmax=int(before.argmax[0]),
            clean_margin=float(before.margin[0]),
            probability_change=probability,
            log_probability_change=log_probability,
            argmax=argmax,
            margin=margin,
            head_mean=clean.head_mean,
            calls=calls,
            replaced=replaced,
            changed=changed,
            provenance={
                "token_ids": self.token_ids,
                **how,
                **provenance.of_model(self.model),
                **provenance.environment(),
            },
        )

    def _name(self, cell: Ablation) -> str:
        return f"layer {cell.layer}, head {cell.head}, {self.imputations[cell.imputation].name} imputation"


def _token_id(token: Any) -> int:
    try:
        return operator.index(token)
    except TypeError:
        raise InvalidPrompt(f"{token!r} is no token id: a prompt is a list of integers, without rows") from None


def _grow(
    edits: Sequence[Edit], step: Callable[[], None], block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before a decoder layer runs: append a copy of the batch's first row, the clean one, for each of its edits."""
    step()
    if args:
        hidden, *rest = args
        return (_with_copies(hidden, edits), *rest), kwargs
    return (), kwargs | {"hidden_states": _with_copies(kwargs["hidden_states"], edits)}


def _with_copies(hidden: Tensor, edits: Sequence[Edit]) -> Tensor:
    """[rows, tokens, ...] -> [rows + edits, tokens, ...]"""
    if edits and len(hidden) != edits[0].rows.start:  # the rows are not its first dimension
        raise _Disagreement(f"a layer was given {len(hidden)} rows, not {edits[0].rows.start}")
    return torch.cat([hidden, hidden[:1].expand(len(edits), *hidden.shape[1:])])


def _most_probable(watch: Sequence[int | None], logits: Tensor) -> list[int]:
    """The watched tokens, each None replaced by the most probable token that is not among them."""
    free = iter([t for t in logits.topk(2 * len(watch)).indices.tolist() if t not in watch])
    return [next(free) if token is None else int(token) for token in watch]


class _Measured(NamedTuple):
    """Of each row's logits: the watched tokens' values [rows, W], and the prediction [rows]."""

    probability: NDArray[np.float64]
    log_probability: NDArray[np.float64]
    argmax: NDArray[np.int64]
    margin: NDArray[np.float64]
    finite: NDArray[np.bool_]


def _measure(logits: Tensor, watched: Tensor) -> _Measured:
    """logits: [rows, vocabulary]. In float64, where the sum over the vocabulary costs no digits."""
    parts = []
    for some in logits.split(16):  # what a processor's cache holds
        some = some.cpu().double()
        log_probability = some.log_softmax(dim=-1)[:, watched]
        first, argmax = some.max(dim=-1, keepdim=True)  # of equal ones the first
        second = some.scatter(-1, argmax, -torch.inf).amax(dim=-1)
        finite = some.sum(dim=-1).isfinite()
        parts.append((log_probability.exp(), log_probability, argmax[:, 0], first[:, 0] - second, finite))
    return _Measured(*(torch.cat(part).numpy() for part in zip(*parts, strict=True)))
