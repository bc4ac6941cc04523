"""Loads the annotation checker before any test, so that `--jaxtyping-packages` finds it under its name."""

from hypothesis import settings

import tests.shapes  # noqa: F401

settings.register_profile("dsv3", deadline=None)  # on a busy machine an example's time says nothing about the code
settings.load_profile("dsv3")
