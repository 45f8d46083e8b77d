"""What a run was asked for, in words that are the same in every process: run.json, and whether two runs are one."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from headwise.lesson import Lesson
from headwise.method import Method
from headwise.models import fingerprint
from headwise.optimising import Training


def asked(
    model: PreTrainedModel,
    lesson: Lesson,
    training: Training,
    changes: Sequence[Any],
    seed: int,
    progress: "Mapping[str, Sequence[Any]]",
) -> dict[str, Any]:
    """Model, lesson, training, edits, seed and progress measures, as JSON can carry them. See `train`."""
    return {
        "model": _plain_config(model),
        "lesson": {"name": type(lesson).__name__, **asdict(lesson)},
        "training": _settings(training),
        "edits": [_told(one) for one in changes],
        "seed": seed,
        "progress": {name: [_told(one) for one in held] for name, held in progress.items()},
    }


def _plain_config(model: PreTrainedModel) -> dict[str, Any]:
    left = ("transformers_version", "_name_or_path", "dtype", "architectures", "torch_dtype")
    return {key: value for key, value in model.config.to_dict().items() if key not in left}


def _settings(training: Training) -> dict[str, Any]:
    """What must be the same for a run to go on; it may go on for longer where nothing decays."""
    free = ("threads", "checkpoint_every", *(("steps",) if training.decay == "none" else ()))
    words = {key: str(value) for key, value in vars(training).items() if key not in free}
    return words if training.until is None else words | {"until": _told(training.until)}


def _told(one: Any) -> Any:
    """An edit, reset or switch in words that are the same in every process."""
    if isinstance(one, Tensor):
        return f"tensor {list(one.shape)} {float(one.double().sum())!r}"
    if isinstance(one, PreTrainedModel):
        return f"model {fingerprint(one)}"
    if isinstance(one, (list, tuple)):
        return [_told(item) for item in one]
    if isinstance(one, FunctionType):
        return _function(one)
    if isinstance(one, MethodType):
        return {"kind": one.__qualname__, "of": _told(one.__self__)}
    if isinstance(one, partial):
        return {"kind": "partial", "of": _told(one.func), "with": _told([one.args, sorted(one.keywords.items())])}
    if isinstance(one, Method) or not hasattr(one, "__dataclass_fields__"):
        return getattr(one, "__qualname__", None) or repr(one)
    return {"kind": type(one).__name__, **{name: _told(getattr(one, name)) for name in one.__dataclass_fields__}}


def _function(one: FunctionType) -> Any:
    """A function is its name; one that others may share the name with is also its code, and the values it uses."""
    if "<" not in one.__qualname__:
        return one.__qualname__
    cells = [cell.cell_contents for cell in one.__closure__ or ()]
    values = [_code(held.__code__) if isinstance(held, FunctionType) else _told(held) for held in cells]
    defaults = _told([one.__defaults__ or (), sorted((one.__kwdefaults__ or {}).items())])
    return {"kind": one.__qualname__, "code": _code(one.__code__), "uses": values, "defaults": defaults}


def _code(code: CodeType) -> str:
    """A short digest of what a function does, without file and lines."""
    inside = [_code(held) if isinstance(held, CodeType) else _constant(held) for held in code.co_consts]
    said = repr((code.co_code.hex(), code.co_names, code.co_varnames, code.co_freevars, inside))
    return hashlib.sha256(said.encode()).hexdigest()[:12]


def _constant(held: Any) -> str:
    return repr(sorted(map(repr, held)) if isinstance(held, frozenset) else held)
