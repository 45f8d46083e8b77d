"""Where a Hugging Face model keeps its layers, heads, MLPs and norms, found by watching one tiny forward pass.

Nothing here knows a model type by name. One probe runs a few tokens through the model with a recording attention
function and hooks on every module; what calls what, in which order and with which shapes tells the rest.
"""

import difflib
import re
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from headwise.site import HEAD_KINDS, LAYER_KINDS, Site, head

PROBE = "headwise_probe"


@dataclass
class Layer:
    """One transformer block as seen from one attention: the modules at which its sites can be read and written.

    Attributes:
        attention: the module that computes attention; it calls the attention interface when `interface` is true.
        out: the output projection; its input is z with all heads side by side, its output the site `attn`.
        mid: module whose input is resid_mid.
        mlp: module whose output is the site `mlp`; `down`: the down projection, whose input is `neurons`.
        q_raw, k_raw: modules whose output is q and k before RoPE.
    """

    stack: str
    number: int
    block: nn.Module
    attention: nn.Module
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    interface: bool
    cross: bool = False
    out: nn.Module | None = None
    mid: nn.Module | None = None
    mlp: nn.Module | None = None
    down: nn.Module | None = None
    q_raw: nn.Module | None = None
    k_raw: nn.Module | None = None

    def offers(self, kind: str) -> bool:
        """Whether values of this kind can be had in this layer."""
        needs = {
            "z": self.interface or self.out is not None,
            "q_pre": self.q_raw is not None,
            "k_pre": self.k_raw is not None,
            "attn": self.out is not None,
            "mlp": self.mlp is not None,
            "neurons": self.down is not None,
            "resid_mid": self.mid is not None,
            "resid_pre": True,
            "resid_post": True,
        }
        return needs.get(kind, self.interface)


@dataclass
class Anatomy:
    """The layers of a model by stack and number, and the blocks that have no attention."""

    model_type: str
    by_place: dict[tuple[str, int], Layer]
    blocks: dict[str, dict[int, nn.Module]]
    returns_tuple: dict[int, bool] = field(default_factory=dict)

    def layer(self, number: int, stack: str = "") -> Layer:
        """One layer. Raises ValueError when the stack has no attention of that number."""
        if (stack, number) not in self.by_place:
            have = self.numbers(stack)
            raise ValueError(f"This {self.model_type} has no attention in layer {number}; its layers are {_span(have)}.")
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
            "resid_mid": "its block has no point between attention and MLP (parallel or post-norm block)",
            "neurons": "its MLP has no single down projection",
            "mlp": "its MLP was not found",
            "attn": "its output projection was not found",
        }
        silent = "its attention never calls transformers' attention interface"
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
            raise ValueError(f"{text}: this {self.model_type} has the layers {_span(numbers)}, not {site.layer}.")
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
        if site.index is None or site.kind == "neurons":
            return
        count = layer.kv_heads if site.kind in ("k", "v", "k_pre") else layer.heads
        if site.index >= count:
            raise ValueError(f"{text}: layer {layer.number} has heads 0 to {count - 1}, not {site.index}.")


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
        _known[model] = _Probe(model).read()
    return _known[model]


def probe_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """The smallest inputs that a model accepts, made from its config."""
    config = model.config
    kind = model.main_input_name
    device = model.device
    if kind == "pixel_values":
        size = getattr(config, "image_size", 32)
        height, width = (size, size) if isinstance(size, int) else size
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randn(1, getattr(config, "num_channels", 3), height, width, generator=generator)
        return {"pixel_values": pixels.to(device, model.dtype)}
    if kind != "input_ids":
        raise ValueError(f"{type(model).__name__} takes {kind}; headwise reads models that take tokens or images.")
    vocab = getattr(config.get_text_config(), "vocab_size", 8)
    ids = (torch.arange(6, device=device) * 7 + 3)[None] % max(2, vocab)
    inputs = {"input_ids": ids}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, :4]
    return inputs


@contextmanager
def implementation(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Every config of the model says attention implementation `name` inside the block, and what it said before after."""
    configs: list = []
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation") and not any(c is config for c in configs):
            configs.append(config)
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = name
        yield
    finally:
        for config, old in zip(configs, before, strict=True):
            config._attn_implementation = old


@dataclass
class _Call:
    """One module call of the probe. Tensors are kept alive, so that identity means identity."""

    name: str
    module: nn.Module
    inputs: tuple
    output: object
    start: int
    end: int


def _first(value: object) -> Tensor | None:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (tuple, list)) and value:
        return _first(value[0])
    return None


def _is_linear(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2 and not isinstance(module, nn.Embedding) and "Norm" not in type(module).__name__


class _Probe:
    """One recorded forward pass, and what can be told from it."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.clock = 0
        self.calls: list[_Call] = []
        self.attends: list[tuple[nn.Module, tuple[int, ...], tuple[int, ...], tuple[int, ...], int]] = []
        self.names = {module: name for name, module in model.named_modules()}

    def _tick(self) -> int:
        self.clock += 1
        return self.clock

    def _record(self) -> None:
        starts: dict[int, list[int]] = {}

        def before(module: nn.Module, *_: object) -> None:
            starts.setdefault(id(module), []).append(self._tick())

        def after(module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
            values = tuple(args) + tuple(kwargs.values())
            self.calls.append(
                _Call(self.names[module], module, values, output, starts[id(module)].pop(), self._tick())
            )

        def watch(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: object) -> tuple:
            self.attends.append((module, tuple(query.shape), tuple(key.shape), tuple(value.shape), self._tick()))
            shape = (query.shape[0], query.shape[2], query.shape[1], value.shape[-1])
            return value.new_zeros(shape), None

        hooks = []
        training = self.model.training
        self.model.eval()
        AttentionInterface.register(PROBE, watch)
        AttentionMaskInterface.register(PROBE, eager_mask)
        try:
            for module in self.model.modules():
                hooks.append(module.register_forward_pre_hook(before))
                hooks.append(module.register_forward_hook(after, with_kwargs=True))
            with torch.no_grad(), implementation(self.model, PROBE):
                self.model(**probe_inputs(self.model))
        finally:
            for hook in hooks:
                hook.remove()
            self.model.train(training)
            ALL_ATTENTION_FUNCTIONS._global_mapping.pop(PROBE, None)
            ALL_MASK_ATTENTION_FUNCTIONS._global_mapping.pop(PROBE, None)

    def _block_name(self, name: str) -> tuple[str, int] | None:
        """Path of the outermost numbered module around `name`, and its number."""
        parts = name.split(".")
        for i, part in enumerate(parts):
            if part.isdigit():
                return ".".join(parts[: i + 1]), int(part)
        return None

    def read(self) -> Anatomy:
        self._record()
        self.calls.sort(key=lambda call: call.start)
        modules = dict(self.model.named_modules())
        found = self._by_interface() or self._by_name()
        if not found:
            raise ValueError(f"No attention heads were found in {type(self.model).__name__}.")
        by_place: dict[tuple[str, int], Layer] = {}
        blocks: dict[str, dict[int, nn.Module]] = {}
        for attention, shapes, moment in found:
            path, number = self._block_name(self.names[attention]) or ("", 0)
            stack = self._stack(path)
            cross = (stack, number) in by_place
            stack = "cross" if cross else stack
            layer = self._layer(modules[path], stack, number, attention, shapes, moment)
            layer.cross = cross
            by_place[stack, number] = layer
            parent, _, _ = path.rpartition(".")
            siblings = modules[parent].named_children() if path else []
            blocks.setdefault(stack, {int(n): m for n, m in siblings if n.isdigit()} or {number: modules[path]})
        tuples = {id(c.module): isinstance(c.output, tuple) for c in self.calls}
        returns = {id(m): tuples.get(id(m), False) for stack in blocks.values() for m in stack.values()}
        return Anatomy(self.model.config.model_type, by_place, blocks, returns)

    def _stack(self, path: str) -> str:
        return "enc" if self.model.config.is_encoder_decoder and re.search(r"\bencoder\b", path) else ""

    def _by_interface(self) -> list:
        return [(m, (q[1], k[1], q[3], v[3]), when) for m, q, k, v, when in self.attends]

    def _by_name(self) -> list:
        """Old types: the outermost executed module of a block whose class is called attention."""
        config = self.model.config.get_text_config()
        heads = getattr(config, "num_attention_heads", None) or getattr(config, "n_head", None)
        found, seen = [], set()
        for call in self.calls:
            path = self._block_name(call.name)
            if heads and path and "attention" in type(call.module).__name__.lower() and path not in seen:
                seen.add(path)
                width = getattr(config, "hidden_size", heads)
                found.append((call.module, (heads, heads, width // heads, width // heads), call.start))
        return found

    def _layer(self, block: nn.Module, stack: str, number: int, attention: nn.Module, shapes: tuple, moment: int) -> Layer:
        heads, kv_heads, head_dim, value_dim = shapes
        interface = bool(self.attends)
        layer = Layer(stack, number, block, attention, heads, kv_heads, head_dim, value_dim, interface)
        inside = [c for c in self.calls if c.module is not block and c.name.startswith(self.names[block] + ".")]
        width = heads * value_dim
        linears = [c for c in inside if _is_linear(c.module)]
        after = [c for c in linears if c.start > moment and _width(c.inputs) == width]
        if not interface:
            after = [c for c in after if c.name.startswith(self.names[attention] + ".")][-1:]
        if after:
            layer.out = after[0].module
            self._mlp(layer, block, inside, linears, after[0])
        self._raw(layer)
        return layer

    def _mlp(self, layer: Layer, block: nn.Module, inside: list[_Call], linears: list[_Call], out: _Call) -> None:
        """The MLP is what runs last in the block after the attention (for self-attention above a cross-attention: not here)."""
        entered = next((c for c in self.calls if c.module is block), None)
        if entered is None:
            return
        later = [c for c in linears if c.start > out.end]
        attending = [moment for *_, moment in self.attends if out.end < moment < entered.end]
        if attending:
            return
        depth = self.names[block].count(".") + 1
        children = [c for c in inside if c.name.count(".") == depth and c.start > out.end and "Norm" not in type(c.module).__name__]
        children = [c for c in children if any(True for _ in c.module.parameters())]
        parallel = [c for c in linears if c.end < out.start and not c.name.startswith(self.names[layer.attention])]
        if not later and not children and not parallel:
            return
        child = children[-1] if children else None
        experts = child is not None and any("expert" in n.lower() for n, _ in child.module.named_modules())
        if (later or parallel) and not experts:
            layer.down = (later or parallel)[-1].module
        owns_norm = child is None or any("Norm" in type(m).__name__ for m in child.module.modules())
        layer.mlp = layer.down if owns_norm else child.module
        first = child if child is not None and not owns_norm and not _is_linear(child.module) else (later[0] if later else None)
        if first is not None:
            layer.mid = self._mid(block, inside, entered, out, first)

    def _mid(self, block: nn.Module, inside: list[_Call], entered: _Call, out: _Call, first: _Call) -> nn.Module | None:
        """The module whose input is resid_mid: the norm before the MLP, or the MLP itself when nothing stands before it."""
        given = _first(first.inputs)
        depth = self.names[block].count(".") + 1
        makers = [c for c in inside if c.end <= first.start and _first(c.output) is given]
        if not makers:
            return first.module if given is not None and given is not _first(entered.inputs) else None
        maker = makers[-1]
        own = maker.name.count(".") == depth and maker.start > out.end and "Norm" in type(maker.module).__name__
        source = _first(maker.inputs)
        straight = source is None or source is _first(entered.inputs) or any(_first(c.output) is source for c in inside if c.end < maker.start)
        return maker.module if own and not straight else None

    def _raw(self, layer: Layer) -> None:
        children = dict(layer.attention.named_children())
        for side in ("q", "k"):
            names = [f"{side}_norm", f"{side}_layernorm", f"{side}_proj", {"q": "query", "k": "key"}[side], side]
            hit = next((children[n] for n in names if n in children), None)
            if hit is not None and layer.interface:
                setattr(layer, f"{side}_raw", hit)


def _width(values: tuple) -> int | None:
    tensor = _first(values)
    return None if tensor is None else tensor.shape[-1]


def nearest_unit(text: str, units: list[str]) -> str:
    """A sentence that names the nearest existing unit."""
    near = difflib.get_close_matches(text, units, n=1)
    return f" Did you mean {near[0]}?" if near else ""
