"""Plans and measured caches of an atlas, as the Trade-offs view shows them: one dot for each cache that was tried."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from headwise.view.plain import number, plain

if TYPE_CHECKING:
    from headwise.atlas import Atlas
    from headwise.plan import Plan

NUMBERS = ("bytes", "share", "kept", "retrieval", "nll", "prefill_s", "decode_ms", "peak_mb")
KINDS = ("plan", "random", "streaming", "full")
KEEPS_ALL = "cache.preallocated"


def tradeoffs(atlas: "Atlas", kv: list[str]) -> dict[str, Any] | None:
    """Plans with what they do to each KV head, and a dot for every cache of a trial or a bench. None without any.

    Args:
        kv: for every head of the view the KV head that it reads from.
    """
    plans: dict[str, Any] = {}
    dots: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    for name, file in atlas.plans().items():
        try:
            held = _load(file)
            if held.fingerprint != atlas.about.get("fingerprint"):
                left_out[name] = f"It was made for {held.model} with other weights than this atlas."
                continue
            tried = _trial_dots(name, held)
        except (ValueError, TypeError, AttributeError, KeyError) as problem:
            left_out[name] = str(problem).replace(str(file), file.name)
            continue
        plans[name] = _plan(name, held)
        dots += tried
    dots = _distinct(dots + [_bench_dot(row, plans) for row in atlas.bench().to_dicts()])
    for name in set(plans) - {dot["plan"] for dot in dots}:
        left_out[name] = "It was never tried, so there are no numbers of it."
    if not dots and not left_out:
        return None
    return {"kv": kv, "plans": list(plans.values()), "dots": dots, "left_out": dict(sorted(left_out.items()))}


def _load(file: Path) -> "Plan":
    # What plans need takes seconds to import; an atlas without plans is shown without it.
    from headwise.plan import Plan

    return Plan.load(file)


def _plan(name: str, plan: "Plan") -> dict[str, Any]:
    trial, held = plan.trial, plan.data()
    return {
        "name": name,
        "accepted": None if trial is None else trial.accepted,
        "says": "" if trial is None else trial.says,
        "rule": "" if trial is None else trial.rule,
        "legend": {
            key: {"text": _method_text(method), "all": method["method"] == KEEPS_ALL}
            for key, method in held["legend"].items()
        },
        "heads": {unit: row["treatment"] for unit, row in held["heads"].items()},
        "scores": {unit: plain(row["scores"]) for unit, row in held["heads"].items() if row["scores"]},
        "about": plain(dict(plan.about)),
    }


def _method_text(method: dict[str, Any]) -> str:
    """A cache method in words: "cache.duo, sink 64, recent 256"."""
    fields = {k: _method_text(v) if isinstance(v, dict) else v for k, v in method["fields"].items() if v is not False}
    return ", ".join([method["method"], *(key if v is True else f"{key} {v}" for key, v in fields.items())])


def _trial_dots(name: str, plan: "Plan") -> list[dict[str, Any]]:
    found = []
    for row in plan.trial.rows if plan.trial else ():
        kind = next((one for one in KINDS if row["name"].startswith(one)), "other")
        titles = {"plan": f"plan {name}", "full": "full cache"}
        found.append(
            {
                "key": f"{name}/{row['name']}",
                "name": titles.get(kind, f"{row['name']}, for plan {name}"),
                "short": titles.get(kind, row["name"]),
                "kind": kind,
                "plan": "" if kind == "full" else name,
                "at": int(row["at"]),
                "accuracy": plain(row.get("accuracy", {})),
                "n": plain(row.get("n", {})),
                **{key: number(row.get(key)) for key in NUMBERS},
            }
        )
    return found


def _bench_dot(row: dict[str, Any], plans: dict[str, Any]) -> dict[str, Any]:
    """A dot of `headwise bench`: names are those of transformers' caches, of cache methods, or "plan NAME"."""
    cache = row["cache"]
    plan = cache.removeprefix("plan ") if cache.startswith("plan ") else ""
    kind = "plan" if plan else "full" if cache in ("DynamicCache", "StaticCache") else "other"
    return {
        "key": f"bench/{cache}/{row['at']}",
        "name": cache,
        "short": cache,
        "kind": kind,
        "plan": plan if plan in plans else "",
        "at": row["at"],
        "accuracy": {},
        "n": {},
        **{key: number(row[key]) for key in NUMBERS},
    }


def _distinct(dots: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The full cache is part of every trial; where all its numbers are the same, one dot stands for it."""
    found: dict[str, dict[str, Any]] = {}
    for dot in dots:
        same = str([dot[key] for key in ("name", "at", "accuracy", "n", *NUMBERS)])
        found.setdefault(same if dot["kind"] == "full" else dot["key"], dot)
    return list(found.values())
