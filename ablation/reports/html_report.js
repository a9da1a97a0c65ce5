"use strict";
// Fills the map and the tables of the page. Every text of a model or a prompt goes to textContent, or to Bokeh as data.

// A number as text. Digits would hide a small value, which is written with an exponent. The tables use it, too.
globalThis.number_text = (value, decimals, signed) => {
  if (!Number.isFinite(value)) return "not finite";
  const small = value !== 0 && Math.abs(value) < 0.5 * 10 ** -decimals;
  return (signed && value > 0 ? "+" : "") + (small ? value.toExponential(1) : value.toFixed(decimals));
};

(async () => {
  const element = (id) => document.getElementById(id);
  const read = (id) => JSON.parse(element(id).textContent);
  const content = read("content");
  const { imputation, place, metrics, kept } = content;
  const prompts = content.prompts.length;
  const single = new Map(content.listed.map((ablation, index) => [ablation, index]));
  const finite = (value) => value ?? NaN; // JSON has null in its place
  const label = ([layer, head]) => `L${layer}H${head}`;

  const items = read("items");
  const grids = {};
  const embed = async (id) => {
    const views = await Bokeh.embed.embed_item(items[id], id);
    grids[id] = views.roots[0].grid; // of SlickGrid, the table in Bokeh
    if (grids[id]) grids[id].focus = () => {}; // or it would take the focus whenever its selection changes
    return Bokeh.documents.at(-1);
  };
  const map = await embed("map");
  const heads = await embed("heads");
  const single_prompts = await embed("prompts");

  // ---- texts

  const number = (value, decimals, unit) => number_text(value, decimals, true) + (unit && ` ${unit}`);

  function value_text(ablation, metric) {
    const { title, decimals, unit, mean, low, high, adjusted_p } = metric;
    const average = prompts > 1 ? "mean change" : "change";
    const interval = low && ` [${number(low[ablation], decimals, "")}, ${number(high[ablation], decimals, "")}]`;
    const p = adjusted_p && `, corrected p ${number_text(adjusted_p[ablation], 4, false)}`;
    return `${average} of ${title} ${number(mean[ablation], decimals, unit)}${interval ?? ""}${p ?? ""}`;
  }

  function kept_text(ablation) {
    if (prompts > 1) {
      return `${kept[ablation]} of ${prompts} prompts keep the prediction (${Math.round((100 * kept[ablation]) / prompts)}%)`;
    }
    if (kept[ablation]) return "the prediction is kept";
    const index = single.get(ablation);
    return "the prediction changes" + (index === undefined ? "" : ` to ${content.texts[content.argmax[index][0]]}`);
  }

  // ---- the map

  const cells = map.get_model_by_name("cells");
  const state = { metric: metrics[0], imputation: 0, selected: content.strongest };
  let on_map = [];

  function draw_map() {
    const { metric } = state;
    on_map = [...place.keys()].filter((ablation) => imputation[ablation] === state.imputation);
    const largest = metric.mean.reduce((most, value) => Math.max(most, Math.abs(value ?? 0)), 0) || 1;
    map.get_model_by_name("colours").setv({ low: -largest, high: largest });
    cells.data = {
      layer: on_map.map((ablation) => place[ablation][0]),
      head: on_map.map((ablation) => place[ablation][1]),
      value: on_map.map((ablation) => finite(metric.mean[ablation])),
      radius: on_map.map((ablation) => 0.4 * Math.sqrt(1 - kept[ablation] / prompts)),
      dot: on_map.map((ablation) => (metric.adjusted_p && (metric.adjusted_p[ablation] ?? 1) < 0.05 ? 0.1 : 0)),
      label: on_map.map((ablation) => `${label(place[ablation])}, ${content.imputations[imputation[ablation]]}`),
      text: on_map.map((ablation) => value_text(ablation, metric)),
      kept: on_map.map(kept_text),
      receipt: on_map.map((ablation) => content.receipts[content.receipt[ablation]]),
    };
    const unit = metric.unit && `, in ${metric.unit === "pp" ? "percentage points (pp)" : metric.unit}`;
    element("shown").textContent =
      `${prompts > 1 ? "Mean change" : "Change"} of ${metric.title}${unit}, when a head is ablated with ` +
      `${content.imputations[state.imputation]} imputation: red is higher than in the clean run, blue is lower, white ` +
      `is no change. ` +
      (on_map.every((ablation) => kept[ablation] === prompts)
        ? "No prediction changes."
        : prompts > 1 ? "The larger a ring, the more predictions change." : "A ring: the prediction changes.") +
      (prompts > 1 ? " A dot: the mean change differs from 0 (false discovery rate 5%)." : "");
  }

  // ---- the selected head

  const prompt_rows = single_prompts.get_model_by_name("rows");
  let selecting = false; // while this script changes selections, which report back to it

  function select(ablation) {
    if (selecting) return;
    selecting = true;
    state.selected = ablation;
    if (imputation[ablation] !== state.imputation) {
      state.imputation = imputation[ablation];
      element("imputation").selectedIndex = state.imputation;
      draw_map();
    }
    cells.selected.indices = [on_map.indexOf(ablation)];
    select_row();
    element("selected").textContent =
      `Selected head: ${label(place[ablation])}, ${content.imputations[imputation[ablation]]} imputation`;
    element("readout").textContent =
      [value_text(ablation, state.metric), kept_text(ablation)].join("; ") +
      `. Receipt: ${content.receipts[content.receipt[ablation]]}.`;
    show_prompts(single.get(ablation));
    selecting = false;
  }

  function show_prompts(index) {
    const held = index !== undefined;
    element("prompts").hidden = !held;
    element("prompt").hidden = true;
    element("of-prompts").textContent = held
      ? "Values of each prompt, without ablation (clean), with it (ablated), and the change:"
      : `This page holds the values of single prompts only for the ${single.size} ablations with the largest mean ` +
        "change of P(target), and this is not one of them.";
    if (!held) return;
    const data = {
      "prompt": content.prompts,
      "target": content.targets,
      "clean prediction": content.clean_argmax.map((token) => content.texts[token]),
      "ablated prediction": content.argmax[index].map((token) => content.texts[token]),
    };
    for (const { name, clean, single: changes } of metrics) {
      data[`clean ${name}`] = clean.map(finite);
      data[`change ${name}`] = changes[index].map(finite);
      data[`ablated ${name}`] = data[`clean ${name}`].map((value, at) => value + data[`change ${name}`][at]);
    }
    const filter = single_prompts.get_model_by_name("filter");
    filter.indices = []; // the table is drawn again only if the indices change
    prompt_rows.data = data;
    filter.indices = [...content.prompts.keys()];
  }

  prompt_rows.selected.change.connect(() => {
    const [index] = prompt_rows.selected.indices;
    element("prompt").hidden = index === undefined || prompts === 1;
    if (index !== undefined) element("prompt").textContent = content.prompts[index];
  });

  // ---- the table of all heads

  const head_rows = heads.get_model_by_name("rows");
  const filter = heads.get_model_by_name("filter");
  const names = place.map(label);

  function select_row() {
    head_rows.selected.indices = filter.indices.includes(state.selected) ? [state.selected] : [];
  }

  function filter_heads() {
    const words = element("filter").value.toLowerCase().split(/\s+/);
    const chosen = element("filter-imputation").selectedIndex - 1;
    selecting = true;
    head_rows.selected.indices = []; // Bokeh would select a row again when the filter shows it again
    filter.indices = [...place.keys()].filter((ablation) => {
      const text = `${names[ablation]} ${content.imputations[imputation[ablation]]}`.toLowerCase();
      return (chosen < 0 || imputation[ablation] === chosen) && words.every((word) => text.includes(word));
    });
    select_row();
    selecting = false;
    grids.heads.scrollRowToTop(0);
    element("count").textContent = `${filter.indices.length} of ${place.length} rows`;
  }

  const columns = { imputation: imputation.map((index) => content.imputations[index]), head: names, kept };
  for (const metric of metrics) columns[metric.name] = metric.mean.map(finite);
  const ranked_by = metrics.find(({ name }) => name === content.ranked_by);
  if (prompts > 1) {
    const { low, high, adjusted_p } = ranked_by;
    Object.assign(columns, { low: low.map(finite), high: high.map(finite), "corrected p": adjusted_p.map(finite) });
  }
  head_rows.data = columns;

  // ---- events

  cells.selected.change.connect(() => {
    const [index] = cells.selected.indices;
    select(index === undefined ? state.selected : on_map[index]); // undefined: a click beside the cells
  });
  head_rows.selected.change.connect(() => {
    const [index] = head_rows.selected.indices;
    if (index !== undefined) select(index);
  });

  for (const id of ["metric", "imputation"]) {
    element(id).addEventListener("change", () => {
      state.metric = metrics[element("metric").value];
      state.imputation = element("imputation").selectedIndex;
      draw_map();
      const same = on_map.find((ablation) => names[ablation] === names[state.selected]);
      select(same ?? on_map[0]);
    });
  }
  element("filter").addEventListener("input", filter_heads);
  element("filter-imputation").addEventListener("change", filter_heads);

  const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  element("map").addEventListener("keydown", (event) => {
    const step = steps[event.key];
    if (!step) return;
    event.preventDefault();
    let [layer, head] = place[state.selected];
    const at = new Map(on_map.map((ablation) => [names[ablation], ablation]));
    const most = on_map.reduce(([layers, wide], ablation) =>
      [Math.max(layers, place[ablation][0]), Math.max(wide, place[ablation][1])], [0, 0]);
    do {
      layer += step[0];
      head += step[1];
    } while (layer >= 0 && head >= 0 && layer <= most[0] && head <= most[1] && !at.has(label([layer, head])));
    const next = at.get(label([layer, head]));
    if (next !== undefined) select(next);
  });

  // SlickGrid sorts by clicks only, and its arrow keys need an active cell and the focus.
  for (const id of ["heads", "prompts"]) {
    const grid = grids[id];
    grid.onSort.subscribe(() => grid.scrollRowToTop(0)); // Bokeh scrolls to the selection
    for (const header of grid.getContainerNode().querySelectorAll(".slick-header-column")) header.tabIndex = 0;
    grid.getContainerNode().addEventListener("keydown", (event) => {
      const header = event.target.closest(".slick-header-column");
      if (header && (event.key === "Enter" || event.key === " ")) {
        event.preventDefault();
        header.click();
      } else if (!header && event.key in steps && grid.getDataLength()) {
        event.preventDefault();
        event.stopPropagation();
        const row = grid.getSelectedRows()[0] ?? 0;
        if (grid.getActiveCell()?.row !== row) grid.setActiveCell(row, 0);
        grid[event.key.replace("Arrow", "navigate")]();
      }
    }, { capture: true });
  }

  draw_map();
  select(state.selected);
  filter_heads();
  document.body.dataset.ready = "true";
})();
