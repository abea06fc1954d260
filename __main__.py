"""``python -m posae``, and the command ``posae``.

A Ctrl-C while modules are loaded, before there is anything to say, ends it quietly.
"""

import sys


def main() -> None:
    """Load the command line and run it."""
    try:
        from posae.cli.app import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
