"""A harvest killed, or refused by the disk, at any moment: doing it again finishes it with the same bytes."""

import errno
import fcntl
import os
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
import pytest

from posae.pipeline.stores.copying import copy_store
from posae.store import ActivationStore
from posae.store.card import write_card
from posae.store.errors import (
    SettingsError,
    StoreDamagedError,
    StoreError,
    StoreFormatError,
    StoreIncompleteError,
    StoreMismatchError,
    StoreNotFoundError,
    StoreReadError,
    StoreWriteError,
)
from posae.store.files import LOCK_PATH, exclusive
from posae.store.seal import CARD_PATH
from posae.store.verify import verify
from posae.store.writer import StoreWriter

from ..conftest import tree

if TYPE_CHECKING:
    from ..conftest import Made, MakeStore

LAYERS = (0, 3)
DURABLE_CALLS = ("fsync", "rename", "replace")


def with_card(make_store: "MakeStore", root: Path, **settings: Any) -> "Made":
    made = make_store(root, **settings)
    write_card(ActivationStore.open(root))
    return made


@pytest.fixture(scope="module")
def whole(make_store: "MakeStore", tmp_path_factory: pytest.TempPathFactory) -> "Made":
    """What an undisturbed harvest leaves: two layers, three shards."""
    root = tmp_path_factory.mktemp("whole") / "a.zarr"
    return with_card(
        make_store,
        root,
        n_contexts=20,
        context_length=3,
        d_model=5,
        layers=LAYERS,
        held_out=4,
        chunk_contexts=4,
        shard_contexts=8,
        model_layers=4,
    )


@pytest.fixture(scope="module")
def tiny(make_store: "MakeStore", tmp_path_factory: pytest.TempPathFactory) -> "Made":
    """One layer, two shards: few enough calls to fail at each of them."""
    root = tmp_path_factory.mktemp("tiny") / "a.zarr"
    return with_card(
        make_store,
        root,
        n_contexts=9,
        context_length=2,
        d_model=3,
        layers=(0,),
        shard_contexts=8,
        model_layers=1,
    )


def harvest(root: Path, made: "Made", layers: Sequence[int] = (), *, allow_versions: bool = False) -> None:
    """What ``posae harvest`` does, with activations from ``made`` in place of a model."""
    layers = layers or tuple(made.activations)
    writer = StoreWriter.begin(root, made.manifest, layers, allow_versions=allow_versions)
    with writer.lock():
        if not writer.has_tokens:
            writer.write_tokens(made.tokens, made.documents, made.corpus)
        writer.add_layers(layers)
    with ThreadPoolExecutor(1) as pool:
        missing = list(range(made.manifest.n_shards))
        for wait in (False, True):
            for shard in list(missing):
                locked = writer.lock_shard(layers, shard, wait=wait)
                if locked is None:
                    continue
                with locked:
                    for start in range(0, len(locked.contexts), made.manifest.chunk_contexts):
                        rows = np.array(locked.contexts[start : start + made.manifest.chunk_contexts])
                        for layer in locked.layers:
                            locked.append(layer, made.activations[layer][rows], made.ordinary[rows], pool)
                    locked.commit()
                missing.remove(shard)
    with writer.lock():
        writer.finish(layers)


def check_what_is_there(root: Path, made: "Made") -> None:
    """The store opens once its root is there, verifies, and reads whole shards of what was written."""
    try:
        store = ActivationStore.open(root)
    except (StoreNotFoundError, StoreFormatError):
        assert not (root / "zarr.json").exists()
        return
    assert verify(store).damaged == []
    for layer in store.layers:
        n = store.contexts_by_layer[layer]
        assert n % 8 == 0 or n == made.manifest.n_contexts
        np.testing.assert_array_equal(store.read(layer), made.activations[layer][:n])
    np.testing.assert_array_equal(store.tokens(), made.tokens[: store.n_contexts])


def check_finishes(root: Path, made: "Made") -> None:
    harvest(root, made)
    assert tree(root) == tree(made.root)


def forked(task: Callable[[], object]) -> int:
    """The process id of a child that does ``task`` and nothing else."""
    child = os.fork()
    if child:
        return child
    try:
        task()
        os._exit(0)
    except StoreError:
        os._exit(3)
    finally:
        os._exit(1)


def ended(child: int) -> int:
    """The exit status of ``child``; negative where a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@contextmanager
def at_each_call(before: Callable[[], object]) -> Generator[None]:
    """Do something before each durable call; fsync does nothing."""

    def wrapped(real: Callable[..., Any] | None) -> Callable[..., Any]:
        def call(*args: Any, **keywords: Any) -> Any:
            before()
            return real(*args, **keywords) if real else None

        return call

    with patch.multiple("os", fsync=wrapped(None), rename=wrapped(os.rename), replace=wrapped(os.replace)):
        yield


@contextmanager
def at_call(number: int, fault: Callable[[], object]) -> Generator[list[int]]:
    """Run ``fault`` before the ``number``-th durable call, counted over all of them; fsync does nothing."""
    calls = [0]

    def count() -> None:
        calls[0] += 1
        if calls[0] == number:
            fault()

    with at_each_call(count):
        yield calls


def refuse() -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def interrupt() -> None:
    raise KeyboardInterrupt


def count_calls(made: "Made", root: Path) -> int:
    with at_call(0, lambda: None) as calls:
        harvest(root, made)
    return calls[0]


def test_a_harvest_killed_at_any_durable_call_is_finished_with_the_same_bytes(
    tiny: "Made", tmp_path: Path
) -> None:
    def harvest_until(number: int, root: Path) -> None:
        with at_call(number, lambda: os.kill(os.getpid(), signal.SIGKILL)):
            harvest(root, tiny)

    n_calls = count_calls(tiny, tmp_path / "counted.zarr")
    assert n_calls > 100
    for number in range(1, n_calls + 1):
        root = tmp_path / f"{number}.zarr"
        assert ended(forked(lambda n=number, r=root: harvest_until(n, r))) == -signal.SIGKILL
        check_what_is_there(root, tiny)
        with patch("os.fsync"):
            check_finishes(root, tiny)


def test_a_disk_that_refuses_any_durable_call_gives_one_error_and_leaves_nothing_over(
    tiny: "Made", tmp_path: Path
) -> None:
    n_calls = count_calls(tiny, tmp_path / "counted.zarr")
    for call in range(1, n_calls + 1, 2):
        root = tmp_path / f"{call}.zarr"
        with (
            pytest.raises(StoreWriteError, match="run the same command again"),
            at_call(call, refuse),
        ):
            harvest(root, tiny)
        assert list(root.rglob("*.partial")) == []
        check_what_is_there(root, tiny)
        with patch("os.fsync"):
            check_finishes(root, tiny)


def test_a_harvest_killed_at_random_moments_is_finished_with_the_same_bytes(
    whole: "Made", tmp_path: Path
) -> None:
    seconds = 0.0
    for warm_up in range(2):
        began = time.monotonic()
        assert ended(forked(lambda n=warm_up: harvest(tmp_path / f"timed-{n}.zarr", whole))) == 0
        seconds = time.monotonic() - began
    rng = np.random.default_rng()
    killed = 0
    for round_ in range(5):
        root = tmp_path / f"{round_}.zarr"
        for _ in range(2):
            child = forked(lambda r=root: harvest(r, whole))
            time.sleep(float(rng.uniform(0, seconds / 2)))
            os.kill(child, signal.SIGKILL)
            killed += ended(child) == -signal.SIGKILL
            check_what_is_there(root, whole)
        with patch("os.fsync"):
            check_finishes(root, whole)
    assert killed


@pytest.mark.parametrize("n_killed", [0, 1, 3])
def test_harvests_side_by_side_leave_the_same_bytes_though_some_are_killed(
    whole: "Made", tmp_path: Path, n_killed: int
) -> None:
    rng = np.random.default_rng()
    for round_ in range(3):
        root = tmp_path / f"{round_}.zarr"
        children = [forked(lambda r=root: harvest(r, whole)) for _ in range(3)]
        for child in children[:n_killed]:
            time.sleep(float(rng.uniform(0, 0.1)))
            os.kill(child, signal.SIGKILL)
        ends = [ended(child) for child in children]
        assert set(ends[:n_killed]) <= {0, -signal.SIGKILL}
        assert set(ends[n_killed:]) <= {0}
        check_what_is_there(root, whole)
        with patch("os.fsync"):
            check_finishes(root, whole)


def test_a_held_shard_is_left_to_its_holder_until_that_is_killed(whole: "Made", tmp_path: Path) -> None:
    root = tmp_path / "a.zarr"
    writer = StoreWriter.begin(root, whole.manifest)
    with writer.lock():
        writer.write_tokens(whole.tokens, whole.documents, whole.corpus)
        writer.add_layers(LAYERS)
    told, tell = os.pipe()

    def hold() -> None:
        with writer.lock_shard(LAYERS, 0, wait=False) or pytest.fail("not to be had"):
            os.write(tell, b"!")
            time.sleep(60)

    holder = forked(hold)
    try:
        assert os.read(told, 1) == b"!"
        assert writer.lock_shard(LAYERS, 0, wait=False) is None
        assert writer.lock_shard(LAYERS[1:], 0, wait=False) is None
        other = writer.lock_shard(LAYERS, 1, wait=False)
        assert other is not None
        with other:
            assert other.contexts == range(8, 16)
            assert other.layers == LAYERS
        waiting = forked(lambda: harvest(root, whole))
        time.sleep(0.2)
        assert os.waitpid(waiting, os.WNOHANG) == (0, 0)
    finally:
        os.kill(holder, signal.SIGKILL)
        ended(holder)
        os.close(told)
        os.close(tell)
    assert ended(waiting) == 0
    assert tree(root) == tree(whole.root)


def test_a_shard_that_its_holder_gives_up_is_had_by_who_waits(whole: "Made", tmp_path: Path) -> None:
    root = tmp_path / "a.zarr"
    writer = StoreWriter.begin(root, whole.manifest)
    with writer.lock():
        writer.write_tokens(whole.tokens, whole.documents, whole.corpus)
        writer.add_layers(LAYERS)
    with ThreadPoolExecutor(2) as pool:
        with writer.lock_shard(LAYERS, 0, wait=False) or pytest.fail("not to be had"):
            waiting = [pool.submit(harvest, root, whole) for _ in range(2)]
            time.sleep(0.2)
            assert not waiting[0].done()
        for done in waiting:
            done.result(timeout=60)
    assert tree(root) == tree(whole.root)


def test_adding_a_layer_does_not_hide_damage_to_an_old_one(whole: "Made", tmp_path: Path) -> None:
    root = tmp_path / "a.zarr"
    harvest(root, whole, LAYERS[:1])
    bad = root / "stats/layer_0/zarr.json"
    bad.write_bytes(bad.read_bytes() + b" ")
    harvest(root, whole, LAYERS[1:])
    assert [damage.array for damage in verify(ActivationStore(root)).damaged] == ["stats/layer_0/zarr.json"]


def test_the_lock_of_the_store_is_had_by_one_at_a_time_and_freed_by_a_kill(tmp_path: Path) -> None:
    told, tell = os.pipe()

    def hold() -> None:
        with exclusive(tmp_path):
            os.write(tell, b"!")
            time.sleep(60)

    holder = forked(hold)
    assert os.read(told, 1) == b"!"
    second = forked(hold)
    os.set_blocking(told, False)
    time.sleep(0.1)
    with pytest.raises(BlockingIOError):
        os.read(told, 1)
    os.kill(holder, signal.SIGKILL)
    ended(holder)
    os.set_blocking(told, True)
    assert os.read(told, 1) == b"!"
    os.kill(second, signal.SIGKILL)
    ended(second)
    os.close(told)
    os.close(tell)
    # What the killed left is used by the next.
    with exclusive(tmp_path):
        assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become two users")
@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_users_who_share_a_folder_hold_its_lock_one_at_a_time(umask: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)
        held, tell = os.pipe()
        release, go = os.pipe()

        def hold() -> None:
            os.setuid(1001)
            os.umask(umask)
            with exclusive(folder):
                os.write(tell, b"!")
                os.read(release, 1)

        def try_it() -> None:
            os.setuid(1002)
            with exclusive(folder, wait=False) as is_held:
                os._exit(10 + is_held)

        holder = forked(hold)
        assert os.read(held, 1) == b"!"
        assert ended(forked(try_it)) == 10
        os.write(go, b"!")
        assert ended(holder) == 0
        assert ended(forked(try_it)) == 11
        # A file that keeps the other user out, as older versions left it, locks all the same.
        (folder / LOCK_PATH).chmod(0o644)
        os.chown(folder / LOCK_PATH, 1001, 1001)
        holder = forked(hold)
        assert os.read(held, 1) == b"!"
        assert ended(forked(try_it)) == 10
        os.write(go, b"!")
        assert ended(holder) == 0


def test_a_shard_whose_temporary_file_another_machine_removed_is_locked_anew(
    whole: "Made", tmp_path: Path
) -> None:
    writer = StoreWriter.begin(tmp_path / "a.zarr", whole.manifest, LAYERS)
    with writer.lock():
        writer.write_tokens(whole.tokens, whole.documents, whole.corpus)
        writer.begin_layers(LAYERS)
    flock, calls = fcntl.flock, [0]

    def stale_at_first(handle: int, operation: int) -> None:
        calls[0] += 1
        if calls[0] == 1:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        flock(handle, operation)

    with patch("fcntl.flock", stale_at_first):
        locked = writer.lock_shard(LAYERS[:1], 0, wait=False)
    assert locked is not None
    assert calls == [2]
    with locked:
        pass


def test_a_file_system_without_locks_is_told(tmp_path: Path) -> None:
    def refuse_lock(handle: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    with (
        patch("fcntl.flock", refuse_lock),
        pytest.raises(StoreWriteError, match="has no locks"),
        exclusive(tmp_path),
    ):
        pass


@contextmanager
def mounted(folder: Path, options: str) -> Generator[None]:
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        yield
    finally:
        # Lazily: a failed test still has files open, and is to be told as what it is.
        subprocess.run(["umount", "-l", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def test_a_disk_that_is_full_at_any_write_gives_one_error_and_leaves_nothing_over(
    tiny: "Made", tmp_path: Path
) -> None:
    disk, root = tmp_path / "disk", tmp_path / "disk/a.zarr"
    n_pages = len(tree(tiny.root))  # every file of it fits into one
    with mounted(disk, "size=4m"), patch("os.fsync"):
        for pages in range(1, n_pages):
            remount(disk, f"size={4 * pages}k")
            with pytest.raises(StoreWriteError, match="no space left on the disk"):
                harvest(root, tiny)
            assert list(root.rglob("*.partial")) == []
            assert 0 < len(tree(root)) <= pages
            check_what_is_there(root, tiny)
            remount(disk, "size=4m")
            if pages % 8 == 0:
                check_finishes(root, tiny)
                shutil.rmtree(root)
        check_finishes(root, tiny)


@pytest.mark.parametrize("size", ["20k", "80k", "160k", "240k"])
def test_a_full_disk_gives_one_error_and_room_lets_the_harvest_go_on(
    whole: "Made", tmp_path: Path, size: str
) -> None:
    disk = tmp_path / "disk"
    with mounted(disk, f"size={size}"):
        with pytest.raises(StoreWriteError, match="no space left"):
            harvest(disk / "a.zarr", whole)
        check_what_is_there(disk / "a.zarr", whole)
        with pytest.raises(StoreWriteError, match="no space left"):
            harvest(disk / "a.zarr", whole)
        remount(disk, "size=4m")
        check_finishes(disk / "a.zarr", whole)


def test_a_read_only_disk_gives_one_error(whole: "Made", tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with mounted(disk, "size=4m"):
        with suppress(KeyboardInterrupt), at_call(100, interrupt):
            harvest(disk / "a.zarr", whole)
        remount(disk, "ro")
        with pytest.raises(StoreWriteError, match="read-only"):
            harvest(disk / "a.zarr", whole)
        with pytest.raises(StoreWriteError, match="read-only"):
            harvest(disk / "b.zarr", whole)
        remount(disk, "rw")
        check_finishes(disk / "a.zarr", whole)


def test_files_that_may_not_grow_give_one_error(make_store: "MakeStore", tmp_path: Path) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(StoreWriteError, match="File too large"):
            make_store(tmp_path / "a.zarr", n_contexts=64, d_model=64, codec="raw")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert list(tmp_path.rglob("*.partial")) == []
    made = make_store(tmp_path / "a.zarr", n_contexts=64, d_model=64, codec="raw")
    assert verify(ActivationStore.open(made.root)).damaged == []


@pytest.mark.parametrize("place", ["a file", "a file/a.zarr", "a file/b/a.zarr"])
def test_a_file_in_the_way_gives_one_error(whole: "Made", tmp_path: Path, place: str) -> None:
    (tmp_path / "a file").write_text("in the way")
    with pytest.raises(StoreWriteError, match="a file stands where a folder should be"):
        harvest(tmp_path / place, whole)
    assert (tmp_path / "a file").read_text() == "in the way"


def test_a_folder_that_may_not_be_written_gives_one_error(whole: "Made") -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o555)

        def harvest_as_nobody() -> None:
            if os.geteuid() == 0:
                os.setuid(65534)
            with pytest.raises(StoreWriteError, match="permission denied"):
                harvest(Path(folder) / "a.zarr", whole)

        assert ended(forked(harvest_as_nobody)) == 0


def test_an_added_layer_is_unseen_until_the_new_seal_and_leaves_old_files_alone(
    whole: "Made", tmp_path: Path
) -> None:
    root = tmp_path / "a.zarr"
    harvest(root, whole, LAYERS[:1])
    before, early = tree(root), ActivationStore.open(root)
    for number in (7, 20, 33):
        # Each time further, as it goes on where it stopped.
        with pytest.raises(StoreWriteError), at_call(number, refuse):
            harvest(root, whole, LAYERS[1:])
        store = ActivationStore.open(root)
        assert (store.layers, store.identity) == ((0,), early.identity)
        assert verify(store).damaged == []
    assert ActivationStore.open(root).layers == (0,)
    with patch("os.fsync"):
        harvest(root, whole, LAYERS[1:])
    assert tree(root) == tree(whole.root)
    renewed = ("seal.json", CARD_PATH)
    assert {path: tree(root)[path] for path in before if path not in renewed} == {
        path: data for path, data in before.items() if path not in renewed
    }
    assert early.layers == (0,)
    np.testing.assert_array_equal(early.read(0), whole.activations[0])
    np.testing.assert_array_equal(ActivationStore.open(root).read(3), whole.activations[3])


def test_readers_see_the_old_layers_whole_at_every_moment_until_the_new_seal(
    whole: "Made", tmp_path: Path
) -> None:
    root = tmp_path / "a.zarr"
    harvest(root, whole, LAYERS[:1])
    held = ActivationStore.open(root)
    told, tell = os.pipe()
    allowed, allow = os.pipe()

    def ask() -> None:
        os.write(tell, b"?")
        os.read(allowed, 1)

    def add() -> None:
        with at_each_call(ask):
            harvest(root, whole, LAYERS[1:])

    child = forked(add)
    os.close(tell)
    seen: list[tuple[int, ...]] = []
    while os.read(told, 1):
        now = ActivationStore.open(root)
        seen.append(now.layers)
        is_old = now.identity == held.identity
        assert now.layers == (LAYERS[:1] if is_old else LAYERS)
        assert verify(now).damaged == verify(held).damaged == []
        for store in (now, held):
            for layer in store.layers:
                np.testing.assert_array_equal(store.read(layer), whole.activations[layer])
            np.testing.assert_array_equal(store.tokens(), whole.tokens)
        if is_old:
            with pytest.raises(StoreIncompleteError, match="has no layer 3"):
                now.read(3)
        os.write(allow, b"!")
    for end in (told, allowed, allow):
        os.close(end)
    assert ended(child) == 0
    # Old ones to the last, which is about the new seal; then, while it and the card are synced, new ones.
    assert seen == sorted(seen, key=len)
    assert seen.count(LAYERS[:1]) > 50
    assert 0 < seen.count(LAYERS) < 10
    assert held.layers == LAYERS[:1]
    assert tree(root) == tree(whole.root)


def test_other_settings_are_taken_before_the_tokens_are_committed(
    whole: "Made", make_store: "MakeStore", tmp_path: Path
) -> None:
    more = make_store(tmp_path / "more.zarr", n_contexts=64, context_length=7, shard_contexts=16)
    root = tmp_path
    for number in range(1, count_calls(whole, tmp_path / "counted.zarr"), 3):
        root = tmp_path / f"{number}.zarr"
        with suppress(KeyboardInterrupt), at_call(number, interrupt):
            harvest(root, more, (1,))
        if (root / "stats/zarr.json").exists():
            break
        with patch("os.fsync"):
            check_finishes(root, whole)
    with pytest.raises(StoreMismatchError, match="--contexts was 64 and is now 20"):
        harvest(root, whole)


def test_of_two_begun_otherwise_the_first_to_commit_tokens_has_the_store(
    whole: "Made", make_store: "MakeStore", tmp_path: Path
) -> None:
    other = make_store(tmp_path / "other.zarr", n_contexts=20, seed=1, shard_contexts=8)
    root = tmp_path / "a.zarr"
    with patch("os.fsync"):
        first, second = (StoreWriter.begin(root, made.manifest) for made in (whole, other))
        with first.lock():
            first.write_tokens(whole.tokens, whole.documents, whole.corpus)
            first.begin_layers(LAYERS)
        with second.lock(), pytest.raises(StoreMismatchError, match="--seed was 0 and is now 1"):
            second.begin_layers(LAYERS)
    assert ActivationStore.open(root).manifest == whole.manifest
    harvest(root, whole)
    assert tree(root) == tree(whole.root)


def test_a_finished_store_is_not_begun_anew_where_its_commit_record_is_lost(
    whole: "Made", make_store: "MakeStore", tmp_path: Path
) -> None:
    root = tmp_path / "a.zarr"
    harvest(root, whole)
    (root / "stats/zarr.json").unlink()
    left = tree(root)
    other = make_store(tmp_path / "other.zarr", n_contexts=64)
    with pytest.raises(StoreDamagedError, match=r"stats/zarr\.json"):
        harvest(root, other, (1,))
    assert tree(root) == left


def test_a_shard_without_its_statistics_is_made_again(whole: "Made", tmp_path: Path) -> None:
    root = tmp_path / "a.zarr"
    harvest(root, whole)
    for path in ("seal.json", "stats/layer_3/sums/c.1.0.0"):
        (root / path).unlink()
    assert ActivationStore.open(root).contexts_by_layer == {0: 20, 3: 8}
    check_finishes(root, whole)


@pytest.mark.parametrize("name", ["sums", "norm_counts", "sha256"])
def test_damaged_statistics_are_made_again_before_the_seal(whole: "Made", tmp_path: Path, name: str) -> None:
    root = tmp_path / "a.zarr"
    harvest(root, whole)
    (root / "seal.json").unlink()
    (file,) = (root / f"stats/layer_3/{name}").glob("c.1.*")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert [damage[:2] for damage in verify(ActivationStore(root)).damaged] == [(f"stats/layer_3/{name}", 1)]
    check_finishes(root, whole)


@pytest.mark.parametrize("path", ["tokens/c.2.0", "document/c.0.0", "position/c.0", "tokens/zarr.json"])
def test_tokens_that_vanished_are_told_and_not_sealed(whole: "Made", tmp_path: Path, path: str) -> None:
    root = tmp_path / "a.zarr"
    harvest(root, whole)
    for gone in ("seal.json", path):
        (root / gone).unlink()
    with pytest.raises(StoreDamagedError, match=r"missing; restore this file from a copy"):
        harvest(root, whole)
    assert not (root / "seal.json").exists()


def test_what_a_killed_writer_left_is_begun_anew_or_removed(whole: "Made", tmp_path: Path) -> None:
    root = tmp_path / "a.zarr"
    harvest(root, whole)
    for path in ("seal.json", "layer_0/c.1.0.0"):
        (root / path).unlink()
    for path in ("layer_0/.c.1.0.0", "layer_0/.c.2.0.0", "stats/layer_3/sums/.zarr.json", ".seal.json"):
        (root / f"{path}.partial").write_bytes(b"longer than any shard" * 1000)
    check_finishes(root, whole)


def test_a_batch_that_ends_within_a_chunk_is_refused(whole: "Made", tmp_path: Path) -> None:
    writer = StoreWriter.begin(tmp_path / "a.zarr", whole.manifest)
    writer.write_tokens(whole.tokens, whole.documents, whole.corpus)
    writer.add_layers(LAYERS)
    for rows in ([0, 1, 2], range(9)):
        locked = writer.lock_shard(LAYERS, 0, wait=False)
        assert locked is not None
        with locked, ThreadPoolExecutor(1) as pool, pytest.raises(ValueError, match="whole chunks"):
            locked.append(0, whole.activations[0][np.array(rows)], whole.ordinary[np.array(rows)], pool)
    assert list((tmp_path / "a.zarr").rglob("*.partial")) == []


def other_seed(made: "Made", make_store: "MakeStore", root: Path) -> "Made":
    """Other tokens and activations of the same shape."""
    return make_store(
        root, n_contexts=9, context_length=2, d_model=3, layers=(0,), shard_contexts=8, model_layers=1, seed=1
    )


def test_a_copy_killed_at_any_durable_call_is_not_taken_for_a_harvest_of_other_settings(
    tiny: "Made", make_store: "MakeStore", tmp_path: Path
) -> None:
    other = other_seed(tiny, make_store, tmp_path / "other.zarr")
    source = ActivationStore.open(tiny.root)

    def copy(root: Path) -> None:
        copy_store(source, root, lambda _: None)

    with at_call(0, lambda: None) as calls:
        copy(tmp_path / "counted.zarr")
    refused = 0
    for number in range(1, calls[0] + 1):
        root = tmp_path / f"{number}.zarr"
        with suppress(KeyboardInterrupt), patch("os.unlink"), at_call(number, interrupt):
            copy(root)
        left = tree(root)
        try:
            with patch("os.fsync"):
                harvest(root, other)
        except (StoreFormatError, StoreIncompleteError, StoreMismatchError):
            refused += 1
            assert tree(root) == left
            with patch("os.fsync"):
                copy(root)
            assert tree(root) == tree(tiny.root)
        else:
            np.testing.assert_array_equal(ActivationStore.open(root).read(0), other.activations[0])
            np.testing.assert_array_equal(ActivationStore.open(root).tokens(), other.tokens)
    assert refused > 10


def test_layers_without_committed_tokens_are_not_taken_for_ones_own(whole: "Made", tmp_path: Path) -> None:
    root = tmp_path / "a.zarr"
    harvest(root, whole)
    for path in ("seal.json", "stats/zarr.json"):
        (root / path).unlink()
    left = tree(root)
    with pytest.raises(StoreFormatError, match="no committed tokens, so it is not an unfinished harvest"):
        harvest(root, whole)
    assert tree(root) == left


@pytest.mark.parametrize("error", [errno.ESTALE, errno.EIO, errno.EACCES])
def test_a_disk_that_cannot_read_a_shard_is_an_error_and_not_a_layer_less(
    whole: "Made", tmp_path: Path, error: int
) -> None:
    root = tmp_path / "a.zarr"
    harvest(root, whole)
    (root / "seal.json").unlink()
    real = os.open

    def failing(path: Any, *args: Any, **keywords: Any) -> int:
        if path == "c.2.0.0" and keywords.get("dir_fd") is not None:
            raise OSError(error, os.strerror(error))
        return real(path, *args, **keywords)

    with patch("os.open", failing), pytest.raises(StoreReadError, match=r"cannot be read .*check the disk"):
        harvest(root, whole)
    assert not (root / "seal.json").exists()
    check_finishes(root, whole)


def test_a_layer_that_is_not_complete_is_not_sealed_and_not_passed_over(
    whole: "Made", tmp_path: Path
) -> None:
    root = tmp_path / "a.zarr"
    writer = StoreWriter.begin(root, whole.manifest, LAYERS)
    with writer.lock():
        writer.write_tokens(whole.tokens, whole.documents, whole.corpus)
        writer.begin_layers(LAYERS)
        with pytest.raises(StoreIncompleteError, match="layers 0, 3 and cannot be sealed yet"):
            writer.finish(LAYERS)
    harvest(root, whole, LAYERS[:1])
    store = ActivationStore.open(root)
    assert (store.layers, store.is_sealed) == (LAYERS[:1], True)
    harvest(root, whole)
    assert tree(root) == tree(whole.root)


def test_what_could_not_be_opened_is_refused_before_anything_is_written(
    whole: "Made", tmp_path: Path
) -> None:
    long = whole.manifest.model_copy(update={"context_length": 131_072, "d_model": 1024, "chunk_contexts": 8})
    with pytest.raises(SettingsError, match=r"2\.15 GB in layer_0.*choose a smaller --context-length"):
        StoreWriter.begin(tmp_path / "a.zarr", long, LAYERS)
    assert not (tmp_path / "a.zarr").exists()


def test_a_layer_of_other_versions_is_added_if_that_is_allowed_and_recorded(
    whole: "Made", tmp_path: Path
) -> None:
    root = tmp_path / "a.zarr"
    harvest(root, whole, LAYERS[:1])
    newer = whole.manifest.model_copy(update={"versions": {"numpy": "9.9", "posae": "later"}})
    with pytest.raises(StoreMismatchError, match="install those versions, or record the difference: --allow"):
        StoreWriter.begin(root, newer, LAYERS[1:])
    made = replace(whole, manifest=newer)
    harvest(root, made, LAYERS[1:], allow_versions=True)
    store = ActivationStore.open(root)
    assert store.manifest == whole.manifest
    assert [store.layer_versions(layer) for layer in LAYERS] == [{}, {"numpy": "9.9"}]
    assert verify(store).damaged == []
    np.testing.assert_array_equal(store.read(3), whole.activations[3])
    assert "written by other versions than the rest: `numpy` `9.9`" in (root / CARD_PATH).read_text()


def test_a_layer_begun_by_other_versions_is_finished_by_these_alone(whole: "Made", tmp_path: Path) -> None:
    root = tmp_path / "a.zarr"
    harvest(root, whole, LAYERS[:1])
    for version in ("9.9", "9.10"):
        newer = whole.manifest.model_copy(update={"versions": {"numpy": version}})
        writer = StoreWriter.begin(root, newer, LAYERS[1:], allow_versions=True)
        with writer.lock():
            if version == "9.9":
                writer.begin_layers(LAYERS[1:])
                continue
            with pytest.raises(StoreMismatchError, match="begun with other library versions"):
                writer.begin_layers(LAYERS[1:])


def test_a_shard_whose_lock_was_replaced_is_not_committed(whole: "Made", tmp_path: Path) -> None:
    root = tmp_path / "a.zarr"
    writer = StoreWriter.begin(root, whole.manifest, LAYERS)
    with writer.lock():
        writer.write_tokens(whole.tokens, whole.documents, whole.corpus)
        writer.begin_layers(LAYERS)
    locked = writer.lock_shard(LAYERS[:1], 0, wait=False)
    assert locked is not None
    with locked, ThreadPoolExecutor(1) as pool:
        rows = np.array(locked.contexts)
        locked.append(0, whole.activations[0][rows], whole.ordinary[rows], pool)
        partial = root / "layer_0/.c.0.0.0.partial"
        partial.unlink()
        partial.write_bytes(b"of another program")
        with pytest.raises(StoreWriteError, match="was removed by another program"):
            locked.commit()
    assert not (root / "layer_0/c.0.0.0").exists()
    assert list((root / "stats/layer_0").rglob("c.*")) == []


def test_a_disk_that_cannot_say_whether_a_file_is_there_is_an_error(whole: "Made", tmp_path: Path) -> None:
    root = tmp_path / "a.zarr"
    harvest(root, whole, LAYERS[:1])
    left, lstat = tree(root), Path.lstat

    def stale(path: Path) -> os.stat_result:
        if path.name == "seal.json":
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return lstat(path)

    with patch.object(Path, "lstat", stale), pytest.raises(StoreError, match="cannot be read"):
        harvest(root, whole, LAYERS[1:])
    assert {path: tree(root)[path] for path in left} == left


def test_a_lock_file_that_was_there_keeps_its_mode(tmp_path: Path) -> None:
    (tmp_path / LOCK_PATH).touch(mode=0o600)
    with exclusive(tmp_path):
        assert (tmp_path / LOCK_PATH).stat().st_mode & 0o777 == 0o600
