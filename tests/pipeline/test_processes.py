"""Where a process stands among many, as torchrun and SLURM say."""

from collections.abc import Mapping

import pytest

from posae.pipeline.processes import Processes, processes_here
from posae.store.errors import SettingsError

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
ARRAY = {
    "SLURM_ARRAY_TASK_ID": "7",
    "SLURM_ARRAY_TASK_MIN": "3",
    "SLURM_ARRAY_TASK_STEP": "2",
    "SLURM_ARRAY_TASK_COUNT": "4",
}
SRUN = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1"}


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, Processes(0, 1, 0, 1, True)),
        (TORCHRUN, Processes(5, 8, 1, 4, False)),
        (TORCHRUN | {"RANK": "0", "LOCAL_RANK": "0"}, Processes(0, 8, 0, 4, True)),
        (SRUN, Processes(3, 4, 1, 1, False)),
        (ARRAY, Processes(2, 4, 0, 1, True)),
        (ARRAY | SRUN, Processes(11, 16, 1, 1, False)),
        (SRUN | TORCHRUN, Processes(5, 8, 1, 4, False)),  # torchrun within a SLURM job
        ({"RANK": "3"}, Processes()),  # not torchrun's
        (ARRAY | {"SLURM_ARRAY_TASK_ID": "20"}, Processes(0, 4, 0, 1, True)),  # --array=3,5,7,20
    ],
)
def test_the_environment_says_where_a_process_stands(variables: Mapping[str, str], place: Processes) -> None:
    assert processes_here(variables) == place


@pytest.mark.parametrize(
    ("variables", "problem"),
    [
        (TORCHRUN | {"RANK": "first"}, "RANK is 'first'"),
        (TORCHRUN | {"RANK": "8"}, "process 8 of 8"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "0"}, "unset RANK"),
    ],
)
def test_an_environment_that_contradicts_itself_is_told(variables: Mapping[str, str], problem: str) -> None:
    with pytest.raises(SettingsError, match=problem):
        processes_here(variables)


def test_work_is_dealt_so_that_each_begins_elsewhere_and_may_do_all() -> None:
    work = [0, 1, 2, 5, 6, 7, 9]
    dealt = [Processes(rank, 3).dealt(work) for rank in range(3)]
    assert [hand[0] for hand in dealt] == [0, 1, 2]
    assert all(sorted(hand) == work for hand in dealt)
    assert Processes().dealt(work) == work
