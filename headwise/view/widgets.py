"""Notebook widgets: the map and the other views, drawn by the same modules as the report."""

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headwise.view.gather import gather

if TYPE_CHECKING:
    from anywidget import AnyWidget

    from headwise.atlas import Atlas

STATIC = Path(__file__).parent / "static"
SHARED = {
    "unit": "",
    "colour": "",
    "prompt": "",
    "side": "query",
    "token": -1,
    "view": "grid",
    "role": "",
    "dot": "",
    "quality": "kept",
    "graph": "",
    "edges": 0,
    "node": "",
    "curve": "",
}


@cache
def _widget_class(module: str, title: str) -> "type[AnyWidget]":
    """The anywidget class whose front end is `static/<module>.js`."""
    try:
        import anywidget
        import traitlets
    except ImportError as problem:
        raise ImportError(
            "Notebook widgets need anywidget: pip install 'headwise[view]'. The report needs nothing."
        ) from problem
    kinds = {str: traitlets.Unicode, int: traitlets.Int}
    traits = {name: kinds[type(value)](value).tag(sync=True) for name, value in SHARED.items()}
    body = {
        "_esm": STATIC / f"{module}.js",
        "_css": STATIC / "headwise.css",
        "data": traitlets.Dict().tag(sync=True),
        **traits,
    }
    return type(
        title, (anywidget.AnyWidget,), body | {"__doc__": f"The {title} view of an atlas.", "__module__": __name__}
    )


def _make(module: str, title: str, atlas: "Atlas", **state: Any) -> "AnyWidget":
    data = gather(atlas)
    units = [head["unit"] for head in data["heads"]]
    if state.get("unit") and state["unit"] not in units:
        raise ValueError(
            f"This atlas has no head {state['unit']!r}; it has {len(units)}, such as {', '.join(units[:3])}."
        )
    return _widget_class(module, title)(data=data, **state)


def HeadMap(atlas: "Atlas", unit: str = "", colour: str = "") -> "AnyWidget":
    """All heads as a grid, coloured by "roles" or by the score named. `.unit` is the selected head, both ways."""
    return _make("headmap", "HeadMap", atlas, unit=unit, colour=colour)


def HeadCard(atlas: "Atlas", unit: str = "") -> "AnyWidget":
    """What one head does, and the evidence for it."""
    return _make("headcard", "HeadCard", atlas, unit=unit)


def PatternView(atlas: "Atlas", unit: str = "", prompt: str = "") -> "AnyWidget":
    """Where one head looks on a stored prompt."""
    return _make("patternview", "PatternView", atlas, unit=unit, prompt=prompt)


def Tradeoffs(atlas: "Atlas", dot: str = "") -> "AnyWidget":
    """Quality of every tried cache against bytes and time, over the map, which shows the plan that is pointed at.

    `.dot` is the key of the selected dot, such as "0.4/plan", both ways.
    """
    return _make("tradeoffview", "Tradeoffs", atlas, dot=dot)


def Circuit(atlas: "Atlas", graph: str = "", node: str = "", edges: int = 0) -> "AnyWidget":
    """A graph of the atlas, layers on one axis; `edges` is how many of its largest are shown, 0 for a readable number.

    `.node` is what is selected, a place ("L5.H1") or an edge ("L5.H1>logits"), both ways.
    """
    names = list(atlas.graphs())
    if graph and graph not in names:
        raise ValueError(f"This atlas has no graph {graph!r}; it has {', '.join(names) or 'none'}.")
    return _make("circuitview", "Circuit", atlas, graph=graph, node=node, edges=edges)


def Training(atlas: "Atlas", curve: str = "", unit: str = "") -> "AnyWidget":
    """What was measured while the model was trained, a line a head; for a run of the lab, its `run.atlas`.

    `.curve` is what is shown, a metric and the prompts it was measured on, such as "induction@train".
    """
    return _make("trainingview", "Training", atlas, curve=curve, unit=unit)
