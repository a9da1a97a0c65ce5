"""The figure of a sweep of a text: the change of the loss by each head."""

from __future__ import annotations

from pathlib import Path

from matplotlib import style

from ablation import statistics
from ablation.figures import STYLE, Group, Panel, maps
from ablation.figures_of_prompts import MINUS, Change, add_title, name_heads, printable
from ablation.results import LOSS, Result


def draw(result: Result, folder: Path | str, *, title: str) -> Path:
    """Draw a map per imputation, of the mean change over the windows, as loss.png in an existing folder.

    result: of `ablation.texts.sweep_text`. title: the model. Raises OSError.
    """
    effects = statistics.effects(result, LOSS)
    several = len(result.prompts) > 1
    mean, low, high = (result.grid(values) for values in (effects.mean, effects.low, effects.high))
    change = Change(result.grid(result.change(LOSS)), mean, low if several else None, high if several else None)
    panels = [Panel(mean[i], [printable(name)], None, change.certain(i)) for i, name in enumerate(result.imputations)]
    clean = f"{effects.clean:.3f}".replace("-", MINUS)
    place = change.strongest
    if place is None:
        finding = f"No ablation changes the loss of {clean} nats per token"
    else:
        imputation, layer, head = place
        verb = "raises" if mean[place] > 0 else "lowers"
        name = f"L{layer}H{head} ({printable(result.imputations[imputation])})"
        finding = f"{name} {verb} the loss of {clean} nats per token most, by {change.amount(place, 'nats')}"
    tokens = sum(len(prompt.target) for prompt in result.prompts)
    path = Path(folder, "loss.png")
    with style.context(["default", STYLE]):
        drawing = maps(result.has_head, [Group(panels, "change of the loss (nats per token)")], finding)
        add_title(drawing.figure, finding, f"{title}: {tokens} tokens of a text")
        for axes, panel in drawing.maps:
            name_heads(axes, panel.values, panel.flipped)
        drawing.figure.savefig(path, backend="agg")
    return path
