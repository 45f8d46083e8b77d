"""Values in types that JSON knows."""

import math
from typing import Any

import numpy as np


def number(value: Any) -> float | int | None:
    """Five digits of a number; None where there is none or it is not finite."""
    if value is None or not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(f"{float(value):.5g}")


def plain(value: Any) -> Any:
    """The same value in types that JSON knows; paths and other objects as text."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (str, bool, int)) or value is None:
        return value
    return number(value) if isinstance(value, (float, np.floating)) else str(value)
