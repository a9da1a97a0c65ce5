"""`python -m tests.families`: verify all families and print the page; with --write, into docs/families.md."""

from __future__ import annotations

import argparse
import sys

import torch
from transformers.utils import logging

from tests.families.configurations import FAMILIES
from tests.families.outcomes import PAGE, outcome, page

parser = argparse.ArgumentParser(prog="python -m tests.families", description="Verify every causal-LM family.")
parser.add_argument("--write", action="store_true", help="write docs/families.md")
write = parser.parse_args().write
torch.set_num_threads(1)
logging.set_verbosity_error()
outcomes = []
for family in FAMILIES:
    print(family, file=sys.stderr)
    outcomes.append(outcome(family))
if write:
    PAGE.write_text(page(outcomes), encoding="utf-8")
else:
    print(page(outcomes), end="")
