"""This process's rank among those that share the work, from the variables of torchrun and SLURM. No torch.

Processes that share a harvest or a sweep coordinate through file locks alone. The rank only decides where
each starts, which GPU it uses and whether it prints, so a wrong or missing variable costs time at most, and
any number of processes may resume what any other number began.
"""

import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ..store.errors import SettingsError


class Processes(NamedTuple):
    """The processes of one job, seen from one of them."""

    rank: int = 0
    """This process's number, from 0, among all that share the work."""

    n_processes: int = 1
    """Number of processes on all machines."""

    local_rank: int = 0
    """This process's number on its machine, which selects its GPU."""

    n_local: int = 1
    """Number of processes that share this machine's processors."""

    is_first: bool = True
    """Whether this one prints progress; the others of the same launch print only errors."""

    def dealt(self, work: Sequence[int]) -> list[int]:
        """All of ``work``, this process's share first: every n-th item, n being the number of processes.

        >>> Processes(rank=1, n_processes=3).dealt([0, 1, 2, 4, 6, 7])
        [1, 4, 7, 0, 2, 6]
        """
        return sorted(work, key=lambda item: (item % self.n_processes != self.rank, item))


def shares_a_training(variables: Mapping[str, str] | None = None) -> bool:
    """Whether torchrun started this process together with others.

    Args:
        variables: the environment, by default this process's.
    """
    env = os.environ if variables is None else variables
    return env.keys() >= {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} and env["WORLD_SIZE"] != "1"


def processes_here(variables: Mapping[str, str] | None = None) -> Processes:
    """The processes that the environment describes; one process if it describes none.

    Args:
        variables: the environment, by default this process's. Reads ``RANK``, ``WORLD_SIZE``,
            ``LOCAL_RANK`` and ``LOCAL_WORLD_SIZE`` of torchrun, or else ``SLURM_PROCID``, ``SLURM_NTASKS``
            and ``SLURM_LOCALID`` of srun; and for job arrays ``SLURM_ARRAY_TASK_ID`` with its ``_MIN``,
            ``_STEP`` and ``_COUNT``, where each task may have several processes.

    Raises:
        SettingsError: a variable is not a number, or the rank does not exist.
    """
    env = os.environ if variables is None else variables

    def number(name: str, otherwise: int) -> int:
        text = env.get(name, "")
        if text and not text.isdecimal():
            raise SettingsError(f"environment variable {name} is {text!r}, not an integer: fix or unset it")
        return int(text) if text else otherwise

    if "RANK" in env and "WORLD_SIZE" in env:
        rank, n_processes = number("RANK", 0), number("WORLD_SIZE", 1)
        local_rank, n_local = number("LOCAL_RANK", 0), number("LOCAL_WORLD_SIZE", 1)
    else:
        rank, n_processes = number("SLURM_PROCID", 0), number("SLURM_NTASKS", 1)
        # srun gives each task its own processors.
        local_rank, n_local = number("SLURM_LOCALID", 0), 1
    if not (rank < n_processes and n_local):
        raise SettingsError(
            f"the environment says that this is process {rank} of {n_processes}: unset RANK, "
            "WORLD_SIZE and the other variables of the launcher, or start posae with torchrun or srun"
        )
    n_tasks = max(1, number("SLURM_ARRAY_TASK_COUNT", 1))
    task = number("SLURM_ARRAY_TASK_ID", 0) - number("SLURM_ARRAY_TASK_MIN", 0)
    # In an array such as 3,7,20 two tasks may get the same number.
    task = task // max(1, number("SLURM_ARRAY_TASK_STEP", 1)) % n_tasks
    return Processes(task * n_processes + rank, n_tasks * n_processes, local_rank, n_local, rank == 0)
