"""The figure of a sweep of a text: the change of the loss by each head."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib import style

from ablation.figures.drawn import CHANCE, Change, names_of_imputations
from ablation.figures.labels import MINUS, STYLE, add_title, name_heads
from ablation.figures.maps import Group, Panel, maps
from ablation.reports.report import where
from ablation.results import LOSS, Result
from ablation.studies import statistics


def draw(result: Result, folder: Path | str, *, title: str) -> Path:
    """Draw a map per imputation, of the mean change over the windows, as loss.png in an existing folder.

    result: of `ablation.studies.texts.sweep_text`. title: the model. Raises OSError.
    """
    effects = statistics.effects(result, LOSS)
    several = len(result.prompts) > 1
    mean, low, high = (result.grid(values) for values in (effects.mean, effects.low, effects.high))
    of_prompts, differs = result.grid(result.change(LOSS)), result.grid(effects.differs)
    change = Change(of_prompts, mean, *((low, high, differs) if several else (None, None, None)))
    names = names_of_imputations(result)
    panels = [Panel(mean[i], [name], None, change.certain(i)) for i, name in enumerate(names)]
    clean = f"{effects.clean:.3f}".replace("-", MINUS)
    place = change.strongest
    if place is None:
        beyond = f" on average, beyond chance ({CHANCE})" if several and np.nan_to_num(of_prompts).any() else ""
        finding = f"no ablation changes the loss of {clean} nats per token{beyond}"
    else:
        imputation, layer, head = place
        name = f"L{layer}H{head} ({names[imputation]})"
        finding = f"{name} changes the loss of {clean} nats per token most, by {change.amount(place, 'nats')}"
    tokens = sum(len(prompt.target) for prompt in result.prompts)
    path = Path(folder, "loss.png")
    with style.context(["default", STYLE]):
        drawing = maps(result.has_head, [Group(panels, "change of the loss (nats per token)")], finding)
        at = where(result)
        ablated = "" if at == "at every token" else f"; heads ablated {at}"
        add_title(drawing.figure, finding, f"{title}: {tokens} tokens of a text{ablated}")
        for axes, panel in drawing.maps:
            name_heads(axes, panel.values, panel.flipped)
        drawing.figure.savefig(path, backend="agg")
    return path
