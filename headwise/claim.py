"""Claim: "this unit does this", the ladder of evidence under it, and the rule that turns evidence into a verdict.

A verdict is computed, never typed. *Proved*: taking the head away hurts the role's task and putting it back restores
the task, each beyond random heads of the same layers, on held-out prompts, after Holm's correction over all claims of
the map. *Refuted*: it looks the part, was tested, and does no better than random heads in either test, even before the
correction. Everything else is *unknown*.
"""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from headwise import stats

LADDER = ("seen", "read", "needed", "enough", "mediated", "grown")
LEVEL = 0.05
FLOOR = 0.01


@dataclass(frozen=True)
class Role:
    """A part that heads play.

    Attributes:
        name: as in the literature.
        score: the score that nominates heads for it; `threshold`: how much it takes.
        task: the data task on which it is proved, "" where no task shows it (then it can only be seen).
        does: what such a head does, to be read after its name.
    """

    name: str
    score: str
    threshold: float
    task: str
    does: str


ROLES = (
    Role("induction", "induction", 0.3, "induction", "attends to the token that followed the last time, and copies it"),
    Role("previous token", "previous_token", 0.4, "induction", "attends to the token before and writes what it was"),
    Role("duplicate token", "duplicate_token", 0.3, "ioi", "attends to an earlier copy of the current token"),
    Role("current token", "current_token", 0.5, "", "attends to the token it stands on"),
    Role("retrieval", "retrieval", 0.1, "needle", "attends to the fact being quoted from far back, and copies it"),
    Role("name mover", "name_mover", 0.2, "ioi", "attends to the name that is the answer, and copies it"),
    Role(
        "select and copy", "select_and_copy", 0.5, "multiple_choice", "attends to the right option of a multiple choice"
    ),
    Role("in-context", "memory_or_context", 0.2, "capitals_conflict", "writes the answer given in the prompt"),
    Role("memory", "topic", 0.1, "capitals", "carries what the model knows of a topic to the answer"),
    Role("successor", "successor", 0.25, "successor", "writes what comes next in an order"),
    Role("copy suppression", "copy_suppression", 0.5, "", "lowers the token it attends to"),
    Role("sink", "sink", 0.5, "", "rests on the first token"),
    Role("local", "local_share", 0.9, "", "attends to its neighbourhood"),
)


def role(name: str) -> Role:
    """A role by name. Raises ValueError with the known roles."""
    for one in ROLES:
        if one.name == name.replace("_", " ").replace("in context", "in-context"):
            return one
    raise ValueError(f"{name!r} is not a role. Roles: {', '.join(r.name for r in ROLES)}.")


@dataclass(frozen=True)
class Rung:
    """One step of the ladder.

    Attributes:
        step: seen, read, needed, enough, mediated or grown.
        score: name of the number; value with its 95 % interval over n prompts.
        null: the value of the 95 % unit among random heads of the same layers (NaN where there is no null).
        p: one-sided paired p-value against that unit; p_holm: corrected over the family it was settled in.
        share: value as a share of what there was to lose or to restore.
        passed: whether this step holds.
    """

    step: str
    score: str
    value: float
    low: float
    high: float
    null: float
    p: float
    p_holm: float
    n: int
    share: float
    passed: bool


@dataclass(frozen=True)
class Claim:
    """A unit, a role, the evidence and the verdict."""

    unit: str
    role: str
    verdict: str = "unknown"
    rungs: list[Rung] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)

    def rung(self, step: str) -> Rung | None:
        """The evidence on one step, None where there is none."""
        return next((r for r in self.rungs if r.step == step), None)

    def sentence(self) -> str:
        """The claim in words."""
        held = list(dict.fromkeys(r.step for r in self.rungs if r.passed))
        if self.verdict == "proved":
            return (
                f"{self.unit} {self.role}: proved ({', '.join(s for s in held if s in ('needed', 'enough', 'grown'))})"
            )
        if self.verdict == "refuted":
            return f"{self.unit} looks like {self.role}, but does no better than random heads: refuted"
        return f"{self.unit} {self.role}: unknown ({', '.join(held) or 'nothing'} holds)"

    def rows(self) -> list[dict[str, Any]]:
        """One flat row a rung, for the table on disk."""
        return [{"unit": self.unit, "role": self.role, "verdict": self.verdict, **asdict(r)} for r in self.rungs]


def settle(claims: list[Claim]) -> list[Claim]:
    """Correct all p-values together (Holm) and compute every verdict. The claims of one map are one family."""
    tests = [(i, j) for i, c in enumerate(claims) for j, r in enumerate(c.rungs) if r.p == r.p]
    corrected = dict(zip(tests, stats.holm([claims[i].rungs[j].p for i, j in tests]), strict=True))
    settled = []
    for i, claim in enumerate(claims):
        rungs = []
        for j, rung in enumerate(claim.rungs):
            if (i, j) in corrected:
                p = corrected[i, j]
                rung = replace(rung, p_holm=p, passed=p <= LEVEL and rung.share >= FLOOR and rung.value > rung.null)
            rungs.append(rung)
        settled.append(replace(claim, rungs=rungs, verdict=_verdict(rungs)))
    return settled


def _verdict(rungs: list[Rung]) -> str:
    tested = [r for r in rungs if r.step in ("needed", "enough")]
    if len(tested) < 2:
        return "unknown"
    if all(r.passed for r in tested):
        return "proved"
    # A head that is ahead of the random ones, only not surely enough for the whole family, is not refuted.
    hints = [r for r in tested if r.p <= LEVEL and r.share >= FLOOR and r.value > r.null]
    return "unknown" if hints else "refuted"
