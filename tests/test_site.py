"""Addresses: what they mean, and that writing and reading them are inverse."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwise.site import HEAD_KINDS, KINDS, LAYER_KINDS, ON_KV_HEADS, STACKS, Site, Unit, head, head_axis, time_axis

NUMBERS = st.none() | st.integers(0, 200)
SITES = st.builds(
    Site,
    layer=NUMBERS,
    kind=st.sampled_from(HEAD_KINDS + ("neurons",)),
    index=NUMBERS,
    position=st.none() | st.integers(-500, 5000),
    stack=st.sampled_from(STACKS),
) | st.builds(
    Site,
    layer=NUMBERS,
    kind=st.sampled_from(LAYER_KINDS),
    position=st.none() | st.integers(-500, 5000),
    stack=st.sampled_from(STACKS),
)
UNITS = st.builds(
    Unit, st.sampled_from(STACKS), st.integers(0, 99), st.sampled_from("HGN"), st.integers(0, 9999)
) | st.builds(Unit, st.sampled_from(STACKS), st.integers(0, 99), st.sampled_from(["", "attn", "mlp"]), st.just(0))


@given(SITES)
def test_a_site_reads_back_as_itself(site):
    assert Site.parse(str(site)) == site
    assert Site.parse(site) is site


@given(UNITS)
def test_a_unit_reads_back_as_itself(unit):
    assert Unit.parse(str(unit)) == unit


@given(st.text(max_size=12))
def test_any_text_is_an_address_or_a_sentence(text):
    for parse in (Site.parse, Unit.parse):
        try:
            assert parse(str(parse(text))) == parse(text)
        except ValueError as error:
            assert str(error).rstrip("?").endswith((".", "'", ")")) or "Did you mean" in str(error)


@pytest.mark.parametrize(
    ("text", "site"),
    [
        ("L5.H1", Site(5, "z", 1)),
        ("L5.H1.z", Site(5, "z", 1)),
        ("L5.G0", Site(5, "v", 0)),
        ("L3.N1021", Site(3, "neurons", 1021)),
        ("L*.mlp", Site(None, "mlp")),
        ("L*.H3", Site(None, "z", 3)),
        ("L2.H*.pattern", Site(2, "pattern")),
        ("pattern", Site(None, "pattern")),
        ("pattern@-1", Site(None, "pattern", position=-1)),
        ("L9.H6@-1", Site(9, "z", 6, -1)),
        ("L4", Site(4, "resid_post")),
        ("enc.L2.H3", Site(2, "z", 3, stack="enc")),
        ("cross.L2.G1.k_pre", Site(2, "k_pre", 1, stack="cross")),
        (" L5.attn ", Site(5, "attn")),
    ],
)
def test_what_an_address_means(text, site):
    assert Site.parse(text) == site


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is not a site"),
        ("5.1", "is not a site"),
        ("L5.H1.zz", "'zz' in 'L5.H1.zz' is not a kind of site"),
        ("L5.H1.paterns", r"Did you mean 'pattern'\?"),
        ("L5.H1.mlp", "mlp does not belong to a head"),
        ("L5.N1.z", "z does not belong to a neuron"),
        ("L5.H1.k", r"k lives on KV heads \(L5.G0.v\)"),
        ("L5.G1.z", "z lives on query heads"),
        ("dec.L5.z", "is not a site"),
        ("L5.H-1", "is not a site"),
    ],
)
def test_what_is_no_address_is_said(text, said):
    with pytest.raises(ValueError, match=said):
        Site.parse(text)


@pytest.mark.parametrize("text", ["L5.H", "H1", "L*.H1", "L5.z", "L5.H1.z", ""])
def test_what_is_no_unit_is_said(text):
    with pytest.raises(ValueError, match="is not a unit. Write for example L5.H1"):
        Unit.parse(text)


def test_names_and_axes():
    assert head(5, 1) == "L5.H1" and head(2, 3, "enc") == "enc.L2.H3"
    assert Site.parse("L5.H1@3").whole == Site(5, "z") and Site.parse("z").at_layer(4) == Site(4, "z")
    assert set(ON_KV_HEADS) < set(HEAD_KINDS) < set(KINDS)
    axes = {kind: (time_axis(Site(0, kind)), head_axis(Site(0, kind))) for kind in KINDS}
    assert axes["z"] == axes["neurons"] == (1, 2) and axes["resid_post"] == (1, None)
    assert axes["q"] == axes["k_pre"] == axes["pattern"] == (2, 1)
