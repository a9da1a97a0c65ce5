"""`python -m tests.implementations`: the specification on our implementations and on those of libraries, as a table.

Each runs in a process of its own, since some libraries patch torch. `pip install -e ".[peers]"` installs the libraries.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import inspect
import json
import logging
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hypothesis import Phase, settings

from ablation.checks import CHECKS, check_implementation

NAMES = ("ours", "surgery", "notebook", "nnsight", "captum", "pyvene", "transformer_lens")
"""The modules of this folder and of ablation/checks/libraries/, one class each, in the order of the columns."""
OWN = ("ours", "surgery", "notebook")
"""Those of this folder, which need no library."""

LIBRARIES = {"torch", "transformers", "nnsight", "captum", "pyvene", "transformer-lens"}
ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "implementations.md"
BLOCK = re.compile(r"(?<=<!-- implementations -->\n).*?(?=<!-- /implementations -->)", re.DOTALL)
CELLS = {"passed": "pass", "failed": "**fail**", "skipped": "-"}

Result = dict[str, Any]  # unsupported: {feature: reason}; records: {check id: [outcome, reason]}


def adapter(name: str) -> Any:
    """Return the one class of a module."""
    module = importlib.import_module(
        f"{'tests.implementations' if name in OWN else 'ablation.checks.libraries'}.{name}"
    )
    (found,) = (kind for _, kind in inspect.getmembers(module, inspect.isclass) if kind.__module__ == module.__name__)
    return found


def run(name: str) -> Result:
    """Run all checks on one implementation, in this process."""
    settings.register_profile(
        "implementations",
        settings.get_profile("ci"),  # derandomised: the same examples each time
        max_examples=20,
        phases=[Phase.explicit, Phase.generate],
        report_multiple_bugs=False,
    )
    settings.load_profile("implementations")
    logging.disable(logging.WARNING)
    make = adapter(name)
    records = {record.id: [record.outcome, record.reason] for record in check_implementation(make)}
    return {"unsupported": dict(make.unsupported), "records": records}


def run_in_process(name: str) -> Result:
    """Run all checks in a process of its own, whose last line is the result."""
    started = time.monotonic()
    command = [sys.executable, "-m", "tests.implementations", "--only", name]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        sys.exit(f"{name} did not run: {done.stderr.strip().splitlines()[-1]}")
    result: Result = json.loads(done.stdout.splitlines()[-1])
    outcomes = [outcome for outcome, _ in result["records"].values()]
    counts = ", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in CELLS)
    print(f"{name}: {counts}, {time.monotonic() - started:.0f} s", file=sys.stderr)
    return result


def table(results: dict[str, Result]) -> str:
    """Return the table: a row for each check, a column for each implementation."""
    rows = [f"| check | {' | '.join(results)} |", f"|---|{'---|' * len(results)}"]
    for check in CHECKS:
        level = " (should)" if check.level == "SHOULD" else ""
        cells = (CELLS[result["records"][check.id][0]] for result in results.values())
        rows.append(f"| {check.id}{level} | {' | '.join(cells)} |")
    return "\n".join(rows)


def reasons(results: dict[str, Result]) -> str:
    """Say what each failure found, and why some checks could not be tried."""
    lines = []
    for name, result in results.items():
        for check, (outcome, reason) in result["records"].items():
            if outcome == "failed":
                found = re.search(r"^  found: (.*)$", reason, re.MULTILINE)
                lines.append(f"- {name} fails `{check}`: {found[1] if found else reason}")
        lines += [
            f"- {name} does not support `{feature}`: {reason}" for feature, reason in result["unsupported"].items()
        ]
    return "\n".join(lines)


def main() -> None:
    """Print the table and the reasons; write the table into the page, or compare it with the page."""
    parser = argparse.ArgumentParser(prog="python -m tests.implementations", description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the table into docs/implementations.md")
    parser.add_argument(
        "--check", action="store_true", help="exit with 1 if docs/implementations.md has other outcomes"
    )
    parser.add_argument("--only", choices=NAMES, help="run one, and print its records as JSON")
    options = parser.parse_args()
    if options.only:
        print(json.dumps(run(options.only)))
        return
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = dict(zip(NAMES, pool.map(run_in_process, NAMES), strict=True))
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in sorted(LIBRARIES))
    block = f"{table(results)}\n\nWith {versions}.\n"
    print(f"{block}\n{reasons(results)}")
    page = PAGE.read_text(encoding="utf-8")
    if options.write:
        PAGE.write_text(BLOCK.sub(lambda _: block, page), encoding="utf-8")
    if options.check and table(results) not in page:
        sys.exit("docs/implementations.md shows other outcomes than these")


if __name__ == "__main__":
    main()
