"""The report: an atlas as one HTML file that asks no other host for anything."""

import json
from html import escape
from pathlib import Path
from typing import Any

from headwise.atlas import Atlas
from headwise.view.gather import gather
from headwise.writing import write_aside

STATIC = Path(__file__).parent / "static"
# Nothing may be fetched, whatever a token or a model name says; only what stands in the file itself runs.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
    "base-uri 'none'; form-action 'none'"
)
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
{style}
</style>
</head>
<body>
<div id="headwise-report"><p>This page draws itself with JavaScript, which is switched off here. {summary}</p></div>
<script type="application/json" id="headwise-data">{data}</script>
<script>
{script}
</script>
</body>
</html>
"""


def block(data: dict[str, Any]) -> str:
    """JSON that may stand inside a script element: no text in it can close the element or open another."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    # Halves of surrogate pairs come from tokens that cut a character in two; UTF-8 has no place for them.
    return text.encode("utf-8", "replace").decode("utf-8")


def built(name: str) -> str:
    """The text of a built file. Raises ValueError when the package was made without it."""
    path = STATIC / name
    if not path.is_file():
        raise ValueError(f"The view is not built: headwise/view/static/{name} is missing. Run `make web`.")
    return path.read_text(encoding="utf-8")


def page(data: dict[str, Any], policy: str = POLICY) -> str:
    """The whole page as text, from what `gather` hands back. `policy`: what it may load."""
    title = f"{data['about'].get('model', 'model')} - headwise".rsplit("/", 1)[-1]
    parts = {
        "policy": policy,
        "title": escape(title),
        "style": built("headwise.css"),
        "summary": escape(data["summary"]),
        "data": block(data),
        "script": built("report.js"),
    }
    return PAGE.format(**parts)


def write(atlas: Atlas, out: Path) -> Path:
    """Write the report of an atlas, aside first and then under its name, and return where it is.

    Raises:
        ValueError: the built files are missing from the package.
        OSError: the place cannot be written; what was there before is left as it was.
    """
    text = page(gather(atlas))
    out = Path(out)
    write_aside(out, lambda path: path.write_text(text, encoding="utf-8"))
    return out
