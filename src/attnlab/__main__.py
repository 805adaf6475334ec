"""`python -m attnlab` is `attnlab`."""

from .cli import run

run()
