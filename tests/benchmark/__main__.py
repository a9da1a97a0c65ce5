"""How fast a full sweep is, against what people would use instead.

Every way ablates all heads by zero and by their mean, and keeps the last token's logits of each ablation. All run on
the same random weights and tokens, in one process, in turn, and are first compared with each other. Read the ratios:
seconds depend on the machine. Libraries that are not installed (`pip install -e ".[peers]"`) are left out.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator

import torch

from tests.benchmark import tables

PAGE = tables.ROOT / "docs" / "benchmark.md"
FIRST = re.compile(r"(?<=<!-- first table -->\n).*?(?=<!-- /first table -->)", re.DOTALL)
MORE = re.compile(r"(?<=<!-- more -->\n).*?(?=<!-- /more -->)", re.DOTALL)


def more() -> Iterator[str]:
    """Yield all tables but the first."""
    yield from (f"Made by `python -m tests.benchmark --more --write`; {tables.made_with()}.", "")
    for table in (tables.shapes, tables.where, tables.growth, tables.memory, tables.start_up):
        yield from table()


def main() -> None:
    """Measure, print, and write if asked to."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmark", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="how often each way is timed; the best counts")
    parser.add_argument("--ways", default="", help="a pattern: time only the ways whose name it matches, and `sweep`")
    parser.add_argument("--more", action="store_true", help="measure all other tables, some 15 minutes")
    parser.add_argument("--device", help="measure the table of an accelerator, such as cuda")
    parser.add_argument("--write", action="store_true", help="put what is measured into docs/benchmark.md")
    options = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    with torch.no_grad():
        ways = f"^`sweep`|{options.ways}"
        if options.device:
            lines = tables.on_device(options.device, options.rounds, "^`sweep`|^double|^plain")
        else:
            lines = more() if options.more else tables.gpt2_small(options.rounds, ways)
        text = "\n".join(lines) + "\n"
    print(text)
    if options.write and not options.device:
        page = PAGE.read_text(encoding="utf-8")
        PAGE.write_text((MORE if options.more else FIRST).sub(lambda _: text, page), encoding="utf-8")


if __name__ == "__main__":
    main()
