"""Graphs of an atlas, as the Circuit view shows them: places on an axis of layers, weighed edges between them."""

import re
from typing import TYPE_CHECKING, Any

from headwise.convert import DEFAULT
from headwise.graph import Graph, written_at
from headwise.view.plain import number, plain
from headwise.view.words import batch_code, call_code

if TYPE_CHECKING:
    from headwise.atlas import Atlas

MOST = 2000
QUESTION = (
    "prompt", "answer", "instead", "contrast", "how", "task", "prompts", "chosen", "metric", "clean", "corrupt",
    "faithfulness", "low", "high", "left", "explains", "says", "p", "losses", "of", "unseen",
)  # fmt: skip


def circuits(atlas: "Atlas") -> dict[str, Any] | None:
    """The graphs that are kept, largest edges first, and what is left out with the reason. None without any."""
    graphs: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    for name, file in atlas.graphs().items():
        try:
            graph = Graph.load(file)
        except ValueError as problem:
            left_out[name] = str(problem).replace(str(file), file.name)
            continue
        if graph.about.get("fingerprint") != atlas.about.get("fingerprint"):
            left_out[name] = f"It was found in {graph.about.get('model')} with other weights than this atlas."
        elif not len(graph):
            left_out[name] = "It has no edges."
        else:
            graphs.append(_graph(name, graph, str(atlas.about.get("source", ""))))
    return {"graphs": graphs, "left_out": left_out} if graphs or left_out else None


def _graph(name: str, graph: Graph, source: str) -> dict[str, Any]:
    asked = graph.about.get("why") or {}
    tokens = [str(token) for token in asked.get("tokens", [])]
    shown = graph.top(MOST)
    rows = sorted(shown.table.iter_rows(named=True), key=lambda row: -abs(row["weight"]))
    writers = {row["source"] for row in rows}
    return {
        "name": name,
        "title": _title(graph, asked),
        "evidence": graph.evidence,
        "edges_in_all": len(graph),
        "question": plain({key: asked[key] for key in QUESTION if key in asked}) if asked else None,
        "tokens": tokens,
        "nodes": [_node(place, tokens) for place in shown.nodes],
        "edges": [
            {
                "source": row["source"],
                "target": row["target"],
                "weight": number(row["weight"]),
                "error": number(row["error"]),
                "into": _into(graph, row["target"], writers),
            }
            for row in rows
        ],
        "about": plain({key: value for key, value in graph.about.items() if key != "why"}),
        "code": _code(graph, asked, source),
        "exact": _exact(graph, asked),
    }


def _title(graph: Graph, asked: dict[str, Any]) -> str:
    if "answer" in asked:
        return f"{asked['answer']}, not {asked['instead']}"
    task = str((graph.about.get("task") or {}).get("task", "prompts of one's own")).removeprefix("data.")
    name = task.replace("_", " ")
    return f"{name}, the whole task" if asked else f"{graph.name}, {name}"


def _node(place: str, tokens: list[str]) -> dict[str, Any]:
    if place == "logits":
        return {"name": place, "kind": "logits", "layer": None, "label": "logits", "order": 0}
    if place.startswith("embed"):
        column = int(place[6:]) if "@" in place else -1
        token = "tokens" if column < 0 else tokens[column] if column < len(tokens) else "(answer)" if tokens else place
        return {"name": place, "kind": "token", "layer": None, "label": token, "order": column}
    layer = written_at(place) // 2
    if place.endswith(".mlp"):
        return {"name": place, "kind": "mlp", "layer": layer, "label": "MLP", "order": 10_000}
    index = int(place.split(".H")[1])
    return {"name": place, "kind": "head", "layer": layer, "label": f"H{index}", "order": index}


def _into(graph: Graph, target: str, writers: set[str]) -> list[str]:
    """The drawn places that an input belongs to: of a KV head those of its heads that the graph goes on from."""
    nodes = graph.nodes_of(target)
    return [node for node in nodes if node in writers or node == "logits"] or nodes[:1]


def _opened(graph: Graph, source: str) -> str:
    model = source or str(graph.about.get("model", DEFAULT))
    named = "default" if model == DEFAULT else model
    dtype = str(graph.about.get("dtype", "float32"))
    kind = "" if dtype == "float32" else f", dtype={dtype!r}"
    note = "" if source or named == "default" else "  # its hub id or folder"
    return f"model, tokenizer = open_model({named!r}{kind}){note}".replace("'", '"')


def _code(graph: Graph, asked: dict[str, Any], source: str) -> str:
    """Python that finds the graph again; every number of the view is one of `graph` or of `worth`."""
    method, task = graph.about.get("method"), graph.about.get("task")
    if not isinstance(method, dict) or "name" not in method:
        return ""
    opened, fields = ["from headwise.models import open_model", "", _opened(graph, source)], method.get("fields") or {}
    found = "graph, worth = reason.graph, reason.worth"
    if "answer" in asked:
        words = [repr(asked[key]) for key in ("prompt", "answer", "instead")]
        words += [f"contrast={asked['contrast'][0]!r}"] if asked.get("how") == "given" else []
        call = f"reason = Why({_given(fields)}).ask(model, tokenizer, {', '.join(words)})"
        return "\n".join([opened[0], "from headwise.why import Why", *opened[1:], call, found])
    if not isinstance(task, dict) or not str(task.get("task", "")).startswith("data."):
        return ""
    opened = ["from headwise.method import load", *opened]
    if asked:
        words = f"{call_code(task['task'], task)}, n={task.get('n', 16)}"
        call = f"reason = WhyTask({_given(fields)}).ask(model, tokenizer, {words})"
        return "\n".join([*opened[:2], "from headwise.why_task import WhyTask", *opened[2:], call, found])
    call = f"graph = {call_code(method['name'], fields)}.find(model, batch)"
    return "\n".join([*opened, batch_code(task), call])


def _given(fields: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in fields.items())


def _exact(graph: Graph, asked: dict[str, Any]) -> str:
    """Python that measures one edge exactly, with SOURCE and TARGET for its ends; empty where that needs more words."""
    tokens = any(re.match(r"embed@", source) for source, _ in graph.edges)
    if asked and asked.get("metric") != "logit difference":
        return ""
    batch = ("reason.batch" if "answer" in asked else "reason.held") if asked else "batch"
    call = f"PathPatching(senders=(SOURCE,), receivers=(TARGET,), tokens={tokens}).find(model, {batch})"
    return f"from headwise.circuits import PathPatching\n\nexact = {call}\nprint(exact[SOURCE, TARGET])"
