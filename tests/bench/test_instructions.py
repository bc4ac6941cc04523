"""Instruction counts: the same for the same code, and one empty tensor more is seen in them."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bench import instructions, instrumented, variants
from bench.instructions import DISPATCH_MARGIN, MARGIN, Comparison, Count, Counts, Row, copied, joined, read, started
from bench.revision import ROOT
from bench.variants import Work

WORK = ("base", "decode_grouped")
REASON = instructions.why_not()
counted = pytest.mark.skipif(REASON is not None, reason=f"instructions cannot be counted: {REASON}")


@pytest.fixture(scope="module")
def sides() -> tuple[Counts, Counts, Counts]:
    """The working tree twice, and one with an empty tensor more in each training step that cannot decode any more."""
    with copied(ROOT) as tree, copied(ROOT) as other, ThreadPoolExecutor(2) as pool:
        edit(other / "dsv3" / "train" / "step.py", "    state.model.train()\n", "    torch.empty(0)\n")
        edit(other / "dsv3" / "attention" / "cache.py", "    def empty(\n", "    def no_longer_empty(\n", instead=True)
        one, two, three = pool.map(count, (tree, tree, other))
        return one, two, three


def edit(path: Path, line: str, more: str, *, instead: bool = False) -> None:
    text = path.read_text()
    assert text.count(line) == 1
    path.write_text(text.replace(line, more if instead else line + more))


def count(tree: Path) -> Counts:
    with started(tree, WORK) as counts:
        return counts()


@counted
@pytest.mark.slow
def test_equal_code_counts_equal_in_fresh_processes_within_a_tenth_of_the_margins(sides: tuple[Counts, ...]) -> None:
    one, two, _ = sides
    assert set(one.by_work) == set(two.by_work) == set(WORK)
    assert one.reasons == two.reasons == {}
    for work, found in one.by_work.items():
        assert abs(two.by_work[work].total - found.total) < MARGIN / 10 * found.total
        assert abs(two.by_work[work].dispatch - found.dispatch) < DISPATCH_MARGIN / 10
    assert all(0 < found.dispatch < found.total for found in one.by_work.values())


@counted
@pytest.mark.slow
def test_one_empty_tensor_more_in_a_training_step_is_dearer(sides: tuple[Counts, ...]) -> None:
    plain, _, wasteful = sides
    row = next(row for row in joined(plain, wasteful)[1] if row.work == "base")
    assert row.dearer
    assert DISPATCH_MARGIN < row.dispatched < 5 * DISPATCH_MARGIN


@counted
@pytest.mark.slow
def test_work_that_one_side_cannot_do_is_a_loss_in_the_tree_and_not_comparable_in_the_base(
    sides: tuple[Counts, ...],
) -> None:
    plain, _, lame = sides
    gone = next(row for row in joined(plain, lame)[1] if row.work == "decode_grouped")
    new = next(row for row in joined(lame, plain)[1] if row.work == "decode_grouped")
    assert (gone.dearer, new.dearer) == (True, False)
    assert "the base cannot do it: AttributeError" in str(new)


def test_a_base_that_cannot_even_be_imported_gives_its_reason_for_every_row() -> None:
    base = Counts("AVX2", {}, {instrumented.EVERYTHING: "ImportError: no Float8Block"})
    _, rows = joined(base, Counts("AVX2", {"base": Count(1, 1), "window": Count(1, 1)}, {}))
    assert [str(row) for row in rows] == [
        f"{work}: not comparable, the base cannot do it: ImportError: no Float8Block" for work in ("base", "window")
    ]


def test_a_comparison_tells_what_moved_and_how_far_the_rest_is() -> None:
    rows = (
        Row("base", Count(1000, 10), Count(1002, 10)),
        Row("dense", Count(1000, 10), Count(900, 10)),
        Row("window", Count(1000, 10), Count(2000, 10)),
        Row("grouped", Count(10_000_000, 10_000), Count(10_000_000, 8_000)),
    )
    told = str(Comparison("0123456789abcdef", "AVX2", rows)).splitlines()
    assert told[0] == "1 of 4 pieces of work within the margins (at most 0.200% apart) of 012345678, AVX2 in valgrind"
    assert [line.split()[0] + line.split()[-1] for line in told[1:]] == [
        "dense:cheaper",
        "window:dearer",
        "grouped:cheaper",
    ]


def test_work_is_called_once_before_anything_is_counted_and_what_fails_has_a_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    called: list[str] = []
    works = {
        "good": lambda: Work(build=lambda: "state", call=called.append),
        "bad": lambda: Work(build=lambda: 0, call=lambda state: 1 / state),
        "unasked": lambda: pytest.fail("built"),
    }
    monkeypatch.setattr(variants, "works", lambda: works)
    reasons: dict[str, str] = {}
    assert list(instrumented.build(["good", "bad"], reasons)) == ["good"]
    assert called == ["state"]
    assert reasons == {"bad": "ZeroDivisionError: division by zero"}


CALLGRIND = """version: 1
events: Ir

ob=(1) /lib/libpython3.11.so.1.0
fl=(1) ???
fn=(1) eval
0 100
cob=(2) /lib/libc10.so
cfn=(2) allocate
calls=1 0
0 7

ob=(2)
fn=(2)
+4 5
* 2

ob=(3) /lib/libtorch_python.so
fn=(3) parse
0 11
cob=(1)
cfn=(1)
calls=2 0
0 100

totals: 118
"""


def test_costs_are_read_by_library_and_must_add_up(tmp_path: Path) -> None:
    output = tmp_path / "counts.1"
    output.write_text(CALLGRIND)
    assert read(output) == Count(total=118, dispatch=5 + 2 + 11)
    output.write_text(CALLGRIND.replace("118", "119"))
    with pytest.raises(AssertionError, match="add up"):
        read(output)


@pytest.mark.parametrize("missing", instructions.NEEDED)
def test_a_missing_program_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setattr(instructions.shutil, "which", lambda name: None if name == missing else f"/usr/bin/{name}")
    assert instructions.why_not() == f"no {missing} ({instructions.NEEDED[missing]})"


def test_a_machine_that_does_not_fix_addresses_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instructions.shutil, "which", lambda name: f"/usr/bin/{name}")
    refuse = (sys.executable, "-c", "raise SystemExit('not permitted')")
    monkeypatch.setattr(instructions, "_fixed_layout", lambda: refuse)
    assert instructions.why_not() == "the address layout cannot be fixed here: not permitted"


def test_a_process_that_fails_ends_the_comparison_with_what_it_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    failing = (sys.executable, "-c", "raise SystemExit('out of order')")
    monkeypatch.setattr(instructions, "command", lambda *_: failing)
    with started(tmp_path) as counts, pytest.raises(RuntimeError, match="exit code 1: out of order"):
        counts()


@pytest.mark.parametrize("status, base", [(" M dsv3/train/step.py", "HEAD"), ("", "HEAD~1")])
def test_the_base_is_the_last_commit_with_other_code(monkeypatch: pytest.MonkeyPatch, status: str, base: str) -> None:
    done = subprocess.CompletedProcess((), 0, stdout=status)
    monkeypatch.setattr(instructions.subprocess, "run", lambda *_, **__: done)
    assert instructions.default_base() == base


def test_a_file_of_another_commit_is_read_and_one_that_it_lacks_is_empty() -> None:
    assert instructions.json_at("HEAD", "bench/expectations.json")
    assert instructions.json_at("HEAD", "no/such.json") == {}
