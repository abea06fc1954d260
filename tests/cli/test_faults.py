"""The command line when disk, clock or another process does its worst: one clear line, and no loss."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from posae.store import ActivationStore
from posae.store.files import StoreFiles
from posae.store.verify import verify

from ..conftest import tree
from .conftest import Posae, call

if TYPE_CHECKING:
    from ..conftest import MakeStore

SMALL = ("--contexts", "1100", "--context-length", "4", "--layers", "0")
QUICK = ("--steps", "4", "--batch-size", "64", "--window-contexts", "64", "--ranges", "0:1,1:4")
DEMO_MODEL = Path(__file__).parents[2] / "pipeline" / "harvest" / "demo_model"
NOBODY = 65534
UNREADABLE = 77


def begin(*words: object) -> subprocess.Popen[str]:
    """Run the command line in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "posae", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def told(process: subprocess.Popen[str]) -> str:
    """The one line that a command in trouble ends with; it must be one, and the exit code 1."""
    _, err = process.communicate(timeout=120)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (process.returncode, len(lines)) == (1, 1), err
    assert "Traceback" not in err
    return lines[0]


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an undisturbed harvest leaves: three shards of one layer."""
    path = tmp_path_factory.mktemp("whole") / "a.zarr"
    assert call("harvest", path, *SMALL) == 0
    return path


# --- killed, and used before it is finished -----------------------------------------------------------


def test_two_harvests_killed_leave_a_store_that_is_inspected_trained_from_and_finished(
    whole: Path, tmp_path: Path
) -> None:
    store = tmp_path / "a.zarr"
    harvests = [begin("harvest", store, *SMALL) for _ in range(2)]
    wait_for(store / "layer_0/c.0.0.0", harvests[0])
    for harvest in harvests:
        harvest.kill()
        harvest.communicate()
    opened = ActivationStore.open(store)
    assert opened.n_contexts in (512, 1024, 1100)
    np.testing.assert_array_equal(
        opened.read(0), ActivationStore.open(whole).read(0, slice(opened.n_contexts))
    )
    assert call("inspect-store", store, "--verify") == 0
    assert call("train", store, tmp_path / "run", *QUICK) == 0
    assert call("harvest", store, *SMALL) == 0
    assert tree(store) == tree(whole)


def test_a_layer_is_added_while_others_read_the_store(whole: Path, tmp_path: Path) -> None:
    store = tmp_path / "a.zarr"
    shutil.copytree(whole, store)
    held = ActivationStore.open(store)
    activations, tokens = held.read(0), held.tokens()
    adding = begin("harvest", store, *SMALL[:-1], "0,1")
    wait_for(store / "layer_1/zarr.json", adding)
    assert call("inspect-store", store, "--verify") == 0
    old = 0
    while adding.poll() is None:
        now = ActivationStore.open(store)
        old += now.layers == (0,)
        assert now.layers == ((0,) if now.identity == held.identity else (0, 1))
        for reader in (now, held):
            np.testing.assert_array_equal(reader.read(0), activations)
            np.testing.assert_array_equal(reader.tokens(), tokens)
        time.sleep(0.01)
    _, err = adding.communicate()
    assert (adding.returncode, old > 0) == (0, True), err
    assert ActivationStore.open(store).layers == (0, 1)
    assert held.layers == (0,)
    np.testing.assert_array_equal(held.read(0), activations)
    assert call("inspect-store", store, "--verify") == 0


@pytest.mark.parametrize("n_contexts", [7, 8, 511, 513])
def test_any_number_of_contexts_of_one_document_is_harvested_inspected_and_trained_from(
    tmp_path: Path, n_contexts: int
) -> None:
    text, store = tmp_path / "one.txt", tmp_path / "a.zarr"
    text.write_text("def f(x):\n    return x + 1\n\n" * 600)
    words = ("--contexts", n_contexts, "--context-length", 4, "--layers", 0, "--dataset", text)
    assert call("harvest", store, *words) == 0
    opened = ActivationStore.open(store)
    assert (opened.n_contexts, opened.is_sealed) == (n_contexts, True)
    assert not opened.documents().any()
    assert opened.corpus["documents"] == 1
    assert call("inspect-store", store, "--verify") == 0
    assert call("train", store, tmp_path / "run", *QUICK) == 0


def test_times_in_the_future_and_a_clock_that_goes_backwards_change_nothing(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    clock = iter(now - n for n in range(10**6))
    monkeypatch.setattr(time, "time", lambda: next(clock))
    store = tmp_path / "a.zarr"
    for _ in range(2):
        assert call("harvest", store, *SMALL) == 0
        assert tree(store) == tree(whole)
        for path in (store, *store.rglob("*")):
            os.utime(path, (now + 10**8, now + 10**8))
    assert call("inspect-store", store, "--verify") == 0
    assert call("train", store, tmp_path / "run", *QUICK) == 0


def test_an_unfinished_store_from_the_future_is_inspected_without_nonsense(
    make_store: "MakeStore", tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = make_store(tmp_path / "a.zarr", seal=False).root
    assert call("inspect-store", store) == 0
    assert re.search(r"last written \d+ s ago", " ".join(capsys.readouterr().out.split()))
    os.utime(store / "zarr.json", (time.time() + 4000, time.time() + 4000))
    assert call("inspect-store", store) == 0
    assert "last written 0 s ago" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("option", ["--json", "--brief", "--verify"])
def test_temporary_files_that_vanish_meanwhile_do_not_stop_inspecting(
    make_store: "MakeStore", tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    store = make_store(tmp_path / "a.zarr", seal=False).root
    walk = StoreFiles.walk

    def and_a_vanished_one(files: StoreFiles) -> Iterator[str]:
        yield from walk(files)
        yield "layer_1/.c.7.0.0.partial"

    monkeypatch.setattr(StoreFiles, "walk", and_a_vanished_one)
    assert call("inspect-store", store, option) == 0


# --- what the disk refuses ----------------------------------------------------------------------------


@contextmanager
def small_disk(folder: Path, size: str) -> Generator[None]:
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        yield
    finally:
        # Lazily: a command that ran in this process may still have files mapped.
        subprocess.run(["umount", "-l", str(folder)], check=True)


def is_refused_for_space(posae: Posae, *words: object) -> None:
    ended = posae(*words)
    (line,) = (line for line in ended.err.splitlines() if line.startswith("error: "))
    assert (ended.code, "no space left on the disk" in line) == (1, True)
    assert "Traceback" not in ended.err


def fill(disk: Path, left: int) -> Path:
    """A file that leaves so many bytes free."""
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(shutil.disk_usage(disk).free - left))
    return ballast


def test_a_full_disk_stops_harvest_and_training_with_one_line_and_both_go_on(
    posae: Posae, whole: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    store, run = disk / "a.zarr", disk / "run"
    with small_disk(disk, "500k"):
        is_refused_for_space(posae, "harvest", store, *SMALL)
        assert verify(ActivationStore.open(store)).damaged == []
        subprocess.run(["mount", "-o", "remount,size=2m", str(disk)], check=True)
        assert call("harvest", store, *SMALL) == 0
        assert tree(store) == tree(whole)
        ballast = fill(disk, 8192)
        is_refused_for_space(posae, "train", store, run, *QUICK)
        ballast.unlink()
        assert call("train", store, run, *QUICK) == 0


def test_a_full_disk_stops_planting_with_one_line_and_it_goes_on(
    posae: Posae, whole: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    words = ("--effect", "rotation", "--rank", "2", "--ranges", "2")
    assert call("plant", whole, tmp_path / "planted.zarr", *words) == 0
    with small_disk(disk, "16k"):
        for size in ("16k", "100k", "500k"):
            subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)
            is_refused_for_space(posae, "plant", whole, disk / "a.zarr", *words)
            assert list(disk.rglob("*.partial")) == []
            assert verify(ActivationStore.open(disk / "a.zarr")).damaged == []
        subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
        assert call("plant", whole, disk / "a.zarr", *words) == 0
        assert tree(disk / "a.zarr") == tree(tmp_path / "planted.zarr")


@pytest.mark.parametrize("name", ["page.html", "report.md"])
def test_a_full_disk_stops_a_report_with_one_line_and_leaves_the_old_one(
    posae: Posae, whole: Path, tmp_path: Path, name: str
) -> None:
    run, disk = tmp_path / "run", tmp_path / "disk"
    assert call("train", whole, run, *QUICK) == 0
    with small_disk(disk, "16m"):
        page = disk / name
        fill(disk, 0)
        is_refused_for_space(posae, "report", run, "--out", page)
        assert [file.name for file in disk.iterdir()] == ["ballast"]
        (disk / "ballast").unlink()
        assert call("report", run, "--out", page) == 0
        old = page.read_bytes()
        fill(disk, 0)
        is_refused_for_space(posae, "report", run, "--out", page)
        assert tree(disk).keys() == {"ballast", name}
        assert page.read_bytes() == old


@pytest.fixture
def by_all() -> Generator[Path]:
    """A folder that every user may enter and read; pytest's own are for one."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)
        Path(folder).chmod(0o755)


def told_to_nobody(told_at: Path, *words: object) -> str:
    """What a user whom permissions bind is told; root they do not.

    By a fork of this process, which has imported all: another user may not be able to run this Python.
    """
    child = os.fork()
    if not child:
        code = 99
        try:
            with told_at.open("w") as sys.stderr:
                if os.geteuid() == 0:
                    os.setuid(NOBODY)
                code = call(*words) if os.access(DEMO_MODEL / "config.json", os.R_OK) else UNREADABLE
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == UNREADABLE:
        pytest.skip("other users may not read these files")
    (line,) = (line for line in told_at.read_text().splitlines() if line.startswith("error: "))
    assert code == 1
    return line


def test_what_may_not_be_written_or_read_is_told_in_one_line(
    whole: Path, by_all: Path, tmp_path: Path
) -> None:
    store, text, err = by_all / "a.zarr", by_all / "text.txt", tmp_path / "err"
    shutil.copytree(whole, store)
    text.write_text("def f(x):\n    return x + 1\n\n" * 600)
    by_all.chmod(0o555)
    words = ("harvest", by_all / "b.zarr", "--contexts", 8, "--context-length", 4, "--dataset", text)
    assert "permission denied; choose a folder that you may write to" in told_to_nobody(err, *words)
    (store / "layer_0/c.1.0.0").chmod(0)
    told = "a.zarr/layer_0/c.1.0.0 cannot be read (Permission denied); check the disk and its permissions"
    assert told in told_to_nobody(err, "train", store, by_all / "run", *QUICK)
    (store / "seal.json").chmod(0)
    assert "cannot be read" in told_to_nobody(err, "inspect-store", store)


def test_a_store_removed_while_it_is_harvested_is_told_in_one_line(tmp_path: Path) -> None:
    store = tmp_path / "a.zarr"
    harvest = begin("harvest", store, *SMALL)
    wait_for(store / "layer_0/zarr.json", harvest)
    store.rename(tmp_path / "elsewhere")
    assert "the folder vanished; put it back and run the same command again" in told(harvest)
    assert not store.exists()
    (tmp_path / "elsewhere").rename(store)
    assert verify(ActivationStore.open(store)).damaged == []


# --- cut short while it is decoded --------------------------------------------------------------------

CUT = """
import os, sys
from posae.cli.app import main
from posae.store import shards


if {when!r} == "decode":
    real, size = shards._is_cut_short, os.path.getsize({file!r})
    def is_cut_short(file):
        cut = real(file)
        if len(file) == size:
            os.truncate({file!r}, 0)
        return cut
    shards._is_cut_short = is_cut_short
else:
    real = shards.parse_index
    def parse_index(spec, *rest):
        if spec.path == "layer_1":
            os.truncate({file!r}, 0)
        return real(spec, *rest)
    shards.parse_index = parse_index
sys.argv = ["posae", "train", {store!r}, {store!r} + ".run", "--steps", "2", "--window-contexts", "8"]
main()
"""


@pytest.mark.parametrize(
    ("codec", "when", "said"),
    [
        ("small", "decode", "layer_1, shard 0: the file was cut short while it was read; restore this file"),
        ("raw", "decode", "layer_1, shard 0: the file was cut short while it was read; restore this file"),
        ("small", "index", "a file of the store was cut short while it was read"),
    ],
)
def test_a_file_cut_short_while_it_is_decoded_ends_in_one_line_and_no_crash(
    make_store: "MakeStore", tmp_path: Path, codec: str, when: str, said: str
) -> None:
    made = make_store(tmp_path / "a.zarr", n_contexts=40, d_model=512, codec=codec)
    script = CUT.format(file=str(made.root / "layer_1/c.0.0.0"), store=str(made.root), when=when)
    line = told(
        subprocess.Popen(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    )
    assert said in line
    assert line.endswith("posae inspect-store STORE --verify")


def test_without_the_command_line_such_a_file_kills_the_process(
    make_store: "MakeStore", tmp_path: Path
) -> None:
    """What docs/reliability.md says of notebooks; if this fails, it can say better."""
    made = make_store(tmp_path / "a.zarr", n_contexts=40, d_model=512)
    file = made.root / "layer_1/c.0.0.0"
    script = CUT.format(file=str(file), store=str(made.root), when="decode").partition("sys.argv")[0]
    script += f"from posae.store import ActivationStore\nActivationStore.open({str(made.root)!r}).read(1)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert done.returncode == -signal.SIGBUS
