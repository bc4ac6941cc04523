import pytest

from ablations import STUDIES
from ablations.catalogue import load
from ablations.claims import LEDGER, Claim, Outcome, ledger, read

ARTICLE = [
    *("A1", "A2", "A3", "B1", "B2", "B3", "C1", "C2", "C3", "C4", "C5", "D1", "D2", "D3"),
    *("E1", "E2", "E3", "F1", "F2", "G1", "G2", "G3", "H1", "H2", "H3"),
]
ROW = """
[[claim]]
id = "X1"
section = "1"
words = "w"
value = 2.0
estimand = "e"
scope = "s"
margin = 0.1
deepseek = "d"
pending = "p"
"""


def test_every_claim_of_the_article_stands_in_the_ledger_once_and_in_its_order() -> None:
    assert [name for name in ledger() if not name.startswith("DS")] == ARTICLE


@pytest.mark.parametrize("claim", ledger().values(), ids=lambda claim: claim.id)
def test_a_claim_says_what_deepseek_did_and_where_it_is_written(claim: Claim) -> None:
    assert claim.sources
    assert all(source.startswith("arXiv:") for source in claim.sources)


@pytest.mark.parametrize("claim", [c for c in ledger().values() if c.study], ids=lambda claim: claim.id)
def test_a_claim_with_a_study_has_one_rule_there(claim: Claim) -> None:
    assert claim.study is not None
    assert claim.study in STUDIES
    assert [rule.claim for rule in load(claim.study).rules].count(claim.id) == 1


def test_the_edges_of_a_claim_are_its_value_and_margin() -> None:
    claim = read(ROW)["X1"]
    assert (claim.least, claim.most) == (1.9, 2.1)


@pytest.mark.parametrize(
    "change, error",
    [
        (('id = "X1"', 'id = "X1"\ncolour = "red"'), "X1.colour='red': must be one of"),
        (('scope = "s"', 'scope = ""'), "X1.scope='': must be text"),
        (('scope = "s"', ""), "X1: missing 1 required keyword-only argument: 'scope'"),
        (('pending = "p"', ""), r"X1=\[\]: must have exactly one of study, pending, ruled"),
        (('pending = "p"', 'ruled = "wrong"\nwhy = "y"'), "X1.ruled='wrong': must be one of ill-posed"),
        (('pending = "p"', 'ruled = "ill-posed"'), "X1.why=None: belongs to ruled"),
        (('pending = "p"', 'study = "s"'), None),
        (('margin = 0.1\ndeepseek = "d"\npending = "p"', 'deepseek = "d"\nstudy = "s"'), "X1.margin=None: must be set"),
        (("[[claim]]", "[[claim"), "the ledger is no TOML"),
        (("[[claim]]", "[[clam]]"), "the ledger is no TOML with"),
    ],
)
def test_a_bad_ledger_is_refused_by_name(change: tuple[str, str], error: str | None) -> None:
    text = ROW.replace(*change)
    assert text != ROW
    if error is None:
        assert read(text)
    else:
        with pytest.raises(ValueError, match=error):
            read(text)


def test_an_id_that_stands_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="id='X1': must stand once"):
        read(ROW + ROW)


def test_the_ledger_explains_each_of_its_fields() -> None:
    head = LEDGER.read_text().split("[[claim]]")[0]
    for field in ("study", "pending", "ruled", "estimand", "scope", "margin", "deepseek"):
        assert f"#   {field} " in head
    assert set(Outcome) == {"holds here", "does not hold here", "ill-posed", "not decidable here", "pending"}
