"""Hooks on modules that act in one thread, that copies of a module do not carry, and that compiled code cannot omit."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

Hook = Callable[..., Any]

TABLES = ("_forward_pre_hooks", "_forward_hooks")
"""Where a module keeps its hooks: {id: hook}. A hook with options has its id in further tables of the same kind."""


class Owner(Protocol):
    """An ablation. thread: the thread in which its hooks act."""

    thread: int | None


class OwnedHook:
    """A hook of an ablation. It acts only in the thread of its owner, unless any_thread is set."""

    def __init__(self, function: Hook, owner: Owner, any_thread: bool) -> None:
        self.owner = owner
        self._function = function
        self._any_thread = any_thread

    def __call__(self, *args: Any) -> Any:
        """Call the hook, in its own thread."""
        return self._function(*args) if self._any_thread or self.owner.thread == threading.get_ident() else None

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy as a hook that does nothing: a module with a `__getstate__` of its own may copy its tables whole."""
        return (partial, (_do_nothing,))


def _do_nothing(*_: object) -> None:
    return None


def register(
    module: nn.Module, function: Hook, *, owner: Owner, after: bool = False, any_thread: bool = False
) -> Callable[[], None]:
    """Register a forward pre-hook with keyword arguments, or a forward hook if `after`.

    Returns a function that removes the hook.
    """
    hook = OwnedHook(function, owner, any_thread)
    handle = module.register_forward_hook(hook) if after else module.register_forward_pre_hook(hook, with_kwargs=True)
    module.__dict__["__reduce_ex__"] = partial(_reduce_without_owned_hooks, module)

    def remove() -> None:
        handle.remove()
        if not _owned_hooks(module):
            module.__dict__.pop("__reduce_ex__", None)

    return remove


def owners(module: nn.Module) -> set[Owner]:
    """Return the ablations that have hooks on a module itself."""
    return {hook.owner for hook in _owned_hooks(module).values()}


def remove_owned_hooks(model: nn.Module) -> set[Owner]:
    """Remove the hooks of all ablations from a model and its parts. Returns the ablations that they belonged to."""
    found: set[Owner] = set()
    for module in model.modules():
        owned = _owned_hooks(module)
        found |= {hook.owner for hook in owned.values()}
        for table in _tables(vars(module)).values():
            for key in owned:
                table.pop(key, None)  # in place, since handles of the user's hooks refer to this table
        if owned:
            vars(module).pop("__reduce_ex__", None)
    return found


def _owned_hooks(module: nn.Module) -> dict[int, OwnedHook]:
    tables = (vars(module).get(table, {}) for table in TABLES)
    return {key: hook for table in tables for key, hook in table.items() if isinstance(hook, OwnedHook)}


def _tables(state: dict[str, Any]) -> dict[str, dict[int, Any]]:
    """Return the tables of hooks in a module's state, with those that hold the options of hooks."""
    return {name: table for name, table in state.items() if name.startswith(TABLES) and isinstance(table, dict)}


def _reduce_without_owned_hooks(module: nn.Module, protocol: Any) -> Any:
    """`__reduce_ex__` of a module with hooks, without these hooks: its result is what is copied and pickled."""
    reduced = type(module).__reduce_ex__(module, protocol)
    if not isinstance(reduced, tuple) or len(reduced) < 3 or not isinstance(reduced[2], dict):
        return reduced
    owned = _owned_hooks(module)
    state = reduced[2] | {
        name: type(table)((key, hook) for key, hook in table.items() if key not in owned)
        for name, table in _tables(reduced[2]).items()
    }
    state.pop("__reduce_ex__", None)
    return (*reduced[:2], state, *reduced[3:])


_lock = threading.Lock()
_eager_users = 0
_stance: Any = None


@contextmanager
def compiled_code_runs_eagerly() -> Iterator[None]:
    """Context manager in which code compiled by `torch.compile` runs eagerly, in the whole process.

    Compiled code that calls the model was traced without the hooks of this package, or would keep them forever.
    """
    global _eager_users, _stance
    if not hasattr(torch.compiler, "set_stance"):  # torch 2.5
        yield
        return
    with _lock:
        if not _eager_users:
            _stance = torch.compiler.set_stance("force_eager")
        _eager_users += 1
    try:
        yield
    finally:
        with _lock:
            _eager_users -= 1
            if not _eager_users:
                _stance.__exit__(None, None, None)
