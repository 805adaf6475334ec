"""`python -m attnlab` is `attnlab`."""

from attnlab.cli import run

run()
