"""`ablation check`: runs pytest with the plugin of this package, which runs the specification on an adapter."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from ablation import sources

OF_PLUGIN = ("expected_failures", "summary", "badge", "model", "prompts", "minutes", "device", "dtype", "table")
"""Options that are passed on to the plugin."""
OF_MODEL = ("prompts", "minutes", "device", "dtype", "table")
"""Options that need --model."""


def minutes(text: str) -> float:
    """Return a time in minutes. Raises argparse's error unless it is a positive number."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of minutes")
    return value


def add_command(commands: Any) -> None:
    """Add `check` to the subparsers of the command line. Imports nothing heavy."""
    parser = commands.add_parser(
        "check",
        help="is my hook right? run the specification on an adapter",
        description="Run the specification of head ablation on an adapter (see docs/checking.md). The exit status is "
        "that of pytest: 0 if no check fails, 1 if one fails, 2 or 4 if an option is wrong, 5 if -k selects no check.",
    )
    parser.add_argument(
        "implementation", nargs="?", metavar="MODULE:CLASS", help="the adapter, in this folder or installed"
    )
    parser.add_argument("--list", action="store_true", help="print the requirements, as a Markdown table")
    parser.add_argument("-k", metavar="EXPRESSION", help="run the checks whose ids match, as in pytest")
    parser.add_argument(
        "--expected-failures", metavar="FILE", type=Path, help="known failures: on each line, a check id and a reason"
    )
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="check every head of this model, in place of small random models: capitals, smollm2, a folder, a hub id; "
        "see docs/checking.md",
    )
    parser.add_argument(
        "--prompts", metavar="FILE", help="prompts for the model: a .jsonl or .csv file with the column prompt"
    )
    parser.add_argument(
        "--minutes", type=minutes, metavar="N", help="time for the comparison of every head of the model (default: 10)"
    )
    parser.add_argument(
        "--table", metavar="FILE", type=Path, help="write what was found for every head of the model, as CSV"
    )
    parser.add_argument("--device", help="of the model: cpu, cuda, ... (default: a GPU if there is one)")
    parser.add_argument("--dtype", choices=sources.MODEL_DTYPES, help="of the model (default: float32)")
    parser.add_argument("--junit-xml", metavar="FILE", type=Path, help="write a report for a CI service")
    parser.add_argument(
        "--summary", metavar="FILE", help="append a Markdown table, for the summary of a CI job ($GITHUB_STEP_SUMMARY)"
    )
    parser.add_argument("--badge", metavar="FILE", help="write the data of a badge, as JSON for shields.io")
    parser.set_defaults(run=_check)


def _check(arguments: argparse.Namespace) -> int:
    from ablation.errors import AblationError

    if arguments.model is None:
        for name in OF_MODEL:
            if getattr(arguments, name) is not None:
                raise AblationError(f"--{name} needs --model")
    else:
        sources.resolve(arguments.model)  # before torch is imported
    if arguments.list and (arguments.k or arguments.implementation):
        raise AblationError("--list prints all requirements, and takes neither an adapter nor -k")
    if not arguments.list and not arguments.implementation:
        raise AblationError("name an adapter, as MODULE:CLASS, or use --list")
    try:
        import pytest
        from hypothesis import settings
    except ImportError as error:
        raise AblationError(f"{error}: pip install 'head-ablation[checks]'") from None
    if arguments.list:
        from ablation.checks.runner import requirements_table

        print(requirements_table(), end="")
        return 0
    settings.register_profile("ablation-check", derandomize=True, deadline=None, database=None)
    options = ["-p", "ablation.checks.plugin", "--ablation-implementation", arguments.implementation]
    options += ["--hypothesis-profile", "ablation-check"]
    # The run ignores the configuration and the conftest.py of the current folder.
    options += [
        "-c",
        os.devnull,
        "--rootdir",
        ".",
        "--noconftest",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:warnings",
        "-q",
        "-rN",
        "--show-capture=no",  # warnings of transformers would read like findings
    ]
    if arguments.k:
        options += ["-k", arguments.k]
    if arguments.junit_xml:
        options += ["--junit-xml", str(arguments.junit_xml)]
    for name in OF_PLUGIN:
        if (value := getattr(arguments, name)) is not None:
            options += [f"--ablation-{name.replace('_', '-')}", str(value)]
    status = int(pytest.main(options))
    if status == pytest.ExitCode.NO_TESTS_COLLECTED:
        print(f"ablation: no check matches {arguments.k!r}: `ablation check --list` lists the checks", file=sys.stderr)
    return status
