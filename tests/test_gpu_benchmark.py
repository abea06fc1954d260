"""benchmarks/gpu.py runs through: toy sizes, a pretended GPU, no packages but those that its head names."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
NOT_NEEDED = (
    *("datasets", "pyarrow", "pandas", "zarr", "sklearn", "scipy", "plotly", "typer", "rich", "zstandard"),
    *("boto3", "paramiko", "google.auth", "tensorboard", "wandb"),
)
PRETENDED = f"""
import sys
sys.modules.update(dict.fromkeys({NOT_NEEDED!r}))  # importing one of them fails
sys.path.insert(0, {str(BENCHMARKS)!r})
import gpu
import gpu_steps  # what it imports looks at torch.cuda as it is
from posae.tests.pipeline.pretended_gpu import pretended_gpu
with pretended_gpu():
    sys.exit(gpu.main(sys.argv[1:]))
"""


def run(*words: object, code: str | None = None) -> subprocess.CompletedProcess[str]:
    script = ["-c", code] if code else [str(BENCHMARKS / "gpu.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *script, *map(str, words)], env=environment, capture_output=True, text=True
    )


def measured(out: Path) -> dict[str, Any]:
    return json.loads((out / "gpu.json").read_bytes())["steps"]


def test_every_step_is_measured_and_not_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = run(out, "--toy", "--minutes", "10", code=PRETENDED)
    assert ended.returncode == 0, ended.stderr
    steps = measured(out)
    assert list(steps) == ["correctness", "harvest", "training", "decoding"]
    for name, step in steps.items():
        assert step["why_not"] is None, (name, step)
        assert len(step["values"]) > 2
        failed = {key: value for key, value in step["values"].items() if str(value).startswith("failed")}
        for key, value in failed.items():  # what a build of torch without CUDA does not pretend
            assert ("bfloat16" in key or "compiled" in key) == ("Torch not compiled with CUDA" in value)
        assert {key for key in failed if "bfloat16" not in key and "compiled" not in key} <= {"nvCOMP: GB/s"}
    assert all(str(value).startswith("right") for value in steps["correctness"]["values"].values())
    for line in (
        "correctness  batches of activations",
        "training     256 features, tf32: scoring / training",
    ):
        assert line in ended.stdout
    assert [path.name for path in out.iterdir()] == ["gpu.json"]

    before = (out / "gpu.json").read_bytes()
    again = run(out, "--toy", code=PRETENDED)
    assert again.returncode == 0
    assert again.stdout.strip() == ended.stdout.partition("\n\n")[2].strip(), "the table alone"
    assert (out / "gpu.json").read_bytes() == before
    without = run(out)  # on a CPU
    assert without.returncode == 1
    assert "is of device a pretended GPU, this is device CPU" in without.stderr


def test_a_step_without_time_says_so_and_is_done_later(tmp_path: Path) -> None:
    words = (tmp_path / "out", "--toy", "--only", "decoding")
    assert run(*words, "--minutes", "0.0001").returncode == 0
    assert measured(tmp_path / "out")["decoding"]["why_not"] == "no time was left"
    ended = run(*words)
    assert measured(tmp_path / "out")["decoding"]["why_not"] is None
    assert "harvest      not measured" in ended.stdout


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--device", "cuda"], None, "device cuda is not available"),
        ([], PRETENDED, "24 GB of GPU memory are needed, and 17.2 GB are free"),
    ],
    ids=["no GPU", "too little memory"],
)
def test_what_cannot_be_measured_is_refused_in_a_line(
    words: list[str], code: str | None, said: str, tmp_path: Path
) -> None:
    ended = run(tmp_path / "out", *words, code=code)
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"Error: {said}")
    assert ended.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["letter.txt", "gpu.json"])
def test_a_folder_of_something_else_is_left_alone(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("dear reader")
    ended = run(tmp_path, "--toy")
    assert ended.returncode == 1
    assert ended.stderr.startswith("Error: ")
    assert ended.stderr.rstrip("\n").endswith("give another folder")
    assert ended.stderr.count("\n") == 1
    assert (tmp_path / name).read_text() == "dear reader"
