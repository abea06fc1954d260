"""Curves as TensorBoard's own reader and Weights & Biases' files have them, also after a cut."""

import json
import struct
import sys
import time
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from posae.pipeline.progress import Silent
from posae.pipeline.runs import Run
from posae.pipeline.sae.run_settings import train_settings
from posae.pipeline.train import Ongoing, Training, train_together
from posae.pipeline.train.trackers import TrackerName, Trackers
from posae.store import ActivationStore
from posae.store.errors import SettingsError

from ...conftest import Made
from ..impatient import Impatient

QUICK = {"steps": 30, "batch_size": 32, "window_contexts": 16, "log_steps": 5, "checkpoint_steps": 10}

BLOCK, WHOLE, LAST = 2**15, 1, 4


def cut_off(steps: int) -> Impatient:
    """Ends the training after some steps, as a kill would."""
    return Impatient(steps, RuntimeError("cut off"))


def train(store: Made, folder: Path, *names: TrackerName, progress: Silent | None = None) -> Run:
    settings = train_settings({**QUICK, "architecture": "topk", "target_l0": 4, "ranges": "2"}, "")
    training = Training(ActivationStore.open(store.root), folder, settings)
    with Trackers(names, {folder: training.config}) as trackers:
        training.train(progress, watch=trackers)
    return training.run


def value(line: Mapping[str, Any], name: str) -> float:
    """What a line of metrics has under the name of a curve."""
    key, _, index = name.partition("/")
    return line[key][int(index)] if index else line[key]


def test_tensorboard_has_every_line_once_after_a_cut(good_store: Made, tmp_path: Path) -> None:
    reader: Any = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with pytest.raises(RuntimeError, match="cut off"):
        train(good_store, tmp_path / "run", TrackerName.TENSORBOARD, progress=cut_off(18))
    run = train(good_store, tmp_path / "run", TrackerName.TENSORBOARD)
    lines = run.metrics()
    found = reader.EventAccumulator(str(run.folder / "tensorboard"))
    found.Reload()
    curves: set[str] = {*found.Tags()["scalars"]}
    assert curves >= {"loss", "fvu", "fvu_by_range/0", "fvu_by_range/1", "learning_rate"}
    assert not curves & {"step", "fvu_base"}, "this one has no base code"
    for name in curves:
        told = [(event.step, event.value) for event in found.Scalars(name)]
        assert [step for step, _ in told] == [line["step"] for line in lines]
        assert [value for _, value in told] == pytest.approx([value(line, name) for line in lines], rel=1e-6)


def test_wandb_has_runs_side_by_side_and_goes_on_in_the_same(
    good_store: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb", reason="Weights & Biases is an extra")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    store = ActivationStore.open(good_store.root)
    for cut in (18, None):
        group = [
            Training(store, tmp_path / str(seed), train_settings({**QUICK, "seed": seed}, ""))
            for seed in (0, 1)
        ]
        begun = [ongoing for one in group if (ongoing := Ongoing.begin(one))]
        configs = {one.run.folder: one.config for one in group}
        try:
            with Trackers([TrackerName.WANDB], configs) as trackers:
                train_together(begun, cut_off(2 * cut) if cut else None, watch=trackers)
        except RuntimeError:
            assert cut
            time.sleep(1.1)  # their folders are named by the second, and the run
    wandb.teardown()  # as the end of a process does; its own process has all on the disk then
    for training in group:
        ids, told = set[str](), dict[int, dict[str, float]]()
        for file in sorted((training.run.folder / "wandb").glob("offline-run-*/*.wandb")):
            ids.add(file.stem)
            told |= history_of(file)
        lines = training.run.metrics()
        assert len(ids) == 1
        assert sorted(told) == [line["step"] for line in lines]
        assert [told[line["step"]]["loss"] for line in lines] == [line["loss"] for line in lines]
        assert told[30]["fvu_by_range/3"] == lines[-1]["fvu_by_range"][3]


def records(file: Path) -> Iterator[bytes]:
    """The records of a file that is to be sent later: LevelDB's form of a log, after 7 bytes of their own."""
    data, at, record = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:  # too little is left of the block for a record's head
            at += BLOCK - at % BLOCK
            continue
        size, kind = struct.unpack_from("<HB", data, at + 4)
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (WHOLE, LAST):
            yield record
            record = b""


def history_of(file: Path) -> dict[int, dict[str, float]]:
    """What was logged, by step."""
    kinds: Any = import_module("wandb.proto.wandb_internal_pb2")
    found: dict[int, dict[str, float]] = {}
    for data in records(file):
        record: Any = kinds.Record.FromString(data)
        if record.HasField("history"):
            items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            values = {name: json.loads(text) for name, text in items.items()}
            found[int(values["_step"])] = values
    return found


@pytest.mark.parametrize("name", TrackerName)
def test_a_library_that_is_not_there_is_said_with_its_extra(
    name: TrackerName, good_store: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for library in TrackerName:
        monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(SettingsError, match=rf"install 'posae\[{name}\]'"):
        train(good_store, tmp_path / "run", name)
    assert not (tmp_path / "run").exists()
    assert train(good_store, tmp_path / "run").is_finished, "without trackers neither library is needed"
