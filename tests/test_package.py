import importlib
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import headwise

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "transformers", "polars", "numpy")


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_headwise_imports_nothing_heavy():
    found = run(f"import headwise, sys; dir(headwise); print([m for m in {HEAVY} if m in sys.modules])")
    assert found.strip() == "[]"


def test_help_and_lists_import_nothing_heavy():
    code = f"""
import sys
from headwise import cli, method
method.catalogue()
print([m for m in {HEAVY} if m in sys.modules])
"""
    assert run(code).strip() == "[]"


@pytest.mark.parametrize("name", headwise.__all__)
def test_every_public_name_loads(name):
    assert getattr(headwise, name) is not None
    assert name in dir(headwise)


def test_every_public_name_is_declared_for_type_checkers():
    text = (ROOT / "headwise" / "__init__.py").read_text(encoding="utf-8")
    for name in headwise.__all__[1:]:
        assert f"import {name} as {name}" in text


def test_tap_and_do_stay_functions_whatever_is_imported_first():
    code = """
import headwise.do, headwise.tap
from headwise.tap import tap
from headwise.do import do, Zero
import headwise as hw
print(callable(hw.tap) and hw.tap is tap, callable(hw.do) and hw.do is do, hw.Zero is Zero)
"""
    assert run(code).split() == ["True", "True", "True"]
    assert importlib.import_module("headwise.do").do is headwise.do


def test_an_unknown_name_is_a_sentence():
    with pytest.raises(AttributeError, match="headwise has no 'Atlass'"):
        headwise.Atlass  # noqa: B018


def test_the_constraints_pin_all_that_the_project_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = dict(
        line.lower().split("==")
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    )
    asked = project["dependencies"] + [d for extra in project["optional-dependencies"].values() for d in extra]
    for requirement in asked:
        name = requirement.split(">=")[0].lower()
        if not name.startswith("headwise["):
            assert name in pins or name.replace("-", "_") in pins, f"{name} has no pin in constraints.txt"
    assert pins["torch"] == "2.13.0"


def test_the_views_travel_with_the_package():
    palette = json.loads((ROOT / "headwise" / "view" / "palette.json").read_text(encoding="utf-8"))
    assert palette
    built = list((ROOT / "headwise" / "view" / "static").glob("*.js"))
    assert built, "run `make web`"
