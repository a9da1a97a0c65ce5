"""`HeadAblation`, a context manager that replaces the output of heads and MLPs in every forward pass of a model."""

from __future__ import annotations

import inspect
import math
import threading
import traceback
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ablation.edits import (
    Ablation,
    Edit,
    Receipt,
    apply_edits,
    described,
    edits_by_layer,
    verify_called_once,
    verify_replaced,
)
from ablation.errors import AblationNotApplied, InvalidAblation
from ablation.heads import AttentionLayer, HeadMap, find_heads
from ablation.imputation import Imputation
from ablation.module_hooks import compiled_code_runs_eagerly, owners, register, remove_owned_hooks
from ablation.projections import Key, MLPOutput, Projection
from ablation.rows import Rows, rows_of_forward
from ablation.units import Pair


@dataclass(frozen=True)
class _ModelCall:
    """A call of the model whose decoder has not started yet. mask: the attention mask that the model was given."""

    mask: Any


@dataclass
class _Forward:
    """One forward pass of the decoder.

    edits, rows: those of its ablation. waiting: whether no earlier forward pass has made these edits. grad: whether
    gradients were enabled when it began. checkpointed: whether backward() runs its layers again. recomputed: the
    projections that the current backward() has run again. shape: rows and tokens of the last z.
    """

    edits: Mapping[Key, Sequence[Edit]]
    rows: Rows
    receipt: Receipt
    grad: bool
    waiting: bool = False
    checkpointed: bool = False
    recomputed: set[Key] = field(default_factory=set)
    shape: tuple[int, ...] = ()


class HeadAblation:
    """A context manager that replaces the output of attention heads, and of MLPs, in every forward pass of a model.

    with HeadAblation(model) as ablation:       # nothing is ablated yet: the logits are the model's, bit for bit
        ablation.ablate([(9, 6)], "mean")       # layer 9, head 6
        logits = model(input_ids).logits
        ablation.clear()

    Entering registers one forward pre-hook on each attention output projection; two hooks on the decoder, which begin
    and verify the receipt; and two on the model, which keep the attention mask and verify that the decoder's hooks ran.
    The first ablation of an MLP registers one forward hook on its last projection, whose output, with its bias, is what
    (layer, "mlp") replaces. The hooks never write into a tensor that they receive. Leaving, also by an exception,
    removes these hooks and changes nothing else. The context manager can be entered again.

    An ablation acts in the thread that set it: forward passes in other threads are not ablated, so a worker thread
    calls `ablate` itself. Copies and pickles of the model carry no ablation. Until the exit, code compiled by
    `torch.compile` runs eagerly in the whole process, since compiled code may omit hooks. The model may be in training
    mode. Layers that gradient checkpointing runs again in `backward()` are ablated as in the forward pass; call
    `backward()` before the exit.

    heads: the `HeadMap` of the model. edits: {layer: edits of its heads, (layer, "mlp"): edits of its MLP} in force;
    empty if nothing is ablated.

    Raises UnsupportedModel if the heads of the model cannot be ablated correctly.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.heads: HeadMap = find_heads(model)
        self.edits: Mapping[Key, Sequence[Edit]] = {}
        self._model = model
        self._installed: ExitStack | None = None
        self._hooked_mlps: set[Key] = set()
        self.thread: int | None = None
        self._reset()

    def _reset(self) -> None:
        self.edits = {}
        self._receipt = Receipt(self.heads.num_layers)
        self._pending = False
        """Whether heads were set, and no forward pass has ablated them yet."""
        self._ever_ablated = self._ever_ran = False
        self._model_call: _ModelCall | None = None
        self._forward: _Forward | None = None
        self._backward: tuple[int, _Forward] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy is not entered, and belongs to the copied model."""
        return HeadAblation, (self._model,)

    @property
    def receipt(self) -> Receipt:
        """The receipt of the last forward pass.

        Raises AblationNotApplied if no forward pass has used the heads in force.
        """
        if self._pending:
            raise AblationNotApplied(self._not_applied())
        return self._receipt

    def __enter__(self) -> Self:
        """Register the hooks. Raises InvalidAblation if the model already carries an ablation."""
        decoder = self.heads.decoder
        if self._installed is not None or owners(decoder):
            raise InvalidAblation(
                "the model already carries an ablation: leave it first, ablate all heads with it, or take it off with "
                "HeadAblation.remove_from(model)"
            )
        with ExitStack() as hooks:
            hooks.callback(register(self._model, self._remember_mask, owner=self))
            hooks.callback(register(decoder, self._begin_forward, owner=self))
            for layer in self.heads.layers:
                # In any thread: autograd recomputes layers in threads of its own.
                edit = partial(self._edit_input, layer)
                hooks.callback(register(layer.projection, edit, owner=self, any_thread=True))
            hooks.callback(register(decoder, self._end_forward, owner=self, after=True))
            hooks.callback(register(self._model, self._verify_decoder_ran, owner=self, after=True))
            hooks.enter_context(compiled_code_runs_eagerly())
            self._installed = hooks.pop_all()
        self.thread = threading.get_ident()
        return self

    def __exit__(self, kind: type[BaseException] | None = None, *_: object) -> None:
        """Remove the hooks. Then raise AblationNotApplied if no forward pass has ablated the heads in force.

        It is also raised if heads were set and cleared, and no forward pass has run at all. If an exception is on its
        way, that exception propagates instead.
        """
        not_applied = self._pending or (self._ever_ablated and not self._ever_ran)
        problem = self._not_applied()
        self._uninstall()
        if not_applied and kind is None:
            raise AblationNotApplied(problem)

    def _uninstall(self) -> None:
        receipt = self._receipt
        self._reset()
        self._receipt = receipt  # it can still be read
        if self._installed is not None:
            self._installed.close()
            self._installed = None
            self._hooked_mlps.clear()

    @staticmethod
    def remove_from(model: nn.Module) -> None:
        """Remove the hooks of every ablation from a model, for instance after a notebook cell has lost its ablation."""
        for owner in remove_owned_hooks(model):
            assert isinstance(owner, HeadAblation)
            owner._uninstall()

    def ablate(
        self,
        heads: Iterable[Pair],
        imputation: str | Imputation = "zero",
        positions: str | Iterable[int] | None = None,
    ) -> None:
        """Ablate these (layer, head) pairs, and no others, in every row of this thread's following forward passes.

        (layer, "mlp") stands for the MLP of a layer. positions: at which tokens; see `Ablation`. With a key/value
        cache, positions count from the first token of the sequence, and positions from its end are refused.

        Raises InvalidHead and UnknownImputation, after which the previous heads stay in force; InvalidAblation for
        positions or values that do not fit, and if the context manager is not entered; and AblationNotApplied if no
        forward pass has ablated the previous heads. After AblationNotApplied, which reports an earlier fault, the new
        heads are in force.
        """
        if self._installed is None:
            raise InvalidAblation("the ablation is not installed, so it would never fire: enter it first, using `with`")
        self.set_edits(edits_by_layer([(Ablation(heads, imputation, positions).validated(self.heads), None)]))

    def clear(self) -> None:
        """Ablate nothing: following forward passes give the model's own logits."""
        self._pending = False
        self.set_edits({})

    def set_edits(self, edits: Mapping[Key, Sequence[Edit]]) -> None:
        """Put edits into force, each of one row or of all; see `edits`. Raises AblationNotApplied like `ablate`."""
        problem = self._not_applied() if self._pending else None
        for key in edits:
            if isinstance(key, tuple):
                self._hook_mlp(self.heads.mlp(key[0]))
        self.edits, self._forward, self.thread = edits, None, threading.get_ident()
        self._pending = any(edits.values())
        self._ever_ablated |= self._pending
        if problem is not None:
            raise AblationNotApplied(problem)

    def _hook_mlp(self, mlp: MLPOutput) -> None:
        """Register the hook of an MLP, once. It stays until the exit, as backward() may recompute the MLP."""
        if mlp.key not in self._hooked_mlps and self._installed is not None:
            edit = partial(self._edit_output, mlp)
            self._installed.callback(register(mlp.projection, edit, owner=self, after=True, any_thread=True))
            self._hooked_mlps.add(mlp.key)

    def _not_applied(self) -> str:
        edited = [(key, edit.head) for key, edits in self.edits.items() for edit in edits]
        pairs = [described(key if isinstance(key, tuple) else (key, head)) for key, head in edited]
        somewhere = any(edit.positions is not None for edits in self.edits.values() for edit in edits)
        return (
            f"{pairs[0] if pairs else 'a head'} was set to be ablated, but no forward pass did it: the model was not "
            "run before the heads were set again or the context was left, or another object or thread ran in its place"
            + (", or no row had a token at the positions" if somewhere else "")
        )

    def _remember_mask(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Model pre-hook: keep the 2-D mask; a multi-part model passes masks derived from it to its decoder."""
        self._model_call = _ModelCall(_named_arguments(model, args, kwargs).get("attention_mask"))

    def _begin_forward(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Decoder pre-hook: begin a receipt, and look at the rows if an edit depends on other tokens or positions."""
        call, self._model_call = self._model_call, None
        if _backward_task() is not None and self._ever_ablated:
            raise AblationNotApplied(
                "backward() runs the whole model again, and the heads in force may be others by now: checkpoint its "
                "layers instead, or do not checkpoint it"
            )
        self._receipt = Receipt(self.heads.num_layers)
        waiting = self._pending
        self._forward, self._pending, self._ever_ran = None, False, True
        every, rows = [edit for edits in self.edits.values() for edit in edits], Rows()
        whole = any(edit.imputation.reads == "row" or min(edit.positions or (0,)) < 0 for edit in every)
        if whole or any(edit.imputation.by_position or edit.positions is not None for edit in every):
            arguments = _named_arguments(decoder, args, kwargs)
            if call is not None and isinstance(arguments.get("attention_mask"), dict):
                arguments["attention_mask"] = call.mask  # the dict has a mask per layer type, all made from this one
            rows = rows_of_forward(arguments, whole=whole)
        self._forward = _Forward(self.edits, rows, self._receipt, torch.is_grad_enabled(), waiting)

    def _edit_input(
        self, layer: AttentionLayer, projection: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Projection pre-hook: replace the slices of the edited heads in the input."""
        name, z = ("", args[0]) if args else next(iter(kwargs.items()), ("", None))
        edited = self._edited(layer, z)
        if edited is None:
            return None
        return ((edited, *args[1:]), kwargs) if args else ((), kwargs | {name: edited})

    def _edit_output(self, mlp: MLPOutput, projection: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor | None:
        """Hook of an MLP's last projection: replace the output."""
        return self._edited(mlp, output)

    def _edited(self, projection: Projection, z: Any) -> Tensor | None:
        """Count a call of a projection, and return its input or output with the edits, or None if there are none."""
        forward = self._current_forward(projection)
        if forward is None:
            return None
        forward.receipt.count_call(projection.key)
        if isinstance(projection, AttentionLayer) and isinstance(z, Tensor):
            forward.shape = tuple(z.shape[:-1])
        edits = forward.edits.get(projection.key)
        if not edits:
            return None
        self._pending, self._ever_ran = False, True
        # OPT's MLPs see the tokens of all rows in one dimension.
        is_flat = isinstance(z, Tensor) and z.ndim == 2 and len(z) == math.prod(forward.shape)
        edited, counts = apply_edits(z.unflatten(0, forward.shape) if is_flat else z, projection, edits, forward.rows)
        forward.receipt.edited[projection.key] = counts
        return edited.flatten(0, 1) if is_flat else edited

    def _current_forward(self, projection: Projection) -> _Forward | None:
        """Return the forward pass that calls a projection now, which may be one that backward() recomputes in part."""
        task = _backward_task()
        if task is None:
            if threading.get_ident() != self.thread:
                return None
            forward = self._forward or _Forward(self.edits, Rows(), self._receipt, False)  # a layer called by itself
            forward.checkpointed |= forward.grad and (not torch.is_grad_enabled() or _is_recorded_for_recomputing())
            return forward
        if self._backward is not None and self._backward[0] == task:
            forward = self._backward[1]
            if projection.key not in forward.recomputed:
                forward.recomputed.add(projection.key)
                return replace(forward, receipt=Receipt(self.heads.num_layers))
        if self._ever_ablated and _is_own_or_autograd_thread(self.thread):
            raise AblationNotApplied(
                f"backward() runs {projection.projection_name} again, for a forward pass that began before this "
                "ablation was entered: call its backward() before"
            )
        return None

    def _end_forward(self, decoder: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Decoder hook: raise AblationNotApplied unless each edited projection replaced what it should, once."""
        forward, self._forward = self._forward, None
        if forward is None:
            return
        for key, edits in forward.edits.items():
            if edits:
                verify_called_once(self.heads.projection(key), forward.receipt)
        verify_replaced(self.heads, forward.edits, forward.receipt, may_be_none=forward.rows.is_cached)
        if forward.waiting and forward.rows.is_cached:  # a row may get its positions in a later forward pass
            self._pending = not any(count.expected for counts in forward.receipt.counts.values() for count in counts)
        if forward.checkpointed:
            hidden = output[0]
            if isinstance(hidden, Tensor) and hidden.requires_grad:
                hidden.register_hook(partial(self._begin_backward, forward))

    def _begin_backward(self, forward: _Forward, gradient: Tensor) -> None:
        """Tensor hook on the decoder's output: its layers are recomputed next, as in this forward pass."""
        if self._installed is None:
            raise AblationNotApplied(
                "gradient checkpointing runs the layers again in backward(), but their ablation was left: call "
                "backward() inside `with`"
            )
        forward.recomputed.clear()
        task = _backward_task()
        assert task is not None
        self._backward = task, forward

    def _verify_decoder_ran(self, model: nn.Module, args: tuple[Any, ...], output: object) -> None:
        """Model hook: raise if the decoder's hooks did not run. A forward that was traced earlier omits them."""
        if self.edits and self._model_call is not None:
            self._pending, self._ever_ran = False, True
            raise AblationNotApplied("the decoder's hooks did not run, as in a traced forward: nothing was ablated")


def _backward_task() -> int | None:
    """Return the number of the backward pass that is running in this thread, or None."""
    task: int = torch._C._current_graph_task_id()  # private, but what torch's own checkpointing and FSDP ask
    return None if task == -1 else task


def _is_recorded_for_recomputing() -> bool:
    """Whether the forward pass is inside of a non-reentrant `torch.utils.checkpoint`."""
    if not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"):  # torch 2.5
        callers = (frame.f_globals.get("__name__") for frame, _ in traceback.walk_stack(None))
        return "torch.utils.checkpoint" in callers
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"


def _is_own_or_autograd_thread(own: int | None) -> bool:
    """Whether this is a given thread, or one of autograd's: Python did not start those, and calls them dummies."""
    return threading.get_ident() == own or threading.current_thread().name.startswith("Dummy")


def _named_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a module's forward by name."""
    return dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | kwargs
