"""`StepwiseHPGD`: HPGD's steps, one at a time, in a loop that is somebody else's."""

from __future__ import annotations

import time
from pathlib import Path

from align_cbrl.distributed import broadcast_, initialize
from align_cbrl.hpgd import HPGD
from align_cbrl.llm.leaders.mixture import RewardMixture
from align_cbrl.rollouts import Rollouts


class StepwiseHPGD(HPGD):
    """HPGD whose owner hands it batches and says when its state is saved: a trl trainer, a server, a file of logs.

    A `RewardMixture` whose terms have no scale is given one on the first batch, which leaves the reward as it is.
    """

    _returned_at = 0.0

    def begin(self, folder: Path | None) -> None:
        """Make all processes one, and continue from the state in `folder`, where there is one."""
        initialize()
        self.out = None
        self._memory.saved = True
        self._prepare(False)
        if folder is not None:
            self._restore(folder)
            broadcast_(self.problem.leader)
        self._returned_at = time.perf_counter()

    def take(self, rollouts: Rollouts) -> dict[str, float]:
        """One leader step; its row of metrics."""
        leader = self.problem.leader
        if isinstance(leader, RewardMixture) and not leader.is_rescaled:
            leader.rescale(rollouts)
        row = self._timed_step(rollouts, {}, self._returned_at)
        self._returned_at = time.perf_counter()
        return row

    def save(self, folder: Path) -> None:
        """Write the state to `folder`; rank 0 does."""
        self.out = folder
        self._save()
