"""Loads the annotation checker before any test, so that `--jaxtyping-packages` finds it under its name, and has Triton
interpreted where there is no GPU, which has to be said before anything imports it.
"""

import os
import shutil

from hypothesis import settings

import tests.shapes  # noqa: F401

if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile("dsv3", deadline=None)  # on a busy machine an example's time says nothing about the code
settings.load_profile("dsv3")
