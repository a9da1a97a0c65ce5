"""A study: one result for each of many tasks, computed in turn or by several processes, joined in the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ablation import provenance
from ablation.models import LoadedModel
from ablation.passes import Progress
from ablation.processes import Processes
from ablation.results import Result
from ablation.studies.checkpoint import Checkpoint
from ablation.studies.plan import Plan, PreparedPlan

Task = Callable[[Progress | None], Result]
"""Computes the result of one prompt, and reports its progress."""


def run_tasks(
    tasks: Sequence[Task],
    settings: Mapping[str, Any],
    checkpoint: Path | str | None,
    *,
    overwrite: bool,
    progress: Progress | None,
) -> Result:
    """Run tasks that do not depend on each other, and return their results as one, in their order.

    settings: everything that the bits of the results depend on. checkpoint: a folder for the tasks that are finished;
    tasks that are finished there are not run again. With a checkpoint, processes started by torchrun or `accelerate
    launch` share the tasks; each returns the whole result. overwrite: discard a checkpoint of other settings. Raises
    the errors of the tasks, InvalidOutput, AblationError if another process has stopped, and OSError.
    """
    if checkpoint is None:
        parts = [task(_part(progress, number, len(tasks))) for number, task in enumerate(tasks)]
        return Result.joined(parts)
    folder, processes = Path(checkpoint), Processes.current()
    if processes.is_first:
        Checkpoint(folder, settings, overwrite=overwrite)
    processes.wait()
    saved = Checkpoint(folder, settings)
    own = range(processes.rank, len(tasks), processes.total)
    for number, index in enumerate(own):
        report = _part(progress, number, len(own))
        if not saved.has(index):
            saved.save(index, tasks[index](report))
        elif report is not None:
            report(1.0)
    processes.wait()
    result = Result.joined([saved.load(index) for index in range(len(tasks))])
    processes.wait()
    if processes.is_first:
        saved.remove()
    return result


def run_plan(
    loaded: LoadedModel,
    plan: Plan,
    task: Callable[[int, PreparedPlan, Mapping[str, Any], Progress | None], Result],
    count: int,
    settings: Mapping[str, Any],
    checkpoint: Path | str | None,
    *,
    overwrite: bool,
    progress: Progress | None,
) -> tuple[Result, PreparedPlan]:
    """Compute the reference of a plan, if it is needed and was not given, and run the tasks of a study.

    task: computes the result of one prompt, given its index, the prepared plan and where the model came from. count: of
    the prompts. settings: what the bits of the results depend on, besides model, environment and plan. The other
    arguments and the errors are those of `run_tasks`.
    """
    known = origin(loaded)
    share = plan.work_of_reference(loaded, count)
    prepared = plan.prepare(loaded, known, subrange(progress, 0, share))
    every = {**_settings_of(loaded, known), **settings, **prepared.settings}
    tasks = [partial(task, index, prepared, known) for index in range(count)]
    rest = subrange(progress, share, 1.0)
    return run_tasks(tasks, every, checkpoint, overwrite=overwrite, progress=rest), prepared


def _settings_of(loaded: LoadedModel, known: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything about a model and its environment that the bits of a result depend on. known: its origin."""
    model = provenance.of_model(loaded.model)
    return {
        **model,
        **known,
        "device": model["device"].partition(":")[0],  # each process may have a GPU of its own
        **provenance.environment(),
    }


def origin(loaded: LoadedModel) -> dict[str, Any]:
    """Return where a model came from, for the provenance."""
    return {
        "model": loaded.name,
        "revision": loaded.revision,
        "source": loaded.source,
        **provenance.weights_digest(loaded.model),
        "ignored_weights": list(loaded.ignored_weights),
    }


def subrange(progress: Progress | None, start: float, end: float) -> Progress | None:
    """Return a callback for the progress of a part of the work. start, end: the part, as shares of the whole."""
    return None if progress is None else lambda share: progress(start + (end - start) * share)


def _part(progress: Progress | None, number: int, count: int) -> Progress | None:
    """Return a callback for the progress of one of `count` equal parts. number: of the part, from 0."""
    return None if progress is None else lambda share: progress((number + share) / count)
