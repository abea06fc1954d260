"""Which of many processes this one is, as the variables of torchrun and SLURM say. No torch; costs nothing.

Processes that share a harvest or a sweep need no word with each other: locks do the work. Where
they stand only decides who begins where, who uses which GPU, and who talks; so a wrong or missing variable
costs time at worst, and any number of processes may go on with what any other number began.
"""

import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ..store.errors import SettingsError


class Processes(NamedTuple):
    """The processes of one job, seen from one of them."""

    rank: int = 0
    """Which one this is, from 0, among all that share the work."""

    n_processes: int = 1
    """How many there are, on all machines."""

    local_rank: int = 0
    """Which one this is on its machine: which of the GPUs it uses."""

    n_local: int = 1
    """How many share the processors of this machine."""

    is_first: bool = True
    """Whether this one tells how far all are; the others of the same launch only tell errors."""

    def dealt(self, work: Sequence[int]) -> list[int]:
        """All of ``work``, what falls to this process first, dealt out like cards.

        >>> Processes(rank=1, n_processes=3).dealt([0, 1, 2, 4, 6, 7])
        [1, 4, 7, 0, 2, 6]
        """
        return sorted(work, key=lambda item: (item % self.n_processes != self.rank, item))


def shares_a_training(variables: Mapping[str, str] | None = None) -> bool:
    """Whether this process was started with others, and told where they meet: by torchrun.

    Args:
        variables: the environment, by default this process's.
    """
    found = os.environ if variables is None else variables
    return found.keys() >= {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} and found["WORLD_SIZE"] != "1"


def processes_here(variables: Mapping[str, str] | None = None) -> Processes:
    """The processes that the environment tells of; alone where it tells of none.

    Args:
        variables: the environment, by default this process's. Of torchrun ``RANK``, ``WORLD_SIZE``,
            ``LOCAL_RANK`` and ``LOCAL_WORLD_SIZE`` are read; else of ``srun`` ``SLURM_PROCID``,
            ``SLURM_NTASKS`` and ``SLURM_LOCALID``; and of a job array ``SLURM_ARRAY_TASK_ID`` with its
            ``_MIN``, ``_STEP`` and ``_COUNT``, each task of which may have many processes.

    Raises:
        SettingsError: one of them is no number, or there is no such place.
    """
    found = os.environ if variables is None else variables

    def number(name: str, otherwise: int) -> int:
        text = found.get(name, "")
        if text and not text.isdecimal():
            raise SettingsError(
                f"the variable {name} is {text!r}, no whole number: unset it, or set it right"
            )
        return int(text) if text else otherwise

    if "RANK" in found and "WORLD_SIZE" in found:
        rank, n_processes = number("RANK", 0), number("WORLD_SIZE", 1)
        local_rank, n_local = number("LOCAL_RANK", 0), number("LOCAL_WORLD_SIZE", 1)
    else:
        rank, n_processes = number("SLURM_PROCID", 0), number("SLURM_NTASKS", 1)
        # srun gives each task processors of its own.
        local_rank, n_local = number("SLURM_LOCALID", 0), 1
    if not (rank < n_processes and n_local):
        raise SettingsError(
            f"the environment says that this is process {rank} of {n_processes}: unset RANK, "
            f"WORLD_SIZE and the like, or start posae with torchrun or srun"
        )
    n_tasks = max(1, number("SLURM_ARRAY_TASK_COUNT", 1))
    task = number("SLURM_ARRAY_TASK_ID", 0) - number("SLURM_ARRAY_TASK_MIN", 0)
    # Of an array of any numbers, as 3,7,20, two tasks may get the same place.
    task = task // max(1, number("SLURM_ARRAY_TASK_STEP", 1)) % n_tasks
    return Processes(task * n_processes + rank, n_tasks * n_processes, local_rank, n_local, rank == 0)
