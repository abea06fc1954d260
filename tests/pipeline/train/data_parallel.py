"""What each process does in test_data_parallel.py; started by torchrun: STORE FOLDER STEPS SETTINGS."""

import json
import sys
from pathlib import Path

import torch

from posae.pipeline.sae.run_settings import train_settings
from posae.pipeline.train import Training
from posae.pipeline.train.data_parallel import Several, joined
from posae.store import ActivationStore


class Staying(Several):
    """Has further trainings to share."""

    def leave(self) -> None:
        self.settle()


if __name__ == "__main__":
    store, folder, text = sys.argv[1:]
    with joined(torch.device("cpu")):
        team = Staying()
        for name, settings in json.loads(text).items():
            opened = ActivationStore.open(store)
            Training(opened, Path(folder) / name, train_settings(settings, "[train]")).train(team=team)
