"""The corpus that every machine has."""

import doctest
import subprocess
import sys

import pytest

from posae.pipeline.harvest.text import contexts, stdlib

FILES = stdlib.stdlib_files()
PATHS = [path for path, _ in FILES]


def test_files_are_the_library_and_nothing_else() -> None:
    assert len(PATHS) == len(set(PATHS)) > 300
    assert {"ast.py", "json/decoder.py"} <= set(PATHS)
    for path in PATHS:
        *folders, name = path.split("/")
        assert not {"test", "tests", "site-packages", "dist-packages"} & set(folders)
        assert name.endswith(".py")
        assert (folders[0] if folders else name.removesuffix(".py")) in sys.stdlib_module_names


def test_held_out_files_are_a_tenth_and_disjoint_from_the_others() -> None:
    training, held_out = stdlib.stdlib_files("train"), stdlib.stdlib_files("held_out")
    assert not set(training) & set(held_out)
    assert set(training) | set(held_out) == set(FILES)
    assert 0.07 < len(held_out) / len(FILES) < 0.13
    assert [file for file in FILES if file in set(training)] == training  # the same order


def test_order_and_revision_are_the_same_in_another_process() -> None:
    # Its hashes of strings are seeded otherwise, so that an order out of a set would show.
    code = (
        "from posae.pipeline.harvest.text.stdlib import *\n"
        "import sys\n"
        "sys.stdout.write(stdlib_revision() + ' ' + ' '.join(p for p, _ in stdlib_files()))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.split() == [stdlib.stdlib_revision(), *PATHS]
    assert stdlib.stdlib_revision().startswith(f"python-{sys.version_info[0]}.")


def test_documents_are_the_texts_of_the_files() -> None:
    assert list(stdlib.stdlib_documents()) == [text for _, text in FILES]


def test_unknown_split_is_told_the_known_ones() -> None:
    with pytest.raises(ValueError, match="train, held_out, all"):
        stdlib.stdlib_files("validation")


@pytest.mark.parametrize("module", [contexts, stdlib], ids=lambda m: m.__name__)
def test_examples(module: object) -> None:
    assert doctest.testmod(module).failed == 0  # pyright: ignore[reportArgumentType]
