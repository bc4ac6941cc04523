"""Loads the annotation checker before any test, so that `--jaxtyping-packages` finds it under its name, and has Triton
interpreted where there is no GPU, which has to be said before anything imports it; and where the user's cache is.
"""

import os
import shutil
from pathlib import Path

from hypothesis import settings

import tests.shapes  # noqa: F401

if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")
# pytester gives what it runs another home, where the C++ kernels would be compiled anew for each test.
os.environ.setdefault("XDG_CACHE_HOME", str(Path.home() / ".cache"))

settings.register_profile("dsv3", deadline=None)  # on a busy machine an example's time says nothing about the code
settings.load_profile("dsv3")
