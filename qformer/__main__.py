"""Entry point of `python -m qformer`."""

from qformer.cli import main

main()
