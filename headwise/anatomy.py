"""Where a Hugging Face model keeps its layers, heads, MLPs and norms, and which sites it therefore offers."""

import difflib
import weakref
from dataclasses import dataclass, replace

from torch import nn
from transformers import PreTrainedModel

from headwise.probe import Layer, Probe
from headwise.site import HEAD_KINDS, LAYER_KINDS, ON_KV_HEADS, Site, head


@dataclass
class Anatomy:
    """The layers of a model by stack and number, and the blocks that have no attention."""

    model_type: str
    by_place: dict[tuple[str, int], Layer]
    blocks: dict[str, dict[int, nn.Module]]

    def layer(self, number: int, stack: str = "") -> Layer:
        """One layer. Raises ValueError when the stack has no attention of that number."""
        if (stack, number) not in self.by_place:
            have = self.numbers(stack)
            raise ValueError(f"This {self.model_type} has no attention in layer {number}; it has it in {_span(have)}.")
        return self.by_place[stack, number]

    def numbers(self, stack: str = "") -> list[int]:
        """Numbers of the layers that have attention heads."""
        return sorted(n for s, n in self.by_place if s == stack)

    @property
    def layers(self) -> list[int]:
        """Attention layers of the main stack."""
        return self.numbers()

    def heads(self, layer: int, stack: str = "") -> int:
        """Number of query heads."""
        return self.layer(layer, stack).heads

    def kv_heads(self, layer: int, stack: str = "") -> int:
        """Number of KV heads."""
        return self.layer(layer, stack).kv_heads

    def group(self, layer: int, index: int, stack: str = "") -> int:
        """The KV head that query head `index` reads."""
        place = self.layer(layer, stack)
        return index // (place.heads // place.kv_heads)

    def units(self, stack: str = "") -> list[str]:
        """Every query head, as "L5.H1"."""
        return [head(n, i, stack) for n in self.numbers(stack) for i in range(self.heads(n, stack))]

    def offers(self, kind: str, stack: str = "") -> bool:
        """Whether every attention layer of the stack has values of this kind."""
        return bool(self.numbers(stack)) and all(self.layer(n, stack).offers(kind) for n in self.numbers(stack))

    def lacks(self, stack: str = "") -> list[str]:
        """The kinds of site that this model does not offer, each with its reason."""
        reasons = {
            "q_pre": "its query projection is fused with others or never rotated",
            "k_pre": "its key projection is fused with others or never rotated",
            "resid_mid": "no point between attention and MLP was found in its block (do they run in parallel?)",
            "neurons": "its MLP has no single down projection",
            "mlp": "its MLP was not found",
            "attn": "its output projection was not found",
        }
        silent = "its attention never calls transformers' attention interface"
        if not any(self.layer(n, stack).interface for n in self.numbers(stack)):
            reasons |= dict.fromkeys(HEAD_KINDS, silent)
        kinds = HEAD_KINDS + LAYER_KINDS
        return [f"{k}: {reasons.get(k, silent)}" for k in kinds if not self.offers(k, stack)]

    def resolve(self, text: "str | Site") -> list[Site]:
        """The concrete sites, one a layer, that an address means here.

        Raises:
            ValueError: the layer, head or kind does not exist in this model.
        """
        site = Site.parse(text)
        known = {s for s, _ in self.by_place}
        if site.stack not in known:
            raise ValueError(f"{text}: this {self.model_type} has no {site.stack or 'main'} stack.")
        residual = site.kind in ("resid_pre", "resid_post")
        numbers = sorted(self.blocks[site.stack]) if residual else self.numbers(site.stack)
        if site.layer is not None and site.layer not in numbers:
            asked = site.layer
            near = min(numbers, key=lambda n: abs(n - asked))
            raise ValueError(
                f"{text}: this {self.model_type} has the layers {_span(numbers)}, not {site.layer}. "
                f"Did you mean {site.at_layer(near)}?"
            )
        found = []
        for number in numbers if site.layer is None else [site.layer]:
            if not residual:
                self._check(site, self.layer(number, site.stack), str(text))
            found.append(site.at_layer(number))
        return found

    def _check(self, site: Site, layer: Layer, text: str) -> None:
        if not layer.offers(site.kind):
            said = [line for line in self.lacks(site.stack) if line.startswith(site.kind + ":")]
            raise ValueError(f"{text}: this {self.model_type} does not offer {said[0] if said else site.kind}.")
        neurons = site.kind == "neurons"
        count = layer.kv_heads if site.kind in ON_KV_HEADS else layer.neurons if neurons else layer.heads
        if site.index is not None and site.index >= count:
            have = f"{'neurons' if neurons else 'heads'} 0 to {count - 1}"
            last = replace(site, index=count - 1)
            raise ValueError(f"{text}: layer {layer.number} has {have}, not {site.index}. Did you mean {last}?")


def _span(numbers: list[int]) -> str:
    if numbers and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers)) or "none"


# A memo, not a state: it forgets a model with the model.
_known: "weakref.WeakKeyDictionary[PreTrainedModel, Anatomy]" = weakref.WeakKeyDictionary()


def anatomy(model: PreTrainedModel) -> Anatomy:
    """The anatomy of a model, found once by a probe of a few tokens.

    Raises:
        ValueError: the model has no attention that can be found.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"headwise works on a transformers PreTrainedModel, not on {type(model).__name__}.")
    if model not in _known:
        _known[model] = Anatomy(model.config.model_type, *Probe(model).read())
    return _known[model]


def nearest_unit(text: str, units: list[str]) -> str:
    """A sentence that names the nearest existing unit."""
    near = difflib.get_close_matches(text, units, n=1)
    return f" Did you mean {near[0]}?" if near else ""
