"""Runs posae on stores from strangers and measures it: a small process that forks a child for each task.

A line of JSON in, ``{"what": …, "root": …}``, gives a line of JSON out. What a child costs is what the real
command costs, as all that the command imports is imported here (a forked child begins with its parent's
memory, and the CPU time of the imports is added), but for 20 ms rather than 400. Of a child of pytest
itself neither could be told.
"""

import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from posae.cli.app import main
from posae.store import ActivationStore
from posae.store.errors import StoreError

SECONDS = 20
REACHED_TRAINING = 99


def use(root: Path) -> str:
    """All that a reader does; the stage that is over, and what ended it."""
    stage = "nothing"
    try:
        store = ActivationStore.open(root)
        stage = "opened"
        store.check_layer(store.layer_or_middle(None))
        stage = "checked"
        for layer in store.layers:
            store.check_layer(layer)
            for ask in (store.held_out_part, store.digests, store.stored_bytes, store.stats, store.norms):
                ask(layer)
            store.read(layer, slice(0, 8))
            store.read(layer, [-1], dtype="float32")
        store.tokens()
        store.documents()
        assert isinstance(store.corpus, dict)
        assert repr(store)
        stage = "read"
    except StoreError as error:
        return f"{stage}\n{error}"
    return stage


class NoTraining:
    """Ends the process where a run would be prepared."""

    def find_spec(self, name: str, *_: object) -> None:
        if name == "posae.pipeline.train.training":
            os._exit(REACHED_TRAINING)


def train(root: Path) -> None:
    sys.meta_path.insert(0, NoTraining())  # pyright: ignore[reportArgumentType]
    command("train", str(root), str(root.parent / "run"))


def command(*words: str) -> None:
    sys.argv = ["posae", *words]
    main()


def anew(*words: str) -> None:
    """The same as a user's shell would do it."""
    os.execv(sys.executable, [sys.executable, "-m", "posae", *words])


TASKS: dict[str, Callable[[Path], object]] = {
    "use": lambda root: sys.stdout.write(use(root)),
    "verify": lambda root: command("inspect-store", str(root), "--verify"),
    "train": train,
    "verify anew": lambda root: anew("inspect-store", str(root), "--verify"),
    "help of train anew": lambda _: anew("train", "--help"),
    "train anew": lambda root: anew("train", str(root), str(root.parent / "run"), "--steps", "1"),
}


def as_a_command(task: Callable[[Path], object], root: Path) -> int:
    try:
        task(root)
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        return 70
    return 0


def measured(what: str, root: str) -> dict[str, Any]:
    """Exit code, CPU seconds, peak memory and output of one task; a negative code is a signal's."""
    said = os.memfd_create("said")
    child = os.fork()
    if not child:
        # Whoever hangs is killed.
        signal.alarm(SECONDS)
        os.dup2(said, 1)
        os.dup2(said, 2)
        code = as_a_command(TASKS[what], Path(root))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    _, status, cost = os.wait4(child, 0)
    text = os.pread(said, os.fstat(said).st_size, 0).decode()
    os.close(said)
    return {
        "code": os.waitstatus_to_exitcode(status),
        "seconds": cost.ru_utime + cost.ru_stime,
        "n_bytes": cost.ru_maxrss * 1024,
        "said": text,
    }


if __name__ == "__main__":
    if "train" in sys.argv:
        import posae.pipeline.sae.run_settings  # noqa: F401  # pyright: ignore[reportUnusedImport] (its options need torch)
    imports = resource.getrusage(resource.RUSAGE_SELF)
    for line in sys.stdin:
        task = json.loads(line)
        found = measured(**task)
        if not task["what"].endswith("anew"):
            found["seconds"] += imports.ru_utime + imports.ru_stime
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()
