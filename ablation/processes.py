"""Several processes that share the prompts of a study, as `torchrun` or `accelerate launch` start them."""

from __future__ import annotations

import datetime
import os
from typing import NamedTuple, Self

from ablation.errors import AblationError

PATIENCE = datetime.timedelta(days=7)
"""How long a process waits for the others to finish."""


class Processes(NamedTuple):
    """One of several processes. rank: from 0. total: of all processes. local_rank: the rank on its machine."""

    rank: int = 0
    total: int = 1
    local_rank: int = 0

    @classmethod
    def current(cls) -> Self:
        """Return the processes that the launcher has announced in the environment; a process alone without one."""
        try:
            return cls(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
        except (KeyError, ValueError):
            return cls()

    @property
    def is_first(self) -> bool:
        """Whether this process merges and reports."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait until every process is here. Raises AblationError if one has stopped."""
        if self.total == 1:
            return
        import torch.distributed as dist

        try:
            if not dist.is_initialized():
                dist.init_process_group("gloo", timeout=PATIENCE)
            dist.monitored_barrier(dist.new_group(backend="gloo"), timeout=PATIENCE)
        except RuntimeError as error:
            raise AblationError(f"another process of this run has stopped: {error}; start the run again") from error
