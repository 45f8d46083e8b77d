"""Widgets show what the report shows, and name what is wrong."""

import re
import sys

import pytest
from synthetic_atlas import synthetic_atlas

from headwise.atlas import Atlas
from headwise.view.gather import gather


@pytest.fixture(scope="module")
def atlas(tmp_path_factory) -> Atlas:
    return synthetic_atlas(tmp_path_factory.mktemp("atlas") / "small", layers=8, heads=9)


def test_widgets_show_the_same_data(atlas):
    widgets = pytest.importorskip("headwise.view.widgets")
    made = widgets.HeadMap(atlas, unit="L5.H1", colour="induction_stripe")
    assert made.data == gather(atlas) and (made.unit, made.colour) == ("L5.H1", "induction_stripe")
    more = widgets.PatternView(atlas, prompt="code"), widgets.Tradeoffs(atlas), widgets.Circuit(atlas, "ioi")
    more += (widgets.Training(atlas),)
    for widget in (made, widgets.HeadCard(atlas), *more):
        assert re.search(r"export\s*{[^}]*\bas default\b", str(widget._esm))
        assert ".hw" in str(widget._css)
        widget.close()


def test_widgets_name_what_is_wrong(atlas, monkeypatch):
    from headwise.view import widgets

    with pytest.raises(ValueError, match=r"no head 'L99\.H1'; it has 72, such as L0\.H0"):
        widgets.HeadCard(atlas, unit="L99.H1")
    with pytest.raises(ValueError, match="has no graph 'nothing'; it has ioi, torn, why-mary-john-0a1b2c"):
        widgets.Circuit(atlas, "nothing")
    monkeypatch.setitem(sys.modules, "anywidget", None)
    widgets._widget_class.cache_clear()
    with pytest.raises(ImportError, match=r"pip install 'headwise\[view\]'"):
        widgets.HeadMap(atlas)
    widgets._widget_class.cache_clear()
