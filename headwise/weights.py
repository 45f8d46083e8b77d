"""What each head would read and write, told from the weights alone.

Nothing here knows a model type by name: one watched forward pass tells which linear maps of an attention module make q,
k and v, how a fused map is cut into heads (the cut whose v equals the v that attention saw), and which norms stand
before the attention, after it, and before the unembedding. A norm is an elementwise gain once its scale is known; the
gain of the norm before a head is folded into OV and QK, that of the last norm into `Weights.readout`. RoPE is no part
of QK here.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from headwise.anatomy import anatomy
from headwise.do import Zero, do
from headwise.factored import Factored
from headwise.probe import Layer, evaluating, probe_inputs
from headwise.tap import tap

NAMES = {
    "q": ("q_proj", "query", "q", "q_lin", "wq"),
    "k": ("k_proj", "key", "k", "k_lin", "wk"),
    "v": ("v_proj", "value", "v", "v_lin", "wv"),
}


@dataclass(frozen=True)
class Norm:
    """A norm as what it does: take the mean away (or not), divide by a scale, multiply by `gain`, add `shift`."""

    module: nn.Module
    gain: Tensor
    shift: Tensor
    centred: bool

    @classmethod
    @torch.no_grad()
    def of(cls, module: nn.Module, width: int, like: Tensor) -> "Norm":
        """Ask the module itself: a vector of plus and minus ones has mean 0 and scale 1."""
        sign = torch.ones(width, dtype=like.dtype, device=like.device)
        sign[1::2] = -1
        up, down = module(sign[None, None])[0, 0].float(), module(-sign[None, None])[0, 0].float()
        shift = (up + down) / 2
        flat = module(torch.ones_like(sign)[None, None])[0, 0].float() - shift
        gain = (up - down) / 2 * sign.float()
        return cls(module, gain, shift, bool(flat.norm() < 0.5 * gain.norm()))

    def centre(self, x: Tensor) -> Tensor:
        """Without its mean over the last axis, where the norm takes it away."""
        return x - x.mean(-1, keepdim=True) if self.centred else x

    @torch.no_grad()
    def scale(self, x: Tensor) -> Tensor:
        """[..., 1] what the norm divides x [..., D] by."""
        straight = self.centre(x.float()) * self.gain
        given = self.module(x).float() - self.shift
        return (straight * given).sum(-1, keepdim=True) / (given * given).sum(-1, keepdim=True).clamp_min(1e-30)


@dataclass
class _Place:
    """What one watched pass told of one attention layer; weights [D, H, d] or None where they could not be told."""

    layer: Layer
    maps: dict[str, Tensor | None] = field(default_factory=dict)
    biases: dict[str, Tensor | None] = field(default_factory=dict)
    doors: dict[str, tuple[nn.Module, Tensor]] = field(default_factory=dict)
    before: Norm | None = None
    after: Norm | None = None


class Weights:
    """Per-head views of a model's weights, in float32, made once.

    Args:
        stack: "" the main stack, "enc" the encoder of an encoder-decoder, "cross" its cross-attention.
    """

    def __init__(self, model: PreTrainedModel, stack: str = "") -> None:
        self.model = model
        self.stack = stack
        self.body = anatomy(model)
        self.layers = self.body.numbers(stack)
        self.final: Norm | None = None
        self._places = _watch(self)

    def heads(self, layer: int) -> int:
        """Number of query heads."""
        return self.body.heads(layer, self.stack)

    def _part(self, side: str, layer: int, head: int) -> Tensor:
        place = self.body.layer(layer, self.stack)
        if not 0 <= head < place.heads:
            raise ValueError(f"Layer {layer} has heads 0 to {place.heads - 1}, not {head}.")
        weight = self._places[layer].maps.get(side)
        if weight is None:
            raise ValueError(
                f"The {side} weights of layer {layer} of this {self.body.model_type} cannot be told apart by head: "
                "its projection is factored, compressed or fused in a way that headwise does not know."
            )
        return weight[:, head if side == "q" else self.body.group(layer, head, self.stack)]

    def q(self, layer: int, head: int) -> Tensor:
        """[D, d] from the normed residual stream to the head's query, before RoPE."""
        return self._part("q", layer, head)

    def k(self, layer: int, head: int) -> Tensor:
        """[D, d] to the key that the head reads (shared by the heads of its group), before RoPE."""
        return self._part("k", layer, head)

    def v(self, layer: int, head: int) -> Tensor:
        """[D, d] to the value that the head reads (shared by the heads of its group)."""
        return self._part("v", layer, head)

    def bias(self, side: str, layer: int, head: int) -> Tensor | None:
        """[d] the bias of q, k or v of this head, None where there is none."""
        self._part(side, layer, head)
        bias = self._places[layer].biases.get(side)
        if bias is None:
            return None
        return bias[head if side == "q" else self.body.group(layer, head, self.stack)]

    def door(self, side: str, layer: int) -> tuple[nn.Module, Tensor]:
        """The module that makes q, k or v, and the columns [H or KV heads, d] of its output."""
        self._part(side, layer, 0)
        return self._places[layer].doors[side]

    def pre_norm(self, layer: int) -> Norm | None:
        """The norm whose output q, k and v are made of, None where there is none."""
        return self._places[layer].before

    def o(self, layer: int, head: int) -> Tensor:
        """[d, D] from the head's z to the residual stream; the heads' results add up to the attention output."""
        place = self.body.layer(layer, self.stack)
        if place.out is None:
            raise ValueError(f"The output projection of layer {layer} of this {self.body.model_type} was not found.")
        if not 0 <= head < place.heads:
            raise ValueError(f"Layer {layer} has heads 0 to {place.heads - 1}, not {head}.")
        width = place.value_dim
        return _matrix(place.out)[head * width : (head + 1) * width]

    def ov(self, layer: int, head: int) -> Factored:
        """[D, D] what the head writes for what it attends to, the gain of the norm before it folded in."""
        right = self.o(layer, head)
        after = self._places[layer].after
        if after is not None:
            right = after.centre(right) * after.gain
        return Factored(self._folded(layer, self.v(layer, head)), right)

    def qk(self, layer: int, head: int) -> Factored:
        """[D, D] bilinear form of query token and key token, without RoPE and biases, norm gains folded in."""
        q, k = self._folded(layer, self.q(layer, head)), self._folded(layer, self.k(layer, head))
        return Factored(q, k.T)

    def _folded(self, layer: int, weight: Tensor) -> Tensor:
        norm = self._places[layer].before
        if norm is None:
            return weight
        weight = weight * norm.gain[:, None]
        return weight - weight.mean(0) if norm.centred else weight

    def into_layer(self, layer: int, x: Tensor) -> Tensor:
        """Residual vectors x [n, D] as the OV and QK of a layer take them: scaled as its norm scales, gain left out."""
        norm = self._places[layer].before
        if norm is None:
            return x
        x = norm.centre(x)
        return x / x.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)

    def post_norm(self, layer: int) -> Norm | None:
        """The norm between the attention output and the residual stream, where the model has one (Gemma 2, OLMo 2)."""
        return self._places[layer].after

    @property
    def embed(self) -> Tensor:
        """[V, D] the embedding table."""
        table = self.model.get_input_embeddings()
        if not isinstance(table, nn.Embedding):
            raise ValueError(f"This {self.body.model_type} embeds {self.model.main_input_name}, not tokens.")
        return table.weight.detach().float()

    @property
    def unembed(self) -> Tensor:
        """[V, D] the unembedding, as it stands behind the last norm."""
        out = self.model.get_output_embeddings()
        if out is None:
            raise ValueError(
                f"{type(self.model).__name__} has no unembedding, so nothing can be read in tokens; "
                "open it with its language-model head."
            )
        return out.weight.detach().float()

    @property
    def tokens(self) -> Tensor:
        """[V, D] embeddings as a first norm would scale them (mean away where norms do so), before any gain."""
        return self.into_layer(self.layers[0], self.embed)

    @property
    def readout(self) -> Tensor:
        """[V, D] unembedding, the last norm's gain and mean folded in: logits = residual / scale @ readout.T + c."""
        if self.final is None:
            return self.unembed
        return self.final.centre(self.unembed * self.final.gain)

    def final_norm(self, x: Tensor) -> Tensor:
        """The norm before the unembedding, applied to x [..., D]."""
        return x if self.final is None else self.final.module(x)


def _matrix(module: nn.Module) -> Tensor:
    """[in, out] of a Linear or a Conv1D."""
    weight = module.get_parameter("weight").detach().float()
    return weight if type(module).__name__ == "Conv1D" else weight.T


def _bias(module: nn.Module) -> Tensor | None:
    bias = getattr(module, "bias", None)
    return None if bias is None else bias.detach().float()


def _is_map(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    return linear and isinstance(weight, Tensor) and weight.is_floating_point()


def _first(value: object) -> Tensor | None:
    while isinstance(value, (tuple, list)) and value:
        value = value[0]
    return value if isinstance(value, Tensor) else None


def _watch(weights: Weights) -> dict[int, _Place]:
    """One watched forward pass; see the module's docstring. Tensors are kept alive, so that identity means identity."""
    model, stack = weights.model, weights.stack
    calls: list[tuple[nn.Module, Tensor | None, Tensor | None]] = []
    hooks = []

    def note(module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        given = _first(args) if args else kwargs.get("hidden_states")
        calls.append((module, _first(given), _first(output)))

    places = {n: _Place(weights.body.layer(n, stack)) for n in weights.layers}
    seen = [f"{stack}.L{n}.v" if stack else f"L{n}.v" for n, p in places.items() if p.layer.interface]
    try:
        for module in model.modules():
            if _is_map(module) or "Norm" in type(module).__name__:
                hooks.append(module.register_forward_hook(note, with_kwargs=True))
        with evaluating(model), tap(model, *(seen or ["resid_pre"])) as t:
            model(**probe_inputs(model))
    finally:
        for hook in hooks:
            hook.remove()
    norms = [(m, x, y) for m, x, y in calls if "Norm" in type(m).__name__ and x is not None and y is not None]
    for number, place in places.items():
        value = t.by_layer("v", stack).get(number) if seen else None
        _fill(place, calls, norms, value)
    weights.final = _final(weights, norms)
    return places


def _fill(place: _Place, calls: list, norms: list, value: Tensor | None) -> None:
    inside = {module: (x, y) for module, x, y in calls if any(module is m for m in place.layer.attention.modules())}
    maps = [m for m in inside if _is_map(m) and m is not place.layer.out]
    for side in ("q", "k", "v"):
        place.maps[side], place.biases[side] = _separate(place, side, maps)
    if place.maps["v"] is None and value is not None:
        _fused(place, maps, inside, value)
    entry = next((inside[m][0] for m in maps), None)
    for module, _, y in norms:
        if entry is not None and _same(y, entry):
            place.before = Norm.of(module, entry.shape[-1], entry)
    wrote = next((y for m, _, y in calls if m is place.layer.out), None)
    for module, x, _ in norms:
        # The post-norm of a sum (BERT) is fed another tensor; only a norm of the output itself counts.
        if wrote is not None and _same(x, wrote):
            place.after = Norm.of(module, wrote.shape[-1], wrote)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and (a is b or (a.data_ptr() == b.data_ptr() and a.shape == b.shape))


def _separate(place: _Place, side: str, maps: list[nn.Module]) -> tuple[Tensor | None, Tensor | None]:
    """The weights [D, H, d] and bias [H, d] of a projection of its own, found by its name and size."""
    layer = place.layer
    heads = layer.heads if side == "q" else layer.kv_heads
    width = layer.value_dim if side == "v" else layer.head_dim
    names = {id(m): n.split(".")[-1] for n, m in layer.attention.named_modules()}
    for module in maps:
        if names.get(id(module)) not in NAMES[side]:
            continue
        matrix, bias = _matrix(module), _bias(module)
        extra, columns = matrix.shape[1] / (heads * width), torch.arange(matrix.shape[1])
        if extra == 2 and side == "q":
            # Gated attention: each head's query is followed by its gate.
            columns = columns.view(heads, 2, width)[:, 0].flatten()
            matrix, bias = matrix[:, columns], None if bias is None else bias[columns]
        elif extra != 1:
            return None, None
        place.doors[side] = module, columns.view(heads, width)
        return matrix.unflatten(1, (heads, width)), None if bias is None else bias.view(heads, width)
    return None, None


def _fused(place: _Place, maps: list[nn.Module], inside: dict, value: Tensor) -> None:
    """Cut one fused map into q, k, v in the way whose v is the v that attention saw [1, Hkv, T, d]."""
    layer = place.layer
    heads, kv, width = layer.heads, layer.kv_heads, layer.head_dim
    if width != layer.value_dim:
        return
    total = (heads + 2 * kv) * width
    per = heads // kv
    number = torch.arange(total)
    grouped = number.view(kv, per + 2, width)
    cuts = (
        (number[: heads * width], number[heads * width : (heads + kv) * width], number[(heads + kv) * width :]),
        (grouped[:, :per].flatten(), grouped[:, per].flatten(), grouped[:, per + 1].flatten()),
    )
    for module in maps:
        made = inside[module][1]
        if made is None or made.shape[-1] != total:
            continue
        for cut in cuts:
            v = made[..., cut[2]].unflatten(-1, (kv, width)).transpose(1, 2)
            if v.shape == value.shape and torch.allclose(v, value, rtol=1e-3, atol=1e-5):
                matrix, bias = _matrix(module), _bias(module)
                for side, index in zip("qkv", cut, strict=True):
                    place.maps[side] = matrix[:, index].unflatten(1, (-1, width))
                    place.biases[side] = None if bias is None else bias[index].view(-1, width)
                    place.doors[side] = module, index.view(-1, width)
                return


def _final(weights: Weights, norms: list) -> Norm | None:
    """The last norm outside all blocks, run after them: what stands before the unembedding."""
    blocks = weights.body.blocks.get(weights.stack, {})
    owned = {id(m) for block in blocks.values() for m in block.modules()}
    last = max((i for i, (m, _, _) in enumerate(norms) if id(m) in owned), default=-1)
    later = [(m, x) for m, x, _ in norms[last + 1 :] if id(m) not in owned]
    if not later or last < 0:
        return None
    module, given = later[-1]
    return Norm.of(module, given.shape[-1], given)


@torch.no_grad()
def effective_embedding(weights: Weights, ids: Tensor) -> Tensor:
    """[n, D] tokens after the first block without its attention: embedding plus first MLP, one token a prompt."""
    first = min(weights.body.blocks[weights.stack])
    model = weights.model
    if model.config.is_encoder_decoder:
        raise ValueError(f"{type(model).__name__} takes no single token as a prompt; use a decoder.")
    quiet = [Zero(f"L{first}.attn")] if first in weights.layers else []
    with evaluating(model), do(model, *quiet), tap(model, f"L{first}.resid_post") as t:
        model.base_model(input_ids=ids.to(model.device)[:, None])
    return t[f"L{first}.resid_post"][:, 0].float()


def composition(weights: Weights, side: str) -> dict[int, Tensor]:
    """How much of what earlier heads write do later heads read? Elhage's composition for every pair, above chance.

    Args:
        side: "q", "k" or "v", the input of the later head.

    Returns:
        {layer: [H, earlier heads]}: Frobenius norm of the product over the product of norms, minus 1 / sqrt(D), what
        random matrices give. Columns follow layers and heads in order. Layers with nothing before them are left out.
    """
    if side not in ("q", "k", "v"):
        raise ValueError(f"Heads compose through q, k or v, not {side!r}.")
    found: dict[int, Tensor] = {}
    writers: list[Tensor] = []
    for layer in weights.layers:
        heads = range(weights.heads(layer))
        if writers:
            given, widths = torch.cat(writers), [len(rows) for rows in writers]
            rows = []
            for head in heads:
                reader = weights.ov(layer, head) if side == "v" else weights.qk(layer, head)
                reader = reader.T if side == "k" else reader
                small = reader.A @ torch.linalg.qr(reader.B.T).R.T
                read = torch.stack([part.norm() for part in (given @ small).split(widths)])
                rows.append(read / max(reader.norm(), 1e-30))
            found[layer] = torch.stack(rows) - small.shape[0] ** -0.5
        for head in heads:
            written = weights.ov(layer, head)
            # Only the row space's geometry matters: R of the QR of A keeps every norm and is d x d.
            writers.append(torch.linalg.qr(written.A).R @ written.B / max(written.norm(), 1e-30))
    return found


def strongest_composition(weights: Weights, side: str) -> dict[int, Tensor]:
    """{layer: [H]} the largest composition of each head with one earlier head; NaN where nothing lies before."""
    pairs = composition(weights, side)
    nothing = {n: torch.full((weights.heads(n),), float("nan")) for n in weights.layers if n not in pairs}
    return nothing | {n: row.amax(-1) for n, row in pairs.items()}
