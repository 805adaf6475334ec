"""Shapes and types that the tensor code declares are checked while the tests run, and only then."""

from __future__ import annotations

import os

from jaxtyping import install_import_hook

os.environ.setdefault("OMP_NUM_THREADS", "1")
CHECKED = ["attnlab.cache", "attnlab.ops", "attnlab.kernels", "attnlab.attention", "attnlab.model"]
install_import_hook(CHECKED, "beartype.beartype")
