"""The parts of report.html that Bokeh draws: the map and the tables. html_report.js fills them."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from bokeh.models.widgets.tables import DataTable, TableColumn
    from bokeh.plotting import figure

RANKED_BY = "target_probability"
"""The metric by whose mean change heads are ranked."""
CELL_SIZE = 12, 26
"""The least and the largest height of a cell of the map, in pixels."""
TABLE_STYLE = """
.slick-cell, .slick-header-column { font-size: 13px; }
.slick-header-column.slick-header-column { height: 34px; line-height: 1.25; }
.slick-column-name { white-space: normal; }
"""


def map_of_heads(layers: int, heads: int) -> figure:
    """Return the map: a colour for the change, a ring for flips, a dot for means that differ from 0."""
    from bokeh.models import BasicTicker, ColumnDataSource, HoverTool, LinearColorMapper, Range1d, TapTool
    from bokeh.palettes import RdBu11, interp_palette
    from bokeh.plotting import figure
    from bokeh.transform import transform

    fields = ("layer", "head", "value", "radius", "dot", "label", "text", "kept", "receipt")
    source = ColumnDataSource({name: [] for name in fields}, name="cells")
    cell = float(np.clip(1000 / max(layers, heads), *CELL_SIZE))
    plot = figure(
        x_range=Range1d(start=-0.5, end=heads - 0.5),
        y_range=Range1d(start=layers - 0.5, end=-0.5),
        x_axis_label="head",
        y_axis_label="layer",
        sizing_mode="stretch_width",
        height=round(max(layers * cell, 60) + 75),
        max_width=round(max(heads * cell * 1.9, 200) + 150),
        toolbar_location=None,
        tools=[],
        background_fill_color="#d4d4d4",
        outline_line_color=None,
    )
    # The numbers beside the scale take the room that they need at first.
    colours = LinearColorMapper(palette=interp_palette(RdBu11, 255), low=-1e-4, high=1e-4, name="colours")
    common: dict[str, Any] = {"source": source, "nonselection_fill_alpha": 1.0, "nonselection_line_alpha": 1.0}
    common |= {"line_color": "white"}
    selected: dict[str, Any] = {"selection_line_color": "black", "selection_line_width": 3}
    cells = plot.rect("head", "layer", 1, 1, fill_color=transform("value", colours), **common, **selected)
    common |= {"radius_dimension": "min", "fill_color": "black"}
    plot.circle("head", "layer", radius="dot", **common)
    ring = {"line_color": "black", "line_width": 1.5, "fill_alpha": 0, "nonselection_fill_alpha": 0}
    plot.circle("head", "layer", radius="radius", **common | ring)
    tooltip = (
        '<div class="tip" style="max-width: 18em; white-space: normal">'
        "<b>@label</b><br>@text<br>@kept<br><small>@receipt</small></div>"
    )
    plot.add_tools(HoverTool(renderers=[cells], tooltips=tooltip), TapTool(renderers=[cells]))
    plot.add_layout(cells.construct_color_bar(width=12, padding=4, label_standoff=6), "right")
    plot.grid.visible = False
    plot.axis.ticker = BasicTicker(min_interval=1, num_minor_ticks=0)
    plot.axis.axis_label_text_font_style = "normal"
    return plot


def table_of_heads(content: Mapping[str, Any]) -> DataTable:
    """Return the table of all ablations. content: that of the page."""
    from bokeh.models import CustomJSCompare
    from bokeh.models.widgets.tables import TableColumn

    by_place = CustomJSCompare(
        code="const [a, b] = [x, y].map(s => s.match(/\\d+/g).map(Number)); return a[0] - b[0] || a[1] - b[1]"
    )
    longest = max(map(len, content["imputations"]))
    columns = [
        TableColumn(field="imputation", title="imputation", width=min(max(80, 20 + 7 * longest), 190)),
        TableColumn(field="head", title="head", width=70, sorter=by_place),
    ]
    for metric in content["metrics"]:
        columns.append(_number_column(metric["name"], metric, _with_unit(metric)))
        if metric["name"] == RANKED_BY and "low" in metric:
            columns += [_number_column(name, metric, f"95% {name}", 70) for name in ("low", "high")]
            columns.append(_number_column("corrected p", {"decimals": 4}, "corrected p", 80, sign=""))
    prompts = len(content["prompts"])
    kept = _number_column("kept", {"decimals": 0}, f"kept of {prompts}" if prompts > 1 else "kept", 85, sign="")
    place = 6 if prompts > 1 else 3  # after P(target), its interval and its p value
    return _table([*columns[:place], kept, *columns[place:]], 420, frozen=2)


def table_of_prompts(content: Mapping[str, Any]) -> DataTable:
    """Return the table of the prompts under one ablation. content: that of the page."""
    from bokeh.models.widgets.tables import TableColumn

    texts = {"prompt": 180, "target": 110, "clean prediction": 130, "ablated prediction": 140}
    columns = [TableColumn(field=name, title=name, width=width) for name, width in texts.items()]
    for metric in content["metrics"]:
        metric = {**metric, "decimals": metric["single_decimals"]}
        name, unit = metric["title"], f", {metric['clean_unit']}" if metric["clean_unit"] else ""
        columns += [
            _number_column(f"{part} {metric['name']}", metric, f"{part} {name}{unit}", sign="")
            for part in ("clean", "ablated")
        ]
        columns.append(_number_column(f"change {metric['name']}", metric, f"change of {_with_unit(metric)}"))
    return _table(columns, 25 * min(len(content["prompts"]), 11) + 55, frozen=1)


def _with_unit(metric: Mapping[str, Any]) -> str:
    return ", ".join(filter(None, (metric["title"], metric["unit"])))


def _number_column(field: str, metric: Mapping[str, Any], title: str, width: int = 0, sign: str = "+") -> TableColumn:
    from bokeh.models.widgets.tables import HTMLTemplateFormatter, TableColumn

    text = f"number_text(value, {metric['decimals']}, {json.dumps(bool(sign))})"  # of html_report.js
    form = HTMLTemplateFormatter(template=f'<div style="text-align: right"><%= {text} %></div>')
    width = width or 26 + 7 * max(len(title) // 2 + 2, *map(len, title.split(" ")), 0)  # in two lines
    column_title = html.escape(title)  # which Bokeh takes for HTML
    return TableColumn(field=field, title=column_title, width=width, formatter=form, default_sort="descending")


def _table(columns: list[TableColumn], height: int, frozen: int) -> DataTable:
    """frozen: how many columns stay in view when the others are scrolled."""
    from bokeh.models import CDSView, ColumnDataSource, IndexFilter, InlineStyleSheet
    from bokeh.models.widgets.tables import DataTable

    single: dict[str, Any] = {"multi_selectable": False}  # which Bokeh's type stubs lack
    return DataTable(
        source=ColumnDataSource({column.field: [] for column in columns}, name="rows"),
        view=CDSView(filter=IndexFilter(indices=[], name="filter")),
        columns=columns,
        sizing_mode="stretch_width",
        height=height,
        autosize_mode="none",
        index_position=None,
        frozen_columns=frozen,
        stylesheets=[InlineStyleSheet(css=TABLE_STYLE)],
        reorderable=False,
        **single,
    )
