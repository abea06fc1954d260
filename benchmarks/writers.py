"""Every writer after every killed writer: refused with one line and nothing touched, or right.

Each command that writes a folder (harvest, copy, copy of a part, merge, plant, import, train, each with two
sets of settings) is killed before each of its durable steps: every rename, link, removal and new folder. What
it left is then given to each command in turn. Right means: a sealed store whose files verify and whose
manifest, tokens and activations are those that the command alone makes, or a run with the same weights.

    python benchmarks/writers.py FOLDER                  all of it
    python benchmarks/writers.py FOLDER --sample 80      so many pairs of a step and a command, at random
    python benchmarks/writers.py FOLDER --random 300     chains of commands killed at random moments

Processes are forked from one that has everything imported, so a command costs a fraction of a second.
"""

import argparse
import os
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # threads do not survive a fork

import numpy as np

from posae.cli.app import main as posae_main
from posae.store.reader import ActivationStore
from posae.store.verify import verify

KILLED = 77
DURABLE = ("mkdir", "replace", "rename", "link", "unlink")
HARVEST = ("--contexts", "40", "--context-length", "4", "--batch-contexts", "8")
TRAIN = (
    "--layer",
    "1",
    "--architecture",
    "topk",
    "--target-l0",
    "2",
    "--dictionary-size",
    "8",
    "--steps",
    "3",
)


class Writers:
    """Commands that write a folder, the sources that they read, and what each leaves undisturbed.

    Attributes:
        folder: holds all of it.
        commands: by name, each given the place to write.
        wrong: what was neither refused nor right.
    """

    def __init__(self, folder: Path) -> None:
        """Make the sources, and run each command once undisturbed."""
        self.folder, self.wrong = folder, list[str]()
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "alone").mkdir(parents=True)
        sources = {name: folder / f"{name}.zarr" for name in ("a", "b", "next", "other")}
        for name, seed, skip in (("a", 0, 0), ("b", 1, 0), ("next", 0, 40), ("other", 1, 40)):
            words = (*HARVEST, "--layers", "1,3", "--seed", seed, "--skip-contexts", skip)
            self._must("harvest", sources[name], *words)
        for name in ("one", "two"):
            (folder / name).mkdir()
            values = np.random.default_rng(len(name) + ord(name[0])).standard_normal((40, 4, 8))
            np.save(folder / name / "acts.npy", values.astype(np.float32))
        a, b, following, other = sources.values()
        self.commands: dict[str, Callable[[Path], tuple[Any, ...]]] = {
            "harvest": lambda place: ("harvest", place, *HARVEST, "--layers", "1"),
            "harvest, two layers": lambda place: ("harvest", place, *HARVEST, "--layers", "1,3"),
            "harvest, other seed": lambda place: ("harvest", place, *HARVEST, "--layers", "1", "--seed", 1),
            "copy": lambda place: ("copy", a, place),
            "copy, other store": lambda place: ("copy", b, place),
            "copy of a layer": lambda place: ("copy", a, place, "--layers", "1"),
            "merge": lambda place: ("merge", a, following, "--out", place, "--layers", "1"),
            "merge, other stores": lambda place: ("merge", b, other, "--out", place, "--layers", "1"),
            "plant": lambda place: ("plant", a, place, "--layer", "1", "--rank", "2"),
            "plant, other seed": lambda place: (
                "plant",
                a,
                place,
                "--layer",
                "1",
                "--rank",
                "2",
                "--seed",
                1,
            ),
            "import": lambda place: ("import", folder / "one/acts.npy", place, "--layer", "1"),
            "import, other file": lambda place: ("import", folder / "two/acts.npy", place, "--layer", "1"),
            "train": lambda place: ("train", a, place, *TRAIN),
            "train, other seed": lambda place: ("train", a, place, *TRAIN, "--seed", 1),
        }
        for name, words in self.commands.items():
            self._must(*words(self.alone(name)))

    def alone(self, name: str) -> Path:
        """What a command leaves when nothing disturbs it."""
        return self.folder / "alone" / name.replace(", ", "_").replace(" ", "_")

    def _must(self, *words: Any) -> None:
        """Run a command in this process, which imports what it needs before anything is forked."""
        streams = sys.stdout, sys.stderr
        with (self.folder / "said").open("w") as said:
            sys.stdout = sys.stderr = said
            try:
                code = run(words)
            finally:
                sys.stdout, sys.stderr = streams
        assert code == 0, f"{words} ends with {code}: {self.said()}"

    def begin(self, words: Sequence[Any], at_step: int = 0, count_into: Path | None = None) -> int:
        """The process that runs a command; killed before its durable step number ``at_step``, from 1.

        Args:
            words: the command.
            at_step: 0: it is not killed.
            count_into: a file for the number of its steps.
        """
        sys.stdout.flush()
        child = os.fork()
        if child:
            return child
        code = 99
        try:
            said = os.open(self.folder / "said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            os.dup2(said, 1)
            os.dup2(said, 2)
            left = kill_at(at_step)
            code = run(words)
            if count_into is not None:
                count_into.write_text(str(at_step - left[0]))
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)

    def said(self) -> str:
        """What the last command printed."""
        return (self.folder / "said").read_text()

    def check(self, name: str, place: Path, killed: str, step: int | str) -> str:
        """Run a command on what a killed one left: ``refused`` or ``right``; anything else is kept as wrong.

        Args:
            name: the command.
            place: the folder.
            killed: which command was killed.
            step: when.
        """
        before = tree(place)
        code = ended(self.begin(self.commands[name](place)))
        lines = [
            line for line in self.said().splitlines() if line.startswith("error: ") or "Traceback" in line
        ]
        if code == 1 and len(lines) == 1 and lines[0].startswith("error: "):
            problem = "" if tree(place) == before else "was refused and changed the folder"
            verdict = "refused"
            if name == killed and not problem:
                problem = f"cannot resume itself: {lines[0]}"
        elif code == 0:
            problem, verdict = self._unlike_alone(name, place), "right"
        else:
            problem, verdict = f"ends with {code}: {self.said()[-1500:]}", ""
        if not problem:
            return verdict
        self.wrong.append(f"{name} after {killed}, killed at {step}: {problem}")
        say(f"  WRONG: {self.wrong[-1]}")
        return "WRONG"

    def _unlike_alone(self, name: str, place: Path) -> str:
        alone = self.alone(name)
        if name.startswith("train"):
            weights = [(root / "sae_weights.safetensors").read_bytes() for root in (place, alone)]
            return "" if weights[0] == weights[1] else "left other weights"
        store, wanted = ActivationStore.open(place), ActivationStore.open(alone)
        if not store.is_sealed:
            return "left it unsealed"
        if damaged := verify(store).damaged:
            return f"left damage: {damaged}"
        if store.manifest != wanted.manifest:
            return "left another manifest"
        if (store.tokens() != wanted.tokens()).any() or (store.documents() != wanted.documents()).any():
            return "left other tokens"
        if missing := set(wanted.layers) - set(store.layers):
            return f"left out layers {missing}"
        full = ActivationStore.open(self.alone("harvest, two layers")) if "harvest" in name else wanted
        for layer in store.layers:
            source = wanted if layer in wanted.layers else full
            if (store.read(layer) != source.read(layer)).any():
                return f"left other activations in layer {layer}"
        return ""

    def n_steps(self, name: str) -> int:
        """Durable steps of a command that nothing disturbs."""
        place, count = self.folder / "place", self.folder / "count"
        shutil.rmtree(place, ignore_errors=True)
        assert ended(self.begin(self.commands[name](place), count_into=count)) == 0
        return int(count.read_text())

    def stages(self, name: str) -> Iterator[tuple[int, Path]]:
        """What the command leaves when it is killed before each of its steps, different ones only."""
        place, seen = self.folder / "place", list[dict[str, bytes]]()
        for step in range(1, 10_000):
            shutil.rmtree(place, ignore_errors=True)
            code = ended(self.begin(self.commands[name](place), step))
            if code != KILLED:
                assert code == 0, f"{name}: {self.said()}"
                return
            if tree(place) not in seen:
                seen.append(tree(place))
                yield step, place


def run(words: Sequence[Any]) -> int:
    """What a command ends with, in this process."""
    sys.argv = ["posae", *map(str, words)]
    try:
        posae_main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def kill_at(step: int) -> list[int]:
    """Let this process die before its durable step number ``step``; fsync does nothing, as no power is cut.

    Returns:
        The steps that are left before that, in a list that is kept up to date.
    """
    left = [step]

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*args: Any, **keywords: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                os._exit(KILLED)
            return call(*args, **keywords)

        return counting

    for name in DURABLE:
        setattr(os, name, counted(getattr(os, name)))
    os.fsync = lambda _: None
    return left


def tree(root: Path) -> dict[str, bytes]:
    """Every file and its bytes, the empty file of the lock aside."""
    files = [file for file in sorted(root.rglob("*")) if file.is_file() and file.name != ".lock"]
    return {str(file.relative_to(root)): file.read_bytes() for file in files}


def ended(child: int) -> int:
    """The exit status of a process; negative where a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def say(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def matrix(writers: Writers) -> None:
    """Each command after each stage of each command."""
    kept = writers.folder / "kept"
    for first in writers.commands:
        verdicts: Counter[str] = Counter()
        n_stages = 0
        for step, place in writers.stages(first):
            n_stages += 1
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(place, kept) if place.exists() else kept.mkdir()
            for then in writers.commands:
                shutil.rmtree(place, ignore_errors=True)
                shutil.copytree(kept, place)
                verdicts[writers.check(then, place, first, step)] += 1
        say(f"{first:22} {n_stages:4} stages, then: {counts(verdicts)}")


def sample(writers: Writers, n_pairs: int, rng: np.random.Generator) -> None:
    """Some pairs of a stage and a command, at random."""
    names, place = list(writers.commands), writers.folder / "place"
    n_steps = {name: writers.n_steps(name) for name in names}
    verdicts: Counter[str] = Counter()
    for _ in range(n_pairs):
        first, then = str(rng.choice(names)), str(rng.choice(names))
        step = int(rng.integers(1, n_steps[first] + 1))
        shutil.rmtree(place, ignore_errors=True)
        assert ended(writers.begin(writers.commands[first](place), step)) == KILLED
        place.mkdir(exist_ok=True)
        verdicts[writers.check(then, place, first, step)] += 1
    say(f"{n_pairs} pairs of {sum(n_steps.values())} steps and {len(names)} commands: {counts(verdicts)}")


def counts(verdicts: Counter[str]) -> str:
    """How often each verdict was given."""
    return ", ".join(f"{count} {verdict}" for verdict, count in sorted(verdicts.items()))


def random_kills(writers: Writers, n_kills: int, rng: np.random.Generator) -> None:
    """Chains of commands on one folder, each but the last killed at a random moment."""
    names = list(writers.commands)
    place, done, chains = writers.folder / "place", 0, 0
    verdicts: Counter[str] = Counter()
    while done < n_kills:
        shutil.rmtree(place, ignore_errors=True)
        history: list[str] = []
        # Half of the chains stay with one command, which gets further.
        first = str(rng.choice(names))
        for _ in range(int(rng.integers(1, 4))):
            name = first if rng.random() < 0.5 else str(rng.choice(names))
            child = writers.begin(writers.commands[name](place))
            time.sleep(float(rng.uniform(0, 0.6)))
            os.kill(child, signal.SIGKILL)
            done += ended(child) == -signal.SIGKILL  # else it had ended before
            history.append(name)
        last = first if rng.random() < 0.5 else str(rng.choice(names))
        verdicts[writers.check(last, place, " and ".join(history), "random moments")] += 1
        chains += 1
    say(f"{done} random kills in {chains} chains, then: {counts(verdicts)}")


def main() -> None:
    """The matrix, a sample of it, or random kills."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sample", type=int)
    parser.add_argument("--random", type=int)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    began = time.monotonic()
    writers, rng = Writers(options.folder / "writers"), np.random.default_rng(options.seed)
    if options.random:
        random_kills(writers, options.random, rng)
    elif options.sample:
        sample(writers, options.sample, rng)
    else:
        matrix(writers)
    say(f"{len(writers.wrong)} wrong, {time.monotonic() - began:.0f} s")
    raise SystemExit(bool(writers.wrong))


if __name__ == "__main__":
    main()
