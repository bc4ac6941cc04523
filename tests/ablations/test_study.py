import ast
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ablations import STUDIES
from ablations.catalogue import every, load, typed
from ablations.code import ROOT, code_digest, definitions_reached, files_reached
from ablations.study import Arm, Cell, Figure, Reading, Rule, Study, grid
from bench.measurement import Measurement

COIN = Path(__file__).with_name("coin_study.py")


@pytest.fixture
def edited(tmp_path: Path) -> Callable[..., Study]:
    """The coin study with some of its text replaced, loaded anew."""

    def edit(old: str, new: str) -> Study:
        text = COIN.read_text()
        assert old in text
        path = tmp_path / f"coin_{abs(hash(new))}.py"
        path.write_text(text.replace(old, new))
        return load(str(path))

    return edit


def test_a_grid_is_every_combination_with_the_seed_slowest() -> None:
    cells = grid(arms=("a", "b"), seeds=(0, 1), seconds=3, length=(1, 2))
    told = [(cell.seed, cell.axes["length"], cell.arm) for cell in cells]
    assert told == [(s, n, a) for s in (0, 1) for n in (1, 2) for a in ("a", "b")]
    assert grid(seconds=3) == (Cell(arm=None, seed=None, axes={}, seconds=3),)


@given(st.lists(st.integers(), unique=True), st.lists(st.text(), unique=True), st.lists(st.floats(0, 1), unique=True))
def test_a_grid_has_no_cell_twice(seeds: list[int], arms: list[str], factors: list[float]) -> None:
    cells = grid(arms=arms, seeds=seeds, seconds=1, factor=factors)
    assert len(cells) == len(seeds) * len(arms) * len(factors)
    assert len({(cell.arm, cell.seed, cell.axes["factor"]) for cell in cells}) == len(cells)


@pytest.mark.parametrize(
    "change, error",
    [
        ({"baseline": "gold"}, "baseline='gold': must be one of fair, bent"),
        ({"arms": (Arm("fair", ""), Arm("fair", ""))}, "arms=.*must have distinct names"),
        ({"metrics": ("los",)}, "metric='los': is not in the table of metrics; did you mean loss"),
        ({"figures": (Figure("f", "c", metric="los", x="n"),)}, "metric='los'"),
        ({"untabled": ("mfu",)}, r"untabled=\['mfu'\]: must be of "),
        ({"seeds": {"quick": 2}}, "seeds=.*must have quick and full"),
        ({"seeds": {"quick": 2, "full": 3}}, "seeds=6: must be at most the full profile's 3"),
        ({"rules": (Rule("A9", 0, lambda claim, records: None),)}, "claim='A9': must be one of A1, A2"),  # type: ignore[arg-type, return-value]
    ],
)
def test_a_study_that_cannot_be_answered_is_refused(coin: Study, change: dict[str, object], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        replace(coin, **change)  # type: ignore[arg-type]


def test_a_reading_is_one_thing(coin: Study) -> None:
    with pytest.raises(AssertionError, match="a reading is a measurement, or failed, or pending"):
        Reading(arm="fair")
    with pytest.raises(AssertionError, match="a reading is"):
        Reading(arm="fair", measurement=Measurement(metric="loss", value=1), failed="no")
    with pytest.raises(ValueError, match="metric='los'"):
        Reading(arm="fair", metric="los", failed="no")


def test_a_changed_decision_changes_the_rules_digest(coin: Study, edited: Callable[..., Study]) -> None:
    assert edited("at_most=-0.1", "at_most=-0.2").rule_digest() != coin.rule_digest()
    assert edited('Rule("A2", seeds=0', 'Rule("A2", seeds=1').rule_digest() != coin.rule_digest()
    assert edited('Rule("A2", seeds=0', 'Rule("A1", seeds=0').rule_digest() != coin.rule_digest()


def test_a_comment_or_a_figure_changes_neither_digest(coin: Study, edited: Callable[..., Study]) -> None:
    for old, new in (("Share of heads", "Heads"), ("def note", "# why\ndef note"), ("Coins are not models.", "No.")):
        other = edited(old, new)
        assert other.rule_digest() == coin.rule_digest()
        assert code_digest(other.measure) == code_digest(coin.measure)


def test_changed_measuring_changes_the_digest_of_the_code(coin: Study, edited: Callable[..., Study]) -> None:
    for old, new in (
        ("/ tosses\n", "/ tosses / 2\n"),
        ('"bent": 0.2', '"bent": 0.3'),
        ('log.write(f"{what} ', 'log.write(f"'),
    ):
        assert code_digest(edited(old, new).measure) != code_digest(coin.measure)


def test_a_comprehensions_variable_is_not_a_definition(tmp_path: Path) -> None:
    path = tmp_path / "judging.py"
    path.write_text("TABLE = {row: 1 for row in (1, 2)}\n\ndef judge():\n    row = 3\n    return row\n")
    spec = spec_from_file_location("judging", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    assert [type(node) for node in definitions_reached(module.judge)] == [ast.FunctionDef]


def test_the_code_reached_is_what_the_imports_import_in_turn() -> None:
    reached = {path.relative_to(ROOT).as_posix() for path in files_reached(frozenset({"bench.measurement"}))}
    assert {"bench/measurement.py", "bench/metrics.py", "bench/record.py", "bench/__init__.py"} <= reached
    assert "bench/cases.py" not in reached


def test_an_import_that_measuring_does_not_use_is_not_reached(coin: Study, edited: Callable[..., Study]) -> None:
    unused = edited("import random\n", "import random\nimport bench.measurement as unused\n")
    assert code_digest(unused.measure) == code_digest(coin.measure)
    used = edited("    tosses = int(", "    import bench.interval\n    tosses = int(")
    assert code_digest(used.measure) != code_digest(coin.measure)


def test_an_unknown_study_is_refused_with_the_near_names(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="study='nothing': must be one of the studies"):
        load("nothing")
    with pytest.raises(ValueError, match="there is no such file"):
        load(str(tmp_path / "none.py"))
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ValueError, match="the file defines no STUDY"):
        load(str(tmp_path / "empty.py"))


def test_a_study_by_path_stands_after_the_others_under_a_name_of_its_own(tmp_path: Path) -> None:
    path = ROOT / "ablations" / "multi_token_tuned.py"
    studies = every([str(path), STUDIES[0]])
    assert [study.name for study in studies] == [*STUDIES, "multi_token_tuned"]
    assert [typed(study) for study in studies] == [*STUDIES, "ablations/multi_token_tuned.py"]
    outside = tmp_path / "mine.py"
    outside.write_text(path.read_text().replace('"multi_token_tuned"', '"mine"'))
    assert typed(load(str(outside))) == str(outside)
    with pytest.raises(ValueError, match="names itself 'multi_token', as one before it does"):
        every([str(path.with_name("multi_token.py"))])


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.parametrize("profile", ["quick", "full"])
def test_a_study_declares_cells_that_can_run(name: str, profile: str) -> None:
    study = load(name)
    assert study.name == name
    cells = study.cells(profile)  # type: ignore[arg-type]
    assert cells
    assert all(cell.arm is None or study.arm(cell.arm) for cell in cells)
    points = [(cell.arm, cell.seed, tuple(cell.axes.items())) for cell in cells]
    assert len(set(points)) == len(points), "a cell stands twice"


def test_the_studies_and_their_verdicts_load_without_torch() -> None:
    code = "import sys, ablations.verdicts, ablations.catalogue as c; c.every(); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
