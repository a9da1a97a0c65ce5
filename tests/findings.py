"""`python -m tests.findings`: what the specification finds in published libraries, written into docs/findings.md.

It runs the checks on the libraries of tests/implementations, which `pip install -e ".[peers]"` installs. The findings
in repositories without a package stand in the page only: nothing of their code is here.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import re
from concurrent.futures import ThreadPoolExecutor

from tests.implementations import __main__ as implementations

PAGE = implementations.ROOT / "docs" / "findings.md"
BLOCK = re.compile(r"(?<=<!-- libraries -->\n).*?(?=<!-- /libraries -->)", re.DOTALL)
PACKAGES = {"nnsight": "nnsight", "captum": "captum", "pyvene": "pyvene", "transformer_lens": "transformer-lens"}
"""Module of tests/implementations -> the package that it drives."""


def block(results: dict[str, implementations.Result]) -> str:
    """Return the block of the page: what each library fails or does not support, the versions and the date."""
    packages = sorted({"torch", "transformers", *(PACKAGES[name] for name in results)})
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)
    today = datetime.datetime.now(tz=datetime.UTC).date()
    return f"{implementations.reasons(results)}\n\nRun on {today} with {versions}.\n"


def main() -> None:
    """Run the checks on each library, and write their findings into the page."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = dict(zip(PACKAGES, pool.map(implementations.run_in_process, PACKAGES), strict=True))
    written = block(results)
    PAGE.write_text(BLOCK.sub(lambda _: written, PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(written)


if __name__ == "__main__":
    main()
