"""The tree of errors in the docstring is the tree of errors."""

import inspect

from posae.store import errors


def test_every_error_is_drawn_and_is_also_the_builtin_it_resembles() -> None:
    lines = (errors.__doc__ or "").splitlines()
    drawn = {words[0]: words[1:] for line in lines if (words := line.replace("│", "").strip("├└─ ").split())}
    classes = {
        name: found for name, found in inspect.getmembers(errors, inspect.isclass) if name.endswith("Error")
    }
    assert classes.keys() <= drawn.keys()
    for name, found in classes.items():
        assert issubclass(found, errors.PosaeError)
        builtins = [
            base.__name__
            for base in found.__bases__
            if base.__module__ == "builtins" and base is not Exception
        ]
        for builtin in builtins:
            assert f"({builtin})" in drawn[name], f"{name} is a {builtin} too"
