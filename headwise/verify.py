"""The one protocol of proof: held-out prompts, exact effects, random heads of the same layers as the null."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedModel

from headwise import stats
from headwise.anatomy import anatomy, nearest_unit
from headwise.claim import Claim, Rung, settle
from headwise.method import Method
from headwise.scan import Effects, effects
from headwise.score import Score, provenance
from headwise.site import Unit
from headwise.task import Batch, metric

# Random heads that a candidate is compared with, in a map and in a single proof alike.
NULLS = 12


@dataclass(frozen=True)
class Proof(Method):
    """How a claim is tested.

    Fields:
        metric: a name of `headwise.task.METRICS`.
        nulls: random heads of the same layers to compare with.
        needed: how a head is taken away: "resample" (its value on the corrupt prompt), "mean" or "zero".
        seed: of the draw of random heads.
    """

    metric: str = "logprob"
    nulls: int = NULLS
    needed: str = "resample"
    seed: int = 0

    def run(
        self,
        model: PreTrainedModel,
        batch: Batch,
        role: str,
        candidates: list[str],
        seen: Score | None = None,
        spare: set[str] = frozenset(),
        label: str | None = None,
    ) -> list[Claim]:
        """Test candidates on held-out prompts; verdicts are settled by `claim.settle` over the whole family.

        Args:
            batch: prompts that had no say in choosing the candidates; must have corrupt prompts.
            seen: the score that nominated them, for the first rung.
            spare: units that may not serve as null (candidates of the same role that are not tested here).
            label: text of the progress bar, None for no bar.

        Raises:
            ValueError: a candidate is no head of this model, the batch has no corrupt prompts, or the model cannot do
                the task.
        """
        measure = metric(self.metric)
        batch.flipped()
        known = anatomy(model).units()
        for unit in candidates:
            if unit not in known:
                raise ValueError(f"{unit!r} is not a head of this model.{nearest_unit(unit, known)}")
        nulls = self.draw(model, candidates, spare)
        found = {
            step: effects(model, batch, [*candidates, *nulls], how, measure, label=label and f"{label}: {step}")
            for step, how in (("needed", self.needed), ("enough", "restore"))
        }
        self._check_task(found["needed"], batch)
        about = provenance(self, model, batch) | {"nulls": nulls}
        claims = []
        for unit in candidates:
            rungs = [] if seen is None else [self.seen(seen, unit)]
            rungs += [self._rung(step, one, unit, nulls) for step, one in found.items()]
            claims.append(Claim(unit, role, rungs=rungs, about=about))
        return claims

    @staticmethod
    def seen(score: Score, unit: str) -> Rung:
        """The first rung: what nominated the unit."""
        row, nan = _row(score, unit), float("nan")
        return Rung(
            score.evidence, score.name, row["value"], row["low"], row["high"], nan, nan, nan, row["n"], nan, True
        )

    def draw(self, model: PreTrainedModel, candidates: list[str], spare: set[str] = frozenset()) -> list[str]:
        """Random heads of the candidates' layers; of all layers where those hold no other head."""
        body = anatomy(model)
        layers = {Unit.parse(unit).layer for unit in candidates}
        taken = set(candidates) | set(spare)
        pool = [u for u in body.units() if Unit.parse(u).layer in layers and u not in taken]
        pool = pool or [u for u in body.units() if u not in taken]
        if not pool:
            raise ValueError("Every head of this model is a candidate, so no head is left to compare with.")
        order = np.random.default_rng(self.seed).permutation(len(pool))
        return [pool[i] for i in order[: self.nulls]]

    def _check_task(self, clean: Effects, batch: Batch) -> None:
        gap = float(clean.gap.mean())
        if not gap > 0:
            task = batch.about.get("task", "this task")
            raise ValueError(
                f"The model answers the corrupt prompts of {task} no worse than the clean ones ({gap:+.3f}), "
                "so nothing can be proved with them."
            )

    def _rung(self, step: str, found: Effects, unit: str, nulls: list[str]) -> Rung:
        mine, *others = (found.of(one).double().numpy() for one in (unit, *nulls))
        share = float(mine.mean() / found.gap.double().mean())
        return self.rung(step, f"{found.how} ({self.metric})", mine, others, share)

    def rung(self, step: str, score: str, mine: np.ndarray, others: Sequence[np.ndarray], share: float) -> Rung:
        """A rung that is not settled yet: what was measured of a unit, beside random units.

        Args:
            score: what was measured.
            mine: [n] prompt by prompt. others: the same of each random unit; the one at the 95 % place is the rival.
            share: of what there is to lose or to gain.
        """
        rival = sorted(others, key=lambda one: float(one.mean()))[math.ceil(0.95 * len(others)) - 1]
        low, high = stats.interval(mine[:, None])
        return Rung(
            step=step,
            score=score,
            value=float(mine.mean()),
            low=float(low[0]),
            high=float(high[0]),
            null=float(rival.mean()),
            p=stats.sign_flip(mine - rival, seed=self.seed),
            p_holm=float("nan"),
            n=len(mine),
            share=share,
            passed=False,
        )


def _row(score: Score, unit: str) -> dict:
    hit = score.table.filter(score.table["unit"] == unit)
    if hit.is_empty():
        raise ValueError(f"The score {score.name} has no unit {unit!r}.")
    return hit.row(0, named=True)


def prove(
    model: PreTrainedModel,
    batch: Batch,
    role: str,
    candidates: list[str],
    *,
    seen: Score | None = None,
    proof: Proof | None = None,
) -> list[Claim]:
    """Test that heads play a role, as one family of claims, verdicts included. See `Proof.run`."""
    return settle((proof or Proof()).run(model, batch, role, candidates, seen, label=role))
