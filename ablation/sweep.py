"""Every head of a model ablated in turn, for one prompt: what each does to the prediction."""

from __future__ import annotations

import inspect
import itertools
import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import islice
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
    AblationNotApplied,
    InvalidAblation,
    InvalidPrompt,
    NonFiniteLogits,
    UnsupportedModel,
)
from ablation.growing import BatchMismatch, growing_batch
from ablation.heads import AttentionLayer, HeadMap, as_index
from ablation.hook import Edit, EditCounts, HeadAblation
from ablation.imputation import IMPUTATIONS, Imputation, as_imputation

# The rows of one pass may take this much memory for their activations, unless `max_rows` says otherwise. Larger passes
# are no faster: a heap that grows beyond some 100 MB is handed back and mapped anew at every operation.
ROW_BUDGET_BYTES = 2**27


@dataclass(frozen=True, eq=False)
class SweepResult:
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
    def has_head(self) -> NDArray[np.bool_]:
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
        flipped: NDArray[np.bool_] = self.has_head & ~self.kept
        return flipped

    def save(self, folder: Path | str) -> None:
        """Write sweep.npz (the arrays) and sweep.json (the rest) into an existing folder. Raises OSError."""
        folder = Path(folder)
        arrays: dict[str, Any] = self._arrays()
        np.savez(folder / "sweep.npz", **arrays)
        rest = {"imputations": self.imputations, "provenance": self.provenance}
        (folder / "sweep.json").write_text(json.dumps(rest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path | str) -> Self:
        """Read back what `save` wrote, equal to the last bit. Raises OSError, ValueError or KeyError."""
        folder = Path(folder)
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
) -> SweepResult:
    """Ablate every head in turn, with each imputation, in one growing batch: exact, and fast.

    Before layer l the batch holds the clean row and the rows ablated in earlier layers. A copy of the clean row joins
    for each (imputation, head) of that layer, and `HeadAblation` ablates one head in each copy. Whatever an ablation
    shares with the clean run is thus computed once; and of the last layer, only what the last token needs. At most
    `max_rows` rows run at once (default: as many as fit in ROW_BUDGET_BYTES); further ablations take further passes.

    Where a model's layers do not treat rows alike, so that the batch fails or disagrees with a forward whose batch
    does not grow, `sweep_sequential` takes over, with a warning; `provenance["method"]` says which it was.

    token_ids: the prompt, one row without padding. watch: token ids whose probability is followed, by convention the
    target and the control; None stands for the most probable token of the clean run that is not watched yet.
    Raises InvalidPrompt, InvalidAblation, UnknownImputation, UnsupportedModel, InvalidReceipt, NonFiniteLogits.
    """
    (result,) = sweep_prompts(model, [token_ids], [watch], imputations, max_rows=max_rows, progress=progress)
    return result


def sweep_prompts(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    watch: Sequence[Sequence[int | None]] | None = None,
    imputations: Sequence[str | Imputation] = tuple(IMPUTATIONS),
    *,
    max_rows: int | None = None,
    progress: Progress | None = None,
) -> list[SweepResult]:
    """`sweep` for several prompts, each as it is alone but for rounding: those of one length share forward passes.

    prompts: token ids, each without padding. watch: for each prompt what `sweep` takes. See there for the rest.
    """
    watch = [(None, None)] * len(prompts) if watch is None else watch
    if not prompts or len(watch) != len(prompts):
        raise InvalidPrompt(f"there are {len(prompts)} prompts, and tokens to watch for {len(watch)}")
    run = _Run(model, imputations)
    asked = [run.prompt(*pair) for pair in zip(prompts, watch, strict=True)]
    found: dict[int, SweepResult] = {}
    with torch.no_grad():
        for group in run.groups(asked, max_rows):
            part = _part(progress, len(found) / len(asked), len(group) / len(asked))
            found |= zip(group, run.sweep([asked[index] for index in group], max_rows, part), strict=True)
    return [found[index] for index in range(len(asked))]


def sweep_sequential(
    model: PreTrainedModel,
    token_ids: Sequence[int],
    watch: Sequence[int | None] = (None, None),
    imputations: Sequence[str | Imputation] = tuple(IMPUTATIONS),
    *,
    progress: Progress | None = None,
) -> SweepResult:
    """The same as `sweep` by one forward an ablation: the plain double loop, slow and beyond doubt."""
    run = _Run(model, imputations)
    with torch.no_grad():
        return run.sequential(run.prompt(token_ids, watch), _part(progress, 0, 1))


def _part(progress: Progress | None, start: float, share: float) -> Progress:
    """The progress of a part of the work."""
    return lambda done: None if progress is None else progress(start + share * done)


class _Prompt(NamedTuple):
    """A prompt and the tokens that are watched, checked."""

    token_ids: list[int]
    watch: list[int | None]


class _Run:
    """A model and the imputations, checked; and the two ways through a prompt."""

    def __init__(self, model: PreTrainedModel, imputations: Sequence[str | Imputation]) -> None:
        self.model = model
        self.hook = HeadAblation(model)
        self.heads: HeadMap = self.hook.heads
        self.imputations = [as_imputation(imputation) for imputation in imputations]
        if not self.imputations or len({i.name for i in self.imputations}) < len(self.imputations):
            raise InvalidAblation("name at least one imputation, and each only once")
        if any(module.training for module in model.modules()):
            raise InvalidAblation("the model is in training mode, where dropout hides effects: call model.eval()")
        self.embedding: Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]  # [vocabulary, channels]
        # Unembed no more than is looked at, where the model can be told so.
        takes = inspect.signature(model.forward).parameters
        self.last_only: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        # Layer by layer, the order in which a growing batch takes its rows.
        self.cells = [
            Ablation(imputation, layer.index, head)
            for layer in self.heads.layers
            for imputation in range(len(self.imputations))
            for head in range(layer.num_heads)
        ]

    def prompt(self, token_ids: Sequence[int], watch: Sequence[int | None]) -> _Prompt:
        """A prompt, checked. Raises InvalidPrompt."""
        ids = [_token_id(token) for token in token_ids]
        watched = [None if token is None else _token_id(token) for token in watch]
        vocabulary = len(self.embedding)
        if not ids or not watched:
            raise InvalidPrompt("a sweep needs at least one prompt token and one watched token")
        if strange := [token for token in (*ids, *watched) if token is not None and not 0 <= token < vocabulary]:
            raise InvalidPrompt(f"no token {strange[0]}: the model has {vocabulary} tokens")
        if len(watched) > vocabulary:
            raise InvalidPrompt(f"{len(watched)} tokens cannot be watched: the model has {vocabulary}")
        longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if longest is not None and len(ids) > longest:
            raise InvalidPrompt(f"the prompt has {len(ids)} tokens, the model takes at most {longest}")
        return _Prompt(ids, watched)

    def groups(self, prompts: Sequence[_Prompt], max_rows: int | None) -> list[list[int]]:
        """Indices of the prompts that share their passes: they are of one length, and all their rows fit into one."""
        lengths = [len(prompt.token_ids) for prompt in prompts]
        groups = []
        for length in dict.fromkeys(lengths):
            alike = [index for index, other in enumerate(lengths) if other == length]
            size = max(1, self.rows(length, max_rows) // (1 + len(self.cells)))
            groups += [alike[i : i + size] for i in range(0, len(alike), size)]
        return groups

    def rows(self, tokens: int, max_rows: int | None) -> int:
        """Rows of a pass: those asked for, or those whose widest tensors and logits fit in ROW_BUDGET_BYTES."""
        if max_rows is None:
            shapes = [p.shape for layer in self.heads.layers for p in layer.block.parameters() if p.ndim > 1]
            widest = 4 * max((max(shape) for shape in shapes), default=1)
            scores = self.heads.shape[1] * tokens
            logits = len(self.embedding) * (1 if self.last_only else tokens)
            per_row = (tokens * (widest + scores) + logits) * self.model.dtype.itemsize
            return max(2, ROW_BUDGET_BYTES // per_row)
        if max_rows < 2:
            raise InvalidAblation(f"max_rows is {max_rows}: a pass needs 2 rows, a clean one and an ablated one")
        return max_rows

    def forward(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Logits of the last token, [rows, vocabulary]."""
        # An embedding on the meta device waits elsewhere, and brings its inputs to where it will be.
        ids = torch.tensor(rows, device="cpu" if self.embedding.is_meta else self.embedding.device)
        logits: Tensor = self.model(ids, use_cache=False, **self.last_only).logits
        return logits[:, -1]

    def plain(self, prompt: _Prompt, cells: Sequence[Ablation] = ()) -> tuple[_Cells, Tensor]:
        """A forward that does not grow: the clean run, in its last row, and logits [cells, vocabulary] of some cells.

        Raises InvalidReceipt, NonFiniteLogits, and UnsupportedModel where a projection is not given every head's z.
        """
        rows, tokens = len(cells) + 1, len(prompt.token_ids)
        head_mean = np.full(self.heads.shape, np.nan)

        def look(layer: AttentionLayer, projection: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            (z, *_) = args or kwargs.values()
            if z.shape != (rows, tokens, layer.num_heads * layer.head_dim):
                raise UnsupportedModel(
                    f"{layer.projection_name} was given {tuple(z.shape)}, not [{rows} rows, {tokens} tokens, "
                    f"{layer.num_heads * layer.head_dim} channels]"
                )
            per_head = z[-1].cpu().double().unflatten(-1, (layer.num_heads, layer.head_dim))
            head_mean[layer.index, : layer.num_heads] = per_head.mean(dim=(0, 2)).numpy()

        with self.hook as hook, ExitStack() as hooks:
            hook.edits = self.edits(cells, 0, 1)
            for layer in self.heads.layers:
                handle = layer.projection.register_forward_pre_hook(partial(look, layer), with_kwargs=True)
                hooks.callback(handle.remove)
            logits = self.forward([prompt.token_ids] * rows)
            for layer in self.heads.layers:
                if (calls := hook.receipt.calls[layer.index]) != 1:
                    raise AblationNotApplied(
                        f"{layer.projection_name} was called {calls} times in one forward, not once"
                    )
        if not logits[-1].isfinite().all():
            raise NonFiniteLogits("the model's clean logits are not finite")
        return _Cells(self, prompt, logits[-1], head_mean), logits[:-1]

    def sequential(self, prompt: _Prompt, progress: Progress, **how: Any) -> SweepResult:
        """One forward for each cell."""
        found, _ = self.plain(prompt)
        with self.hook as hook:
            for done, cell in enumerate(self.cells, start=1):
                hook.edits = self.edits([cell], 0, 1)
                logits = self.forward([prompt.token_ids])
                found.add([cell], logits, [hook.receipt.calls[cell.layer]], hook.receipt.counts[cell.layer])
                progress(done / len(self.cells))
        return found.result(method="sequential", **how)

    def edits(self, cells: Sequence[Ablation], first: int, prompts: int) -> dict[int, tuple[Edit, ...]]:
        """An edit for each row: from row `first` on, a cell after the other, each for all prompts."""
        rows = itertools.count(first)
        edits: dict[int, tuple[Edit, ...]] = {}
        for cell in cells:
            here = [Edit(cell.head, self.imputations[cell.imputation], slice(r, r + 1)) for r in islice(rows, prompts)]
            edits[cell.layer] = (*edits.get(cell.layer, ()), *here)
        return edits

    def sweep(self, prompts: Sequence[_Prompt], max_rows: int | None, progress: Progress) -> list[SweepResult]:
        """The prompts in one growing batch; each alone, if that does not suit the model; and at last sequentially."""
        for narrow in (True, False):
            try:
                return self.growing(prompts, max_rows, progress, narrow)
            except AblationError:
                raise
            except Exception as error:  # whatever a foreign model's layer raises when given what it did not expect
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
        if len(prompts) > 1:
            parts = [_part(progress, i / len(prompts), 1 / len(prompts)) for i in range(len(prompts))]
            return [self.sweep([prompt], max_rows, part)[0] for prompt, part in zip(prompts, parts, strict=True)]
        warnings.warn(
            f"the growing batch does not suit {type(self.model).__name__} ({reason}): sequential", stacklevel=4
        )
        return [self.sequential(prompts[0], progress, reason=reason)]

    def growing(
        self, prompts: Sequence[_Prompt], max_rows: int | None, progress: Progress, narrow: bool
    ) -> list[SweepResult]:
        """One forward for each pass: clean rows, one for each prompt, and, as the batch grows, one for each edit."""
        ids, several = [prompt.token_ids for prompt in prompts], len(prompts)
        places = self.rows(len(ids[0]), max_rows) // several - 1  # of a pass, for cells
        size = math.ceil(len(self.cells) / math.ceil(len(self.cells) / places))  # of passes that are alike
        passes = [self.cells[i : i + size] for i in range(0, len(self.cells), size)]
        steps = len(passes) * len(self.heads.layers)
        done = itertools.count(1)
        probes, plain = self.probes(), dict[Ablation, Tensor]()
        for i in range(0, len(probes), places):
            some = probes[i : i + places]
            found, logits = zip(*[self.plain(prompt, some) for prompt in prompts], strict=True)
            plain |= zip(some, torch.stack(logits, dim=1), strict=True)
        with self.hook as hook:
            for cells in passes:
                hook.edits = self.edits(cells, several, several)
                added = {layer: len(edits) // several for layer, edits in hook.edits.items()}
                with growing_batch(self.heads, several, added, narrow, lambda: progress(next(done) / steps)):
                    logits = self.forward(ids).unflatten(0, (-1, several))  # [1 + cells, prompts, vocabulary]
                _agree(logits[0], torch.stack([of_prompt.clean for of_prompt in found]))
                for row, cell in zip(logits[1:], cells, strict=True):
                    if cell in plain:
                        _agree(row, plain[cell])
                fired = [f for layer in sorted(hook.receipt.counts) for f in hook.receipt.counts[layer]]
                calls = [hook.receipt.calls[cell.layer] for cell in cells]
                for i, of_prompt in enumerate(found):
                    of_prompt.add(cells, logits[1:, i], calls, fired[i::several])
        how = {"method": "growing batch", "passes": len(passes), "prompts": several}
        return [of_prompt.result(**how) for of_prompt in found]

    def probes(self) -> list[Ablation]:
        """The cells that are compared with a batch that does not grow, where they are in another order.

        Of each layer the last one: in some models only the rows of a layer between are mixed up (HY-V4).
        """
        return list({cell.layer: cell for cell in self.cells}.values())[::-1]

    def name(self, cell: Ablation) -> str:
        """A cell in words."""
        return f"layer {cell.layer}, head {cell.head}, {self.imputations[cell.imputation].name} imputation"


def _agree(growing_batch: Tensor, plain: Tensor) -> None:
    """Raise Disagreement unless logits [rows, vocabulary] are alike, up to rounding."""
    apart = (growing_batch - plain).abs().max()
    # How far logits are spread, by medians: what a model adds to all of them, or masks some tokens with, is not in it.
    spread = (plain - plain.median(dim=-1, keepdim=True).values).abs().median(dim=-1).values.max()
    # Half of the digits: far above rounding, far below what a row that has seen other rows looks like.
    if not apart <= torch.finfo(plain.dtype).eps ** 0.5 * 4 * spread:
        raise BatchMismatch(f"a row differs from the same forward without growth by {apart:.2g}")


class _Cells:
    """The arrays of one prompt's sweep, filled cell by cell in any order."""

    def __init__(self, run: _Run, prompt: _Prompt, clean: Tensor, head_mean: NDArray[np.float64]) -> None:
        self.run, self.prompt, self.clean, self.head_mean = run, prompt, clean, head_mean
        self.watched = torch.tensor(_most_probable(prompt.watch, clean), device="cpu")
        self.before = _measure(clean[None], self.watched)
        grid = (len(run.imputations), *run.heads.shape)
        self.probability, self.log_probability = np.full((2, len(self.watched), *grid), np.nan)
        self.argmax, self.calls, self.replaced, self.changed = np.full((4, *grid), -1, dtype=np.int64)
        self.margin = np.full(grid, np.nan)

    def add(self, cells: Sequence[Ablation], logits: Tensor, calls: Sequence[int], fired: Sequence[EditCounts]) -> None:
        """What some ablations gave: last-token logits [cells, vocabulary], and the receipt of each."""
        after = _measure(logits, self.watched)
        if not after.finite.all():
            raise NonFiniteLogits(f"logits are not finite with {self.run.name(cells[int(after.finite.argmin())])}")
        for row, (cell, called, receipt) in enumerate(zip(cells, calls, fired, strict=True)):
            self.probability[:, *cell] = (after.probability - self.before.probability)[row]
            self.log_probability[:, *cell] = (after.log_probability - self.before.log_probability)[row]
            self.argmax[cell], self.margin[cell] = after.argmax[row], after.margin[row]
            self.calls[cell], (self.replaced[cell], self.changed[cell]) = called, receipt

    def result(self, **how: Any) -> SweepResult:
        """The sweep. Raises InvalidReceipt unless every cell is there and was ablated."""
        run, before = self.run, self.before
        for cell in run.cells:
            elements = len(self.prompt.token_ids) * run.heads.layer(cell.layer).head_dim
            if self.calls[cell] != 1 or self.replaced[cell] != elements:
                raise AblationNotApplied(
                    f"{run.name(cell)}: {self.calls[cell]} calls, {self.replaced[cell]} of {elements} elements replaced"
                )
        return SweepResult(
            imputations=tuple(imputation.name for imputation in run.imputations),
            watched=self.watched.numpy(),
            clean_probability=before.probability[0],
            clean_log_probability=before.log_probability[0],
            clean_argmax=int(before.argmax[0]),
            clean_margin=float(before.margin[0]),
            probability_change=self.probability,
            log_probability_change=self.log_probability,
            argmax=self.argmax,
            margin=self.margin,
            head_mean=self.head_mean,
            calls=self.calls,
            replaced=self.replaced,
            changed=self.changed,
            provenance={
                "token_ids": self.prompt.token_ids,
                **how,
                **provenance.of_model(run.model),
                **provenance.environment(),
            },
        )


def _token_id(token: Any) -> int:
    try:
        return as_index(token)
    except TypeError:
        raise InvalidPrompt(f"{token!r} is no token id: a prompt is a list of integers, without rows") from None


def _most_probable(watch: Sequence[int | None], logits: Tensor) -> list[int]:
    """The watched tokens, each None replaced by the most probable token that is not among them."""
    free = logits.clone()
    free[[token for token in watch if token is not None]] = -torch.inf
    watched = []
    for token in watch:
        if token is None:
            token = int(free.max(dim=-1).indices)  # of equal ones the first
            free[token] = -torch.inf
        watched.append(token)
    return watched


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
    scratch = torch.empty(4, logits.shape[1], dtype=torch.float64, device="cpu")  # what a processor's cache holds
    for some in logits.split(len(scratch)):
        rest = scratch[: len(some)].copy_(some)
        finite = rest.sum(dim=-1).isfinite()
        of_watched = rest[:, watched]
        first, argmax = rest.max(dim=-1, keepdim=True)  # of equal ones the first
        second = rest.scatter_(-1, argmax, -torch.inf).amax(dim=-1)
        log_sum = first + rest.sub_(first).exp_().sum(dim=-1, keepdim=True).log1p()
        log_probability = of_watched - log_sum
        parts.append((log_probability.exp(), log_probability, argmax[:, 0], first[:, 0] - second, finite))
    return _Measured(*(torch.cat(part).numpy() for part in zip(*parts, strict=True)))
