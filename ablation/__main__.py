"""`python -m ablation` runs the command line."""

import sys

from ablation.cli import main

sys.exit(main())
