"""``python -m posae``."""

from posae.cli.app import main

main()
