"""The sentences and the Python that a view shows beside its numbers."""

import re
from collections import Counter
from typing import TYPE_CHECKING, Any

from headwise.claim import Claim
from headwise.convert import DEFAULT
from headwise.method import catalogue

if TYPE_CHECKING:
    from headwise.score import Score


def role_phrase(role: str) -> str:
    """`role_phrase("induction") == "an induction head"`."""
    return f"{'an' if role[:1] in 'aeiou' else 'a'} {role} head"


WEAK = ("seen", "read")
RECORDED = {"task", "version", "n", "seed", "rows", "part"}


def shown_role(head: dict[str, Any], claims: dict[str, list[Claim]]) -> str:
    """The role a head is drawn with: the proved one, else the one that most of its evidence is for, else "unknown"."""
    if head["verdict"] == "proved":
        return head["role"]
    made = [claim for claim in claims.get(head["unit"], []) if claim.verdict == head["verdict"] and _steps(claim)]
    return max(made, key=lambda claim: len(_steps(claim))).role if made else head["role"]


def _steps(claim: Claim) -> list[str]:
    return list(dict.fromkeys(rung.step for rung in claim.rungs if rung.passed))


def _passed(claim: Claim) -> str:
    """The steps that hold; of a proved claim only those beyond looking the part."""
    steps = _steps(claim)
    if claim.verdict == "proved":
        steps = [step for step in steps if step not in WEAK] or steps
    return ", ".join(steps)


def _failed(claim: Claim) -> str:
    steps = [step for step in dict.fromkeys(rung.step for rung in claim.rungs) if step not in _steps(claim)]
    return " and ".join(f"not {step}" for step in steps)


def head_sentence(head: dict[str, Any], claims: list[Claim]) -> str:
    """What a head does, as far as its claims go; never more than the evidence says."""
    unit = head["unit"]
    proved = [claim for claim in claims if claim.verdict == "proved"]
    if proved:
        steps = [f"{role_phrase(claim.role)}: proved ({_passed(claim) or 'no rung kept'})" for claim in proved]
        return f"{unit} is {'; and '.join(steps)}."
    likely = [claim for claim in claims if claim.verdict == "unknown" and _steps(claim)]
    refuted = [claim for claim in claims if claim.verdict == "refuted"]
    if likely:
        looks = "; also ".join(f"{role_phrase(claim.role)} ({_passed(claim)})" for claim in likely)
        return f"{unit} is unknown; looks like {looks}."
    if refuted:
        why = "; ".join(f"{role_phrase(claim.role)} ({_failed(claim) or 'the null does as well'})" for claim in refuted)
        return f"{unit} is not {why}: refuted."
    if head["role"] != "unknown":
        return f"{unit} is unknown; looks like {role_phrase(head['role'])}."
    return f"{unit} is unknown: {'no test singles it out' if claims else 'it was tested for no role'}."


def _listed(counts: Counter[str]) -> str:
    parts = [f"{n} {role}" for role, n in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))]
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def summary_sentence(heads: list[dict[str, Any]]) -> str:
    """How many heads are proved and in which role, how many refuted, how many unknown."""
    if not heads:
        return "This atlas holds no heads yet."
    roles = Counter(row["role"] for row in heads if row["verdict"] == "proved")
    refuted = sum(row["verdict"] == "refuted" for row in heads)
    unknown = len(heads) - roles.total() - refuted
    noun = "head" if len(heads) == 1 else "heads"
    verb = "is" if roles.total() == 1 else "are"
    proved = (
        f"{roles.total()} of {len(heads)} {noun} {verb} proved: {_listed(roles)}."
        if roles
        else f"None of {len(heads)} {noun} is proved."
    )
    other = f" {refuted} {'was' if refuted == 1 else 'were'} tested and refuted." if refuted else ""
    likely = sum(row["verdict"] == "unknown" and row["role"] != "unknown" for row in heads)
    looks = f", {likely} of them {'looks' if likely == 1 else 'look'} like a role" if likely else ""
    return f"{proved}{other} {unknown} {'is' if unknown == 1 else 'are'} unknown{looks}."


def call_code(name: str, fields: dict[str, Any]) -> str:
    """`load("heads.induction")(rows=8)`, with the fields that the method really has."""
    known = {card.name: set(card.fields) for card in catalogue()}.get(name, set(fields) - RECORDED)
    options = ", ".join(f"{key}={value!r}" for key, value in fields.items() if key in known)
    return f'load("{name}")({options})'


def batch_code(task: dict[str, Any]) -> str:
    """The prompts of a task; the part of them that was used, as far as the provenance tells."""
    made = f"{call_code(task['task'], task)}.make(tokenizer, n={task.get('n', 8)}, seed={task.get('seed', 0)})"
    part = re.fullmatch(r"rows (\d+) to (\d+)", task.get("part", ""))
    return f"batch = {made}" + (f".take(slice({part[1]}, {int(part[2]) + 1}))" if part else "")


def score_code(score: "Score") -> str:
    """Python that makes a score again from its provenance; empty where the provenance names no method."""
    method, task = score.about.get("method"), score.about.get("task")
    if not isinstance(method, dict) or "name" not in method:
        return ""
    model = str(score.about.get("model", DEFAULT))
    opening = '"default")' if model == DEFAULT else f"{model!r})  # its hub id or folder"
    lines = ["from headwise.method import load", "from headwise.models import open_model", ""]
    lines.append(f"model, tokenizer = open_model({opening}")
    batch = "None"
    if isinstance(task, dict) and str(task.get("task", "")).startswith("data."):
        lines.append(batch_code(task))
        batch = "batch"
    call = call_code(method["name"], method.get("fields") or {})
    return "\n".join([*lines, f"again = {call}.score(model, {batch})"])
