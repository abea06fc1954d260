"""What posae does on a GPU, measured in minutes: right or wrong, and how fast.

    python benchmarks/gpu.py OUT --minutes 5
    python benchmarks/gpu.py OUT --only training          measure one step anew

Offline. OUT/gpu.json is written after each step, and the same command resumes with what is missing or failed;
the table is printed in the end. Each step has a share of the minutes; what it did until then is kept. Without
a GPU, or with --toy, all sizes are tiny: that shows that it runs, no more.

It needs Python 3.11 or later with torch 2.6 and transformers 5 (which bring numpy, safetensors, tokenizers,
huggingface_hub), and of posae's other dependencies these wheels, 12 MB with posae's own:

    pip download --no-deps --only-binary :all: -d WHEELS -c constraints.txt --python-version 3.12
        --platform manylinux2014_x86_64 --platform manylinux_2_28_x86_64
        numcodecs awscrt pydantic pydantic-core annotated-types typing-inspection psutil
    pip wheel --no-deps -w WHEELS .                       posae itself: its version is written into stores
    pip install --no-index --no-deps WHEELS/*.whl         on the machine with the GPU

nvidia-nvcomp-cu12 is used by the last step where it is installed.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from posae.pipeline.device import choose_device, free_bytes, keep_freed_memory
from posae.store.errors import PosaeError, SettingsError
from posae.store.files import StoreFiles

Value = TypeVar("Value")

SCHEMA = "posae gpu benchmark 1"


class Sizes(NamedTuple):
    """How large everything is."""

    name: str
    d_model: int
    features: tuple[int, ...]
    batch: int
    contexts: int
    """Of the store that is trained on."""
    window: int
    steps: int
    harvested: int
    """Contexts that go through the language model each time."""
    batches: tuple[int, ...]
    """Contexts to a forward pass."""
    is_gemma: bool
    compiler: str
    """Backend of torch.compile."""
    needed: int
    """Bytes on the GPU."""


FULL = Sizes(
    "full", 2304, (16384, 65536), 4096, 1024, 256, 24, 1024, (32, 64, 128), True, "inductor", 24 * 10**9
)
TOY = Sizes("toy", 32, (256, 512), 256, 64, 16, 4, 16, (8,), False, "eager", 0)


class TimeUp(BaseException):
    """A step has used its share of the time."""


class Bench:
    """What all steps share, and what has been measured so far."""

    def __init__(self, out: Path, sizes: Sizes, device: torch.device) -> None:
        """Open OUT, or begin it.

        Raises:
            SettingsError: OUT holds something else, or measurements of something else.
        """
        self.out, self.sizes, self.device = out, sizes, device
        is_gpu = device.type == "cuda"
        self.about = {
            "schema": SCHEMA,
            "sizes": sizes.name,
            "device": torch.cuda.get_device_name(device) if is_gpu else f"CPU ({platform.machine()})",
            "torch": str(torch.__version__),
        }
        self.steps: dict[str, dict[str, Any]] = {}
        self.values: dict[str, Any] = {}
        self._open()

    def _open(self) -> None:
        path = self.out / "gpu.json"
        if not path.exists():
            if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
                raise SettingsError(f"{self.out} holds something else than measurements; give another folder")
            return
        try:
            found = json.loads(path.read_bytes())
            about, self.steps = {key: found[key] for key in self.about}, dict(found["steps"])
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise SettingsError(f"{path} is not of this benchmark ({error}); give another folder") from None
        differ = [f"{key} {about[key]}" for key in about if about[key] != self.about[key]]
        if differ:
            now = ", ".join(f"{key} {self.about[key]}" for key in about if about[key] != self.about[key])
            raise SettingsError(f"{path} is of {', '.join(differ)}, this is {now}; give another folder")

    def save(self) -> None:
        """Write what was measured so far."""
        self.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**self.about, "steps": self.steps}, indent=2) + "\n"
        StoreFiles(self.out).write("gpu.json", text.encode())

    def wait(self) -> None:
        """Until the GPU is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], object], *, warm: int = 1, times: int = 1) -> float:
        """Of one call of ``work``, after some that are not counted."""
        for _ in range(warm):
            work()
        self.wait()
        started = time.perf_counter()
        for _ in range(times):
            work()
        self.wait()
        return (time.perf_counter() - started) / times

    def note(self, name: str, value: object) -> None:
        """Keep a value of the current step."""
        self.values[name] = round(value, 6) if isinstance(value, float) else value
        say(f"  {name}: {self.values[name]}" if not isinstance(value, list) else f"  {name}: see gpu.json")

    def attempt(self, name: str, work: Callable[..., Value], *given: Any, **named: Any) -> Value | None:
        """Keep what ``work`` gives, or why it gave nothing; the step continues."""
        try:
            value = work(*given, **named)
        except Exception as error:
            self.note(name, f"failed: {_one_line(error)}")
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            return None
        self.note(name, value)
        return value

    def run(self, name: str, step: Callable[["Bench"], None], seconds: float) -> None:
        """Run a step within its time, and keep what it measured."""
        say(f"{name} ({seconds:.0f} s at most)")
        self.values = {}
        started, why = time.perf_counter(), None
        try:
            with at_most(seconds):
                step(self)
        except TimeUp:
            why = f"stopped after {seconds:.0f} s"
        except Exception as error:
            why = _one_line(error)
        found = {"values": self.values, "seconds": round(time.perf_counter() - started, 1), "why_not": why}
        self.steps[name] = found
        self.save()
        if why:
            say(f"  {why}")


@contextmanager
def at_most(seconds: float) -> Generator[None]:
    """Raise TimeUp within, once so much time has passed."""

    def ring(*_: object) -> None:
        raise TimeUp

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(0.001, seconds))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def say(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def steps() -> dict[str, tuple[float, Callable[[Bench], None]]]:
    """Every step, the most valuable first, with its share of the time."""
    from gpu_steps import correctness, decoding, harvesting, training

    return {
        "correctness": (0.2, correctness),
        "harvest": (0.3, harvesting),
        "training": (0.4, training),
        "decoding": (0.1, decoding),
    }


def table(bench: Bench) -> list[str]:
    """What was measured, a line a value."""
    lines = [" · ".join(str(value) for value in list(bench.about.values())[1:])]
    for name in steps():
        step = bench.steps.get(name)
        if step is None:
            lines.append(f"{name:12} not measured: not asked for")
            continue
        for key, value in step["values"].items():
            shown = f"{len(value)} lines, in gpu.json" if isinstance(value, list) else str(value)
            lines.append(f"{name:12} {key:58} {shown}")
        if step["why_not"]:
            lines.append(f"{name:12} not all measured: {step['why_not']}")
    return lines


def chosen_sizes(device: torch.device, *, is_toy: bool) -> Sizes:
    """The sizes that are measured.

    Raises:
        SettingsError: the GPU has too little memory for them.
    """
    if is_toy or device.type != "cuda":
        return TOY
    free = free_bytes(device)
    if free < FULL.needed:
        raise SettingsError(
            f"{FULL.needed / 1e9:.0f} GB of GPU memory are needed, and {free / 1e9:.1f} GB are free; "
            "end what else uses the GPU, or give --toy"
        )
    return FULL


def main(words: list[str] | None = None) -> int:
    """Measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--only", choices=["correctness", "harvest", "training", "decoding"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--toy", action="store_true", help="tiny sizes")
    given = parser.parse_args(words)
    end = time.monotonic() + 60 * given.minutes
    keep_freed_memory()
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    try:
        device = choose_device(given.device, with_float64=True)
        bench = Bench(given.out, chosen_sizes(device, is_toy=given.toy), device)
        bench.save()
    except PosaeError as error:
        sys.stderr.write(f"Error: {error}\n")
        return 1
    left = {
        name: step
        for name, step in steps().items()
        if (name == given.only if given.only else _is_missing(bench.steps.get(name)))
    }
    for name, (share, step) in list(left.items()):
        in_all = sum(one for one, _ in left.values())
        seconds = (end - time.monotonic()) * share / in_all
        del left[name]
        if seconds > 0:
            bench.run(name, step, seconds)
        elif _is_missing(bench.steps.get(name)):
            before = bench.steps.get(name, {"values": {}, "seconds": 0.0})
            bench.steps[name] = {**before, "why_not": before.get("why_not", "no time was left")}
            bench.save()
        shutil.rmtree(bench.out / "work", ignore_errors=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    say("\n".join(["", *table(bench)]))
    return 0


def _is_missing(step: dict[str, Any] | None) -> bool:
    return step is None or step["why_not"] is not None


if __name__ == "__main__":
    sys.exit(main())
