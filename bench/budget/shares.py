"""What a rank of a split holds at the peak of a step, by arithmetic: states, activations in flight, working memory.

rank = parameters + gradients + optimizer + activations in flight + working memory        (splits.py, working.py)
"""

from dataclasses import dataclass

from bench.budget.activations import Batch, Policy
from bench.budget.splits import Split, check, copies, held, parts_of
from bench.budget.states import Recipe
from bench.budget.working import Moments
from dsv3.config import Model


@dataclass(frozen=True, kw_only=True)
class Share:
    """Bytes of one rank by kind; `stage` is its place in the pipeline."""

    stage: int
    parameters: int
    gradients: int
    optimizer: int
    activations: int
    working: int

    @property
    def total(self) -> int:
        """The peak of the rank."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.working


def shares(model: Model, split: Split, recipe: Recipe, batch: Batch, policy: Policy = "none") -> tuple[Share, ...]:
    """Each rank of a pipeline, first to last; `batch` is one microbatch of one replica.

    Raises:
        ValueError: for a split that does not come out even.
    """
    check(model, split)
    moments = Moments(model=model, split=split, recipe=recipe, batch=batch, policy=policy)
    return tuple(_share(moments, rank, parameters) for rank, parameters in enumerate(held(model, split)))


def fullest(found: tuple[Share, ...]) -> Share:
    """The rank with the most bytes: the one that must fit."""
    return max(found, key=lambda share: share.total)


def _share(moments: Moments, rank: int, parameters: dict[str, int]) -> Share:
    model, split, recipe = moments.model, moments.split, moments.recipe
    alike = copies(split)

    def states(each: int, cut_from: int) -> int:
        ways = {kind: alike[kind] if split.zero >= cut_from else 1 for kind in alike}
        return sum(each * -(-parameters[kind] // ways[kind]) for kind in parameters)

    stages = {stage: parts_of(model, split, stage) for stage in split.stages(rank)}
    return Share(
        stage=rank,
        parameters=states(recipe.weight, 3),
        gradients=states(recipe.gradient, 2),
        optimizer=states(recipe.optimizer, 1),
        activations=sum(moments.kept(here) * in_flight(split, stage) for stage, here in stages.items()),
        working=max(moments.highest(here) for here in stages.values()),
    )


def in_flight(split: Split, stage: int) -> int:
    """Microbatches that a rank holds of one of its stages, at most."""
    return min(split.microbatches // split.twice, split.pp - stage)
