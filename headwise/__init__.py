"""What every attention head of a transformer does, proved by intervening, and put to use.

    import headwise as hw

    model, tokenizer = hw.open_model("default")
    batch = hw.data.Induction().make(tokenizer, n=100, seed=0)
    print(hw.heads.Induction().score(model, batch).top(5))

Every name below is loaded when it is first used: importing headwise imports neither torch nor transformers.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_ROOMS = ("data", "heads", "cache", "attention", "circuits", "features", "decode", "lab")
_NAMES = {
    "Add": "do",
    "Appraisal": "worth",
    "Atlas": "atlas",
    "Batch": "task",
    "Claim": "claim",
    "Cut": "do",
    "Freeze": "do",
    "Graph": "graph",
    "KVCache": "kv_cache",
    "Making": "planning",
    "Mask": "mask",
    "Mean": "do",
    "Patch": "do",
    "Plan": "plan",
    "Project": "do",
    "Reader": "reader",
    "Resample": "do",
    "Scale": "do",
    "Score": "score",
    "Why": "why",
    "Zero": "do",
    "attach": "attach",
    "caching": "attach",
    "catalogue": "method",
    "detach": "attach",
    "do": "do",
    "fingerprint": "models",
    "make_plan": "planning",
    "map_model": "mapping",
    "open_model": "models",
    "prove": "verify",
    "tap": "tap",
}

__all__ = ["__version__", *sorted(_NAMES), *_ROOMS]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"headwise.{name}")
    if name in _NAMES:
        value = getattr(importlib.import_module(f"headwise.{_NAMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"headwise has no {name!r}. Its names: {', '.join(__all__)}.")


def __dir__() -> list[str]:
    return list(__all__)


class _Package(ModuleType):
    """Keeps `headwise.do` and `headwise.tap` the functions, though modules of the same names hold them.

    Importing a submodule makes Python set it as an attribute of its package, which would hide the function.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and _NAMES.get(name) == name:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


if TYPE_CHECKING:
    from headwise import attention as attention
    from headwise import cache as cache
    from headwise import circuits as circuits
    from headwise import data as data
    from headwise import decode as decode
    from headwise import features as features
    from headwise import heads as heads
    from headwise import lab as lab
    from headwise.atlas import Atlas as Atlas
    from headwise.attach import attach as attach
    from headwise.attach import caching as caching
    from headwise.attach import detach as detach
    from headwise.claim import Claim as Claim
    from headwise.do import Add as Add
    from headwise.do import Cut as Cut
    from headwise.do import Freeze as Freeze
    from headwise.do import Mean as Mean
    from headwise.do import Patch as Patch
    from headwise.do import Project as Project
    from headwise.do import Resample as Resample
    from headwise.do import Scale as Scale
    from headwise.do import Zero as Zero
    from headwise.do import do as do
    from headwise.graph import Graph as Graph
    from headwise.kv_cache import KVCache as KVCache
    from headwise.mapping import map_model as map_model
    from headwise.mask import Mask as Mask
    from headwise.method import catalogue as catalogue
    from headwise.models import fingerprint as fingerprint
    from headwise.models import open_model as open_model
    from headwise.plan import Plan as Plan
    from headwise.planning import Making as Making
    from headwise.planning import make_plan as make_plan
    from headwise.reader import Reader as Reader
    from headwise.score import Score as Score
    from headwise.tap import tap as tap
    from headwise.task import Batch as Batch
    from headwise.verify import prove as prove
    from headwise.why import Why as Why
    from headwise.worth import Appraisal as Appraisal
