"""The studies by name. A study outside this repository is named by the path of its file: `run my_study.py`."""

import importlib
import inspect
import sys
from collections.abc import Iterable
from difflib import get_close_matches
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from ablations import STUDIES
from ablations.code import ROOT
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


def every(others: Iterable[str] = ()) -> tuple[Study, ...]:
    """The studies of this repository, in the order of the report, and after them others by name or path.

    Raises:
        ValueError: what `load` raises, or another study that has the name of one before it.
    """
    studies: dict[str, Study] = {}
    for name in dict.fromkeys((*STUDIES, *others)):
        study = load(name)
        if study.name in studies:
            raise ValueError(f"study={name!r}: names itself {study.name!r}, as one before it does; rename either")
        studies[study.name] = study
    return tuple(studies.values())


def typed(study: Study) -> str:
    """What stands for a study on the command line: its name, or, of one that is not in the list, its file's path."""
    if study.name in STUDIES:
        return study.name
    source = inspect.getsourcefile(study.measure)
    assert source is not None, f"{study.name}: measure has no source file"
    path = Path(source).resolve()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)


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
