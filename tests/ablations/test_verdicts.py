from dataclasses import replace

import pytest

from ablations.cell import to_record
from ablations.claims import Outcome, ledger
from ablations.study import Cell, Reading, Study
from ablations.traced import Prose
from ablations.verdicts import mixed, standing, verdict, verdicts
from bench.fingerprint import Provenance
from bench.measurement import Measurement
from bench.record import Record

HERE = Provenance(machine="m", revision="r", profile="full")
CLAIMS = ledger()


def tossed(study: Study, seeds: int, gap: float = -0.3, tosses: int = 1000, where: Provenance = HERE) -> list[Record]:
    rows = []
    for seed in range(seeds):
        for arm, heads in (("fair", 0.5), ("bent", 0.5 + gap)):
            cell = Cell(arm=arm, seed=seed, axes={"tosses": tosses}, seconds=1)
            for name, value in (("loss", heads + 0.01 * seed * (arm == "bent")), ("peak_bytes", tosses)):
                reading = Reading(arm=arm, measurement=Measurement(metric=name, value=value))
                rows.append(to_record(study, cell, reading, where, study.rule_digest()))
    return rows


def error(study: Study, arm: str, seed: int) -> Record:
    cell = Cell(arm=arm, seed=seed, axes={"tosses": 1000}, seconds=1)
    return to_record(study, cell, Reading(arm=arm, metric="loss", failed="lost"), HERE, study.rule_digest())


@pytest.mark.parametrize("gap, outcome", [(-0.3, Outcome.HOLDS), (0.0, Outcome.FAILS), (-0.12, Outcome.UNDECIDABLE)])
def test_enough_records_give_the_verdict_of_the_rule(coin: Study, gap: float, outcome: Outcome) -> None:
    found = verdict(CLAIMS["A3"], {coin.name: coin}, tossed(coin, 6, gap))
    assert found.outcome is outcome
    assert found.n == 6
    assert found.answer.startswith("Bent coins show")


def test_there_is_no_verdict_with_fewer_seeds_than_the_rule_declares(coin: Study) -> None:
    found = verdict(CLAIMS["A3"], {coin.name: coin}, tossed(coin, 2))
    assert (found.outcome, found.answer) == (Outcome.PENDING, "needs the full profile (2 of 6 seeds)")


def test_seeds_of_other_points_do_not_count(coin: Study) -> None:
    rows = tossed(coin, 6, tosses=100) + tossed(coin, 3)
    found = verdict(CLAIMS["A3"], {coin.name: coin}, rows)
    assert (found.outcome, found.answer) == (Outcome.PENDING, "needs the full profile (3 of 6 seeds)")


def test_a_rule_of_exact_metrics_needs_no_seeds(coin: Study) -> None:
    found = verdict(CLAIMS["A2"], {coin.name: coin}, tossed(coin, 1))
    assert found.outcome is Outcome.HOLDS


def test_a_point_that_was_not_measured_is_pending(coin: Study) -> None:
    found = verdict(CLAIMS["A2"], {coin.name: coin}, tossed(coin, 6, tosses=100))
    assert found.outcome is Outcome.PENDING
    assert "no record of peak_bytes of bent, tosses=1000" in found.answer


def test_records_of_an_older_rule_are_exploratory(coin: Study) -> None:
    old = [replace(row, rule="0" * 12) for row in tossed(coin, 6)]
    found = verdict(CLAIMS["A3"], {coin.name: coin}, old)
    assert found.outcome is Outcome.PENDING
    assert "older rule, exploratory" in found.answer


def test_the_newest_record_of_a_point_stands(coin: Study) -> None:
    rows = tossed(coin, 6, gap=0.0) + tossed(coin, 6, gap=-0.3, where=replace(HERE, revision="r2"))
    assert len(standing(coin, rows)) == len(rows) // 2
    assert verdict(CLAIMS["A3"], {coin.name: coin}, rows).outcome is Outcome.HOLDS
    assert verdict(CLAIMS["A3"], {coin.name: coin}, rows[::-1]).outcome is Outcome.FAILS


def test_losses_of_all_machines_count_and_bytes_of_one(coin: Study) -> None:
    rows = tossed(coin, 6)[: 4 * 5] + tossed(coin, 6, where=replace(HERE, machine="other"))[4 * 5 :]
    found = [(row.metric, row.seed, row.machine) for row in standing(coin, rows) if row.arm == "bent"]
    losses = [("loss", seed, "m") for seed in range(5)] + [("loss", 5, "other")]
    assert sorted(found) == [*losses, ("peak_bytes", 5, "other")]
    assert verdict(CLAIMS["A3"], {coin.name: coin}, rows).outcome is Outcome.HOLDS
    assert mixed(standing(coin, rows), "fair") == "Some points average records of several machines."


def test_pairs_of_two_machines_are_told(coin: Study) -> None:
    fair, bent = tossed(coin, 1)[:2], tossed(coin, 1, where=replace(HERE, machine="other"))[2:]
    assert mixed(standing(coin, [*fair, *bent]), "fair") == "All pairs with fair are of two machines."


def test_an_error_stands_until_its_point_is_measured(coin: Study) -> None:
    lost = error(coin, "bent", 0)
    assert lost in standing(coin, [lost, *(row for row in tossed(coin, 1) if row.arm == "fair")])
    assert lost not in standing(coin, [lost, *tossed(coin, 1)])
    assert lost in standing(coin, [*tossed(coin, 1), lost])


def test_every_claim_has_a_verdict_without_any_record(coin: Study) -> None:
    found = verdicts([coin], [])
    assert list(found) == list(CLAIMS)
    assert {found[name].outcome for name in ("H1", "H2")} == {Outcome.ILL_POSED}
    assert found["H3"].outcome is Outcome.UNDECIDABLE
    assert found["A3"].answer == "not run yet: python -m ablations run attention_sparsity --profile full"
    assert found["C1"].answer == CLAIMS["C1"].pending
    assert "is not part of this report" in found["B2"].answer
    assert found["A1"].answer == "its study, attention_sparsity, has no rule for it"


def test_an_error_of_another_machine_silences_no_figure(coin: Study) -> None:
    lost = replace(error(coin, "bent", 6), machine="other")
    assert {row.machine for row in standing(coin, [*tossed(coin, 6), lost]) if row.error is None} == {"m"}
    assert verdict(CLAIMS["A3"], {coin.name: coin}, [*tossed(coin, 6), lost]).outcome is Outcome.HOLDS


def test_where_no_cell_could_be_measured_the_first_reason_is_told(coin: Study) -> None:
    command = ": python -m ablations run attention_sparsity --profile full"
    failed = [replace(error(coin, "bent", seed), error=f"lost {seed} times") for seed in (3, 4)]
    found = verdict(CLAIMS["A3"], {coin.name: coin}, failed)
    assert (found.outcome, found.answer) == (Outcome.PENDING, f"every cell failed, first: lost 3 times{command}")
    assert isinstance(found.answer, Prose)
    assert [span.sources for span in found.answer.references] == [{failed[0].id}], "its numbers have a source"
    old = [replace(row, rule="0" * 12) for row in tossed(coin, 6)]
    assert "every cell failed" in verdict(CLAIMS["A3"], {coin.name: coin}, [*old, *failed]).answer
    absent = replace(failed[0], error="pending: needs a table")
    assert "cannot be measured here (needs a table)" in verdict(CLAIMS["A3"], {coin.name: coin}, [absent]).answer
    assert "every cell failed" in verdict(CLAIMS["A3"], {coin.name: coin}, [absent, *failed]).answer


@pytest.mark.parametrize(
    "change, renewed, said",
    [
        ({"revision": "r2"}, "seed", "Some points average records of several revisions."),
        ({"config": "c2"}, "seed", "Some points average records of several configs."),
        (
            {"corpus": "t2"},
            "arm",
            "All pairs with fair are of two texts and left out.",
        ),
        ({"revision": "r2"}, "arm", "All pairs with fair are of two revisions."),
        ({"config": "c2"}, "arm", ""),
        ({"corpus": "t2"}, "all", ""),
    ],
)
def test_a_history_that_was_renewed_in_part_is_said_to_be(
    coin: Study, change: dict[str, str], renewed: str, said: str
) -> None:
    def new(row: Record) -> bool:
        return {"seed": row.seed == 0 and row.metric == "loss", "arm": row.arm == "bent", "all": True}[renewed]

    rows = [replace(row, **change) if new(row) else row for row in tossed(coin, 3)]
    assert mixed(rows, "fair") == said
    assert mixed(tossed(coin, 3), "fair") == ""


def test_of_every_text_apart_all_is_said(coin: Study) -> None:
    rows = [replace(row, corpus=str(row.seed)) for row in tossed(coin, 3)]
    assert mixed(rows, "fair") == "All points average records of several texts."
