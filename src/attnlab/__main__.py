"""`python -m attnlab` is `attnlab`."""

from .cli.main import run

run()
