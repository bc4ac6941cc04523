"""The studies by name. A study outside this repository is named by the path of its file: `run my_study.py`."""

import importlib
import sys
from difflib import get_close_matches
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from ablations import STUDIES
from ablations.study import Study


def load(name: str) -> Study:
    """The study of that name, or the one that the file at that path defines.

    Raises:
        ValueError: a name that is no study (with the nearest ones), a file that is not there or defines no STUDY.
    """
    if not name.endswith(".py") and name not in STUDIES:
        near = get_close_matches(name, STUDIES, n=3) or STUDIES
        raise ValueError(f"study={name!r}: must be one of the studies; did you mean {', '.join(near)}?")
    module = _from_file(Path(name)) if name.endswith(".py") else importlib.import_module(f"ablations.{name}")
    study = getattr(module, "STUDY", None)
    if not isinstance(study, Study):
        raise ValueError(f"study={name!r}: the file defines no STUDY; see the example in ablations/study.py")
    return study


def every() -> tuple[Study, ...]:
    """The studies of this repository, in the order of the report."""
    return tuple(load(name) for name in STUDIES)


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ValueError(f"study={str(path)!r}: there is no such file; give a path to one, or a name from `list`")
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None, f"{path} ends in .py, so it has a loader"
    assert spec.loader is not None, f"{path} ends in .py, so it has a loader"
    module = module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module
