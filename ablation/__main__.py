"""Runs the command line. It catches an interruption while modules are being imported, too."""

from __future__ import annotations

import sys


def main() -> int:
    """Run the command line and return its exit status; see `ablation.cli.main`."""
    try:
        from ablation.cli import main as run

        return run()
    except KeyboardInterrupt:  # before `run` catches it
        print("ablation: interrupted, nothing written", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
