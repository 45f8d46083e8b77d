"""Whether progress bars are shown: on a terminal, unless HEADWISE_PROGRESS=0."""

import os
import sys


def hidden() -> bool:
    """True where bars would only litter: not a terminal, or switched off by the environment."""
    return os.environ.get("HEADWISE_PROGRESS") == "0" or not sys.stderr.isatty()
