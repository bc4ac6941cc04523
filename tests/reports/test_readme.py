import pytest

from ablations.catalogue import every
from ablations.claims import ledger
from reports.pages import rulings
from reports.readme import README, claim_table, generated, with_parts


def test_the_generated_parts_of_the_readme_and_its_figure_are_fresh() -> None:
    stale = [path.name for path, data in generated(README.read_text(), every()).items() if path.read_bytes() != data]
    assert not stale, f"{', '.join(stale)}: run `python -m reports readme`"


def test_every_claim_stands_beside_what_deepseek_does() -> None:
    head, _, *rows = claim_table(rulings((), ())).splitlines()
    assert head.endswith("| DeepSeek |")
    assert [row.split(" | ")[-1] for row in rows] == [f"{claim.deepseek} |" for claim in ledger().values()]


def test_a_part_is_put_between_its_markers_and_nowhere_else() -> None:
    text = "a\n<!-- begin x -->\nold\n<!-- end x -->\nb\n"
    assert with_parts(text, {"x": "new \\1"}) == "a\n<!-- begin x -->\nnew \\1\n<!-- end x -->\nb\n"


@pytest.mark.parametrize("text", ["", "<!-- begin x -->\n", "<!-- end x -->\n<!-- begin x -->\n"])
def test_a_readme_without_markers_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="part 'x' lacks its markers"):
        with_parts(text, {"x": "new"})
