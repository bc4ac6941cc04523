"""Loads the annotation checker before any test, so that `--jaxtyping-packages` finds it under its name."""

import tests.shapes  # noqa: F401
