"""A digest of code holds every file that can change a figure, and no other."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ablations.catalogue import load
from ablations.code import ROOT, code_digest, code_files, experts_reached, files_reached
from dsv3.moe.dispatch import chosen_here

COIN = Path(__file__).with_name("coin_study.py")

Beside = Callable[..., str]


def reached(*modules: str) -> set[str]:
    return {path.relative_to(ROOT).as_posix() for path in files_reached(frozenset(modules))}


@pytest.fixture
def beside(tmp_path: Path) -> Beside:
    """The digest of a study of coins that imports something, in a folder of its own with files beside it."""

    def beside(imported: str, **files: str) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        for name, text in files.items():
            path = folder / name.replace("__", "/").replace("_dot_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        study = folder / "coins.py"
        study.write_text(COIN.read_text().replace("    tosses = int(", f"    {imported}\n    tosses = int("))
        return code_digest(load(str(study)).measure)

    return beside


@pytest.mark.parametrize("name", ["moe_capacity", "precision_modes", "latent_attention", "multi_token"])
def test_a_study_that_trains_reaches_the_model_and_the_step(name: str) -> None:
    files = {path.relative_to(ROOT).as_posix() for path in code_files(load(name).measure)}
    assert {"dsv3/model/transformer.py", "dsv3/train/step.py", "dsv3/attention/kernels/avx2.cpp"} <= files
    assert "ablations/study.py" not in files


def test_which_dispatch_experts_take_is_asked_where_a_study_has_any() -> None:
    training, plans = load("moe_capacity").measure, load("pipeline_bubble").measure
    assert experts_reached(plans) is experts_reached() is None
    assert experts_reached(plans, training) == chosen_here()
    assert ROOT / "dsv3/moe/fastest.toml" in code_files(training), "another table makes other cells"


def test_a_table_is_reached_with_the_module_that_reads_it() -> None:
    assert "bench/peaks.toml" in reached("bench.peaks")
    assert "bench/peaks.toml" not in reached("bench.record")
    assert "ablations/claims.toml" not in reached("ablations.tuning"), "a reworded claim changes no figure"
    tables = [path for room in ("bench", "dsv3") for path in (ROOT / room).rglob("*.toml")]
    assert tables
    assert [path for path in tables if not path.with_suffix(".py").is_file()] == [], "it bears its module's name"


def test_a_module_beside_a_study_is_part_of_what_its_cells_depend_on(beside: Beside) -> None:
    one, other = "SIDES = 2\n", "SIDES = 3\n"
    assert beside("import faces", faces_dot_py=one) != beside("import faces", faces_dot_py=other)
    assert beside("import faces", faces_dot_py=one) == beside("import faces", faces_dot_py=f"# why\n{one}")
    assert beside("from faces import SIDES", faces_dot_py=one) != beside("from faces import SIDES", faces_dot_py=other)
    assert beside("import math", faces_dot_py=one) == beside("import math", faces_dot_py=other), "it is not imported"


def test_what_a_module_beside_a_study_imports_counts_too(beside: Beside) -> None:
    via = {"faces_dot_py": "import metal\n"}
    assert beside("import faces", **via, metal_dot_py="HEAVY = 1\n") != beside(
        "import faces", **via, metal_dot_py="HEAVY = 2\n"
    )
    inside = [beside("import kit", kit__faces_dot_py=f"HEAVY = {heavy}\n") for heavy in (1, 2)]
    assert inside[0] != inside[1], "of a package beside it every module"


def test_a_module_beside_a_study_brings_what_it_imports_from_here(beside: Beside) -> None:
    assert beside("import faces", faces_dot_py="") != beside("import faces", faces_dot_py="import bench.interval\n")
