"""One tiny forward pass of a Hugging Face model, recorded, and what it tells of layers, heads, MLPs and norms.

Nothing here knows a model type by name. The probe runs a few tokens through the model with a recording attention
function and hooks on every module; what calls what, in which order and with which shapes tells the rest.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

PROBE = "headwise_probe"


@dataclass
class Layer:
    """One transformer block as seen from one attention: the modules at which its sites can be read and written.

    Attributes:
        attention: the module that computes attention; it calls the attention interface when `interface` is true.
        out: the output projection; its input is z with all heads side by side, its output the site `attn`.
        mid: module whose input is resid_mid, or whose output is when `post_norm` is true (BERT's kind of block).
        flat: whether resid_mid, neurons and mlp pass as [B*T, D] (OPT's kind of block).
        mlp: module whose output is the site `mlp`; `down`: the down projection, whose input is `neurons`.
        q_raw, k_raw: modules whose output is q and k before RoPE, [B, H, T, d] where `heads_first` is true.
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
    neurons: int = 0
    flat: bool = False
    post_norm: bool = False
    heads_first: bool = False
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
    heads = getattr(config.get_text_config(), "num_attention_heads", None)
    if kind == "inputs_embeds" and hasattr(config, "input_size"):
        vectors = torch.randn(1, 7 if heads == 6 else 6, config.input_size, generator=torch.Generator().manual_seed(0))
        return {"inputs_embeds": vectors.to(device, model.dtype)}
    if kind != "input_ids":
        raise ValueError(f"{type(model).__name__} takes {kind}; headwise reads models that take tokens or images.")
    vocab = getattr(config.get_text_config(), "vocab_size", 8)
    # No axis of heads may look like the axis of tokens.
    ids = (torch.arange(7 if heads == 6 else 6, device=device) * 7 + 3)[None] % max(2, vocab)
    inputs = {"input_ids": ids}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, :4]
    return inputs


def enter(model: PreTrainedModel, rename: Callable[[str], str]) -> Callable[[], None]:
    """Let every config of the model name another attention implementation; the result gives the old names back."""
    configs: list = []

    def collect(config: object) -> None:
        if hasattr(config, "_attn_implementation") and not any(known is config for known in configs):
            configs.append(config)
            for key in getattr(config, "sub_configs", ()):
                collect(getattr(config, key, None))

    for module in model.modules():
        collect(getattr(module, "config", None))
    before = [config._attn_implementation for config in configs]

    def leave() -> None:
        # Setting a config also sets the configs inside it, which stand after it here and get their own name back.
        for config, old in zip(configs, before, strict=True):
            config._attn_implementation = old

    try:
        for config, old in zip(configs, before, strict=True):
            config._attn_implementation = rename(old or "eager")
    except BaseException:
        leave()
        raise
    return leave


@contextmanager
def implementation(model: PreTrainedModel, rename: Callable[[str], str]) -> Iterator[None]:
    """Every config of the model names another attention implementation inside the block, and its old one after."""
    leave = enter(model, rename)
    try:
        yield
    finally:
        leave()


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """The model in evaluation mode and without gradients inside the block; each module as it was after."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def overheard(model: PreTrainedModel, modules: Iterable[nn.Module], note: Callable, **how: bool) -> None:
    """Run the probe's few tokens through the model, with `note` as a forward hook on these modules meanwhile.

    Args:
        how: options of `register_forward_hook`.
    """
    hooks = [module.register_forward_hook(note, **how) for module in modules]
    try:
        with evaluating(model):
            model(**probe_inputs(model))
    finally:
        for hook in hooks:
            hook.remove()


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
    return (
        isinstance(weight, Tensor)
        and weight.ndim == 2
        and not isinstance(module, nn.Embedding)
        and not _is_norm(module)
    )


class Probe:
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
            self.calls.append(_Call(self.names[module], module, values, output, starts[id(module)].pop(), self._tick()))

        def watch(
            module: nn.Module,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attention_mask: Tensor | None,
            **kwargs: object,
        ) -> tuple:
            self.attends.append((module, tuple(query.shape), tuple(key.shape), tuple(value.shape), self._tick()))
            shape = (query.shape[0], query.shape[2], query.shape[1], value.shape[-1])
            return value.new_zeros(shape), None

        hooks = []
        AttentionInterface.register(PROBE, watch)
        AttentionMaskInterface.register(PROBE, eager_mask)
        try:
            for module in self.model.modules():
                hooks.append(module.register_forward_pre_hook(before))
                hooks.append(module.register_forward_hook(after, with_kwargs=True))
            with evaluating(self.model), implementation(self.model, lambda _: PROBE):
                self.model(**probe_inputs(self.model))
        finally:
            for hook in hooks:
                hook.remove()
            ALL_ATTENTION_FUNCTIONS._global_mapping.pop(PROBE, None)
            ALL_MASK_ATTENTION_FUNCTIONS._global_mapping.pop(PROBE, None)

    def _block_name(self, name: str) -> tuple[str, int] | None:
        """Path of the outermost numbered module around `name`, and its number."""
        parts = name.split(".")
        for i, part in enumerate(parts):
            if part.isdigit():
                return ".".join(parts[: i + 1]), int(part)
        return None

    def read(self) -> "tuple[dict[tuple[str, int], Layer], dict[str, dict[int, nn.Module]]]":
        """Run the probe. Returns the layers by stack and number, and all blocks of each stack."""
        self._record()
        self.calls.sort(key=lambda call: call.start)
        found = self._by_interface() or self._by_name()
        if not found:
            raise ValueError(f"No attention heads were found in {type(self.model).__name__}.")
        if len({attention for attention, _, _ in found}) < len(found):
            raise ValueError(
                f"{type(self.model).__name__} runs one attention module several times in a pass (shared layers); "
                "headwise knows a layer by its module and cannot tell them apart."
            )
        modules = dict(self.model.named_modules())
        layers: dict[tuple[str, int], Layer] = {}
        blocks: dict[str, dict[int, nn.Module]] = {}
        for attention, shapes, moment in found:
            path, number = self._block_name(self.names[attention]) or ("", 0)
            stack = self._stack(path)
            stack = "cross" if (stack, number) in layers else stack
            layers[stack, number] = self._layer(modules[path], stack, number, attention, shapes, moment)
            parent, _, _ = path.rpartition(".")
            siblings = modules[parent].named_children() if path else []
            blocks.setdefault(stack, {int(n): m for n, m in siblings if n.isdigit()} or {number: modules[path]})
        for (stack, number), last in layers.items():
            if stack == "cross":  # the MLP of the block stands after both of its attentions
                own = layers["", number]
                own.mlp, own.down, own.neurons = last.mlp, last.down, last.neurons
                own.mid, own.post_norm, own.flat = last.mid, last.post_norm, last.flat
        return layers, blocks

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

    def _layer(
        self, block: nn.Module, stack: str, number: int, attention: nn.Module, shapes: tuple, moment: int
    ) -> Layer:
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
        """The MLP is what runs last in the block after the attention; after a cross-attention, where there is one."""
        entered = next((c for c in self.calls if c.module is block), None)
        if entered is None:
            return
        later = [c for c in linears if c.start > out.end]
        attending = [moment for *_, moment in self.attends if out.end < moment < entered.end]
        if attending:
            return
        depth = self.names[block].count(".") + 1
        children = [c for c in inside if c.name.count(".") == depth and c.start > out.end and not _is_norm(c.module)]
        children = [c for c in children if any(True for _ in c.module.parameters())]
        parallel = [c for c in linears if c.end < out.start and not c.name.startswith(self.names[layer.attention])]
        if not later and not children and not parallel:
            return
        child = children[-1] if children else None
        experts = child is not None and any("expert" in n.lower() for n, _ in child.module.named_modules())
        if (later or parallel) and not experts:
            layer.down = (later or parallel)[-1].module
            layer.neurons = _width((later or parallel)[-1].inputs) or 0
        # BERT, T5 and Bloom add the residual inside the module of the MLP: there the down projection is the MLP.
        adds = (
            child is None
            or _first(child.output) is _first(entered.output)
            or any(map(_is_norm, child.module.modules()))
        )
        layer.mlp = layer.down if adds else child.module
        first = child if child is not None and not adds and not _is_linear(child.module) else next(iter(later), None)
        layer.flat = layer.down is not None and _first((later or parallel)[-1].inputs).ndim == 2
        if first is not None:
            self._mid(layer, inside, entered, out, first)

    def _mid(self, layer: Layer, inside: list[_Call], entered: _Call, out: _Call, first: _Call) -> None:
        """The module at which resid_mid shows: the norm before the MLP, or the MLP itself when it has none."""
        given = _first(first.inputs)
        makers = [c for c in inside if c.end <= first.start and _first(c.output) is given]
        norm = next((c for c in makers if _is_norm(c.module) and c.start > out.end), None)
        parallel = _first((norm or first).inputs) is _first(entered.inputs)
        if norm is not None:
            ends = any(_first(c.output) is _first(entered.output) for c in inside if _is_norm(c.module))
            layer.post_norm = ends
            layer.mid = norm.module if ends or not parallel else None
        elif not makers and not parallel:
            layer.mid = first.module

    def _raw(self, layer: Layer) -> None:
        children = dict(layer.attention.named_children())
        for side, heads in (("q", layer.heads), ("k", layer.kv_heads)):
            names = [f"{side}_norm", f"{side}_layernorm", f"{side}_proj", {"q": "query", "k": "key"}[side], side]
            hit = next((children[n] for n in names if n in children), None)
            value = next((_first(c.output) for c in self.calls if c.module is hit), None)
            if not layer.interface or value is None or value[0].numel() % (heads * layer.head_dim):
                continue
            setattr(layer, f"{side}_raw", hit)
            layer.heads_first = value.ndim == 4 and value.shape[1] == heads


def _is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__ and next(module.children(), None) is None


def _width(values: tuple) -> int | None:
    tensor = _first(values)
    return None if tensor is None else tensor.shape[-1]
