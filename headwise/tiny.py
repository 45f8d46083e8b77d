"""Tiny: a small transformer to be trained in minutes, as a plain Hugging Face model that every part of headwise reads.

No existing config does all of it. LlamaConfig has an MLP, RMSNorm and RoPE whatever its fields say, GPT2Config learned
positions and dropout, and neither takes vectors as its native input or leaves norm and residual away. So this one is
small, and attends by transformers' attention interface like the others.
"""

from typing import TYPE_CHECKING, Any, cast

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache, GenerationMixin, PreTrainedConfig
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel

from headwise.attend import attend_openly
from headwise.method import catalogue, find, load

if TYPE_CHECKING:
    from headwise.mixing import AttentionMethod

POSITIONS = ("rope", "learned", "onehot", "none")
NORMS = ("layer", "rms", "none")


@strict
class TinyConfig(PreTrainedConfig):
    """The shape of a `Tiny`.

    Fields:
        layers, heads, width: as named; `head_dim` channels a head, by default width / heads.
        mlp: width of the MLP in each layer; 0 for attention only. `act`: its activation.
        pos: "rope", "learned" (added), "onehot" (the first `max_positions` channels of the residual stream), "none".
        norm: "layer" or "rms" (before each part and before the readout), or "none".
        residual: whether parts add to the stream or replace it.
        causal: whether queries see only what came before them.
        vocab_size: tokens it reads; 0 where it reads vectors.
        input_size: channels of the vectors it reads as `inputs_embeds`; 0 where it reads tokens.
        read_in: a linear map from vectors into the stream; without one they must have its width.
        outputs: numbers it gives at each position; 0 for one a token.
        classifier: widths of hidden ReLU layers of the readout; () for a linear one.
        bias: biases in the attention projections.
        mixer: a method of the attention room in place of softmax attention, as its `identity()` names it:
            {"name": "attention.hgrn2", "fields": {"keep": 4.0}}; None for softmax attention.
        embed_std: standard deviation of fresh token and position embeddings; all else is LeCun normal.

    Raises:
        ValueError: the fields do not fit each other.
    """

    model_type = "headwise_tiny"
    has_no_defaults_at_init = True
    attribute_map = {
        "num_hidden_layers": "layers",
        "num_attention_heads": "heads",
        "hidden_size": "width",
        "intermediate_size": "mlp",
        "max_position_embeddings": "max_positions",
    }

    layers: int = 2
    heads: int = 8
    width: int = 64
    head_dim: int | None = None
    mlp: int = 0
    act: str = "relu"
    pos: str = "rope"
    max_positions: int = 256
    rope_theta: float = 10000.0
    norm: str = "layer"
    residual: bool = True
    causal: bool = True
    vocab_size: int = 0
    input_size: int = 0
    read_in: bool = True
    outputs: int = 0
    classifier: list[int] | tuple[int, ...] = ()
    bias: bool = False
    mixer: dict[str, Any] | None = None
    embed_std: float = 0.02
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.head_dim is None:
            self.head_dim = self.width // self.heads
        # In the open from the start: an edit of a pattern then changes nothing but what it says, to the last bit.
        kwargs.setdefault("attn_implementation", "eager")
        super().__post_init__(**kwargs)
        self._check()

    def _check(self) -> None:
        for name, allowed in (("pos", POSITIONS), ("norm", NORMS)):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is unknown to Tiny; allowed are {', '.join(allowed)}."
                )
        if (self.vocab_size > 0) == (self.input_size > 0):
            raise ValueError(
                f"Tiny reads either tokens or vectors: vocab_size is {self.vocab_size}, input_size is "
                f"{self.input_size}; exactly one of them must be above 0."
            )
        if not self.read_in and self.input_size and self.input_size != self.content:
            raise ValueError(
                f"Without read_in, vectors must fill the stream: input_size is {self.input_size}, where "
                f"{self.content} channels are left for them."
            )
        if self.outputs == 0 and self.vocab_size == 0:
            raise ValueError("A Tiny that reads vectors must say how many outputs it has; outputs is 0.")
        if self.tie_word_embeddings and (
            self.input_size or self.classifier or self.outputs not in (0, self.vocab_size)
        ):
            raise ValueError("Only a linear readout into the tokens that are read can be tied to their embedding.")
        if self.mixer is not None:
            chosen_mixer(self.mixer)
            if not self.causal:
                raise ValueError(f"{self.mixer['name']} looks back only; a Tiny that is not causal cannot mix by it.")

    @property
    def content(self) -> int:
        """Channels of the stream that hold what was read, beside one-hot positions."""
        return self.width - (self.max_positions if self.pos == "onehot" else 0)

    def build(self, seed: int = 0) -> "Tiny":
        """A fresh model in training mode; the same seed gives the same weights, whatever was drawn before."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return Tiny(self)


def eager_attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention in the open, the same computation that headwise enters by; or the layer's own mixer."""
    if isinstance(module, TinyMixing):
        return module.mix(query, key, value, attention_mask, options.get("scaling")), None
    return attend_openly(module, query, key, value, attention_mask, lambda _, seen: seen, options)


def _norm(config: TinyConfig) -> nn.Module:
    if config.norm == "none":
        return nn.Identity()
    return nn.LayerNorm(config.width) if config.norm == "layer" else nn.RMSNorm(config.width, eps=1e-6)


def rotations(positions: Tensor, size: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, 1, T, size] of rotary positions; positions [B, T]."""
    speeds = theta ** (-torch.arange(0, size, 2, device=positions.device).float() / size)
    angles = (positions[:, None, :, None] * speeds).repeat(1, 1, 1, 2)
    return angles.cos(), angles.sin()


def _rotate(value: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = value.chunk(2, -1)
    return value * cos + torch.cat([-right, left], -1) * sin


class TinyAttention(nn.Module):
    """Causal attention with separate projections, by transformers' attention interface."""

    def __init__(self, config: TinyConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer, config.causal
        self.head_dim = cast(int, config.head_dim)
        self.scaling = self.head_dim**-0.5
        inner = config.heads * self.head_dim
        self.q_proj = nn.Linear(config.width, inner, bias=config.bias)
        self.k_proj = nn.Linear(config.width, inner, bias=config.bias)
        self.v_proj = nn.Linear(config.width, inner, bias=config.bias)
        self.o_proj = nn.Linear(inner, config.width, bias=config.bias)

    def forward(
        self, hidden_states: Tensor, mask: Tensor | None, turn: tuple[Tensor, Tensor] | None, past: Cache | None
    ) -> Tensor:
        shape = (*hidden_states.shape[:2], -1, self.head_dim)
        q, k, v = (proj(hidden_states).view(shape).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if turn is not None:
            q, k = _rotate(q, *turn), _rotate(k, *turn)
        if past is not None:
            k, v = past.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        z, _ = attend(self, q, k, v, mask, dropout=0.0, scaling=self.scaling)
        return self.o_proj(z.reshape(*shape[:2], -1))


def chosen_mixer(named: dict[str, Any]) -> "AttentionMethod":
    """The method that a config names. Raises ValueError where there is none such, or it lacks an option."""
    card = find(str(named.get("name")))
    if card.room != "attention":
        known = ", ".join(one.name for one in catalogue("attention"))
        raise ValueError(f"{card.name} does not mix values; allowed are {known}.")
    options = named.get("fields", {})
    for name in options:
        if name not in card.fields:
            raise ValueError(f"{card.name} has no field {name!r}; it has {', '.join(card.fields)}.")
    return cast("AttentionMethod", load(card.name)(**options))


class TinyMixing(TinyAttention):
    """Another mixer between the same projections. Its pattern in the open is the softmax of what it gives as scores."""

    def __init__(self, config: TinyConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.method = chosen_mixer(cast(dict, config.mixer))

    def mix(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
        """Mixed values [B, Tq, H, dv]."""
        return self.method.attend(query, key, value, _seen(mask), scale).transpose(1, 2).contiguous()

    def open_scores(self, query: Tensor, key: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
        """[B, H, Tq, Tk] logarithms of the weights that the mixer gives to values."""
        every = torch.eye(key.shape[2], dtype=query.dtype, device=query.device).expand(*key.shape[:2], -1, -1)
        return self.method.naive(query, key, every, _seen(mask), scale).clamp_min(1e-30).log()


def _seen(mask: Tensor | None) -> Tensor | None:
    return mask if mask is None or mask.dtype == torch.bool else mask == 0


class TinyMLP(nn.Module):
    """Up, activation, down."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.width, config.mlp)
        self.act = ACT2FN[config.act]
        self.down_proj = nn.Linear(config.mlp, config.width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down_proj(self.act(self.up_proj(hidden_states)))


class TinyBlock(nn.Module):
    """Attention, then perhaps an MLP, each behind its norm."""

    def __init__(self, config: TinyConfig, layer: int) -> None:
        super().__init__()
        self.residual = config.residual
        self.attention_norm = _norm(config)
        self.attention = (TinyMixing if config.mixer else TinyAttention)(config, layer)
        if config.mlp:
            self.mlp_norm = _norm(config)
            self.mlp = TinyMLP(config)

    def forward(
        self, hidden_states: Tensor, mask: Tensor | None, turn: tuple[Tensor, Tensor] | None, past: Cache | None
    ) -> Tensor:
        new = self.attention(self.attention_norm(hidden_states), mask, turn, past)
        hidden_states = hidden_states + new if self.residual else new
        if hasattr(self, "mlp"):
            new = self.mlp(self.mlp_norm(hidden_states))
            hidden_states = hidden_states + new if self.residual else new
        return hidden_states


class Readout(nn.Module):
    """From the stream to the outputs, linear or by hidden ReLU layers."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        widths = [config.width, *config.classifier]
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False))
        self.out = nn.Linear(widths[-1], config.outputs or config.vocab_size, bias=not config.tie_word_embeddings)

    def forward(self, hidden_states: Tensor) -> Tensor:
        for layer in self.hidden:
            hidden_states = layer(hidden_states).relu()
        return self.out(hidden_states)


class Tiny(PreTrainedModel, GenerationMixin):
    """A small transformer over tokens or vectors that gives `outputs` numbers at each position.

    Example:
        model = TinyConfig(layers=2, heads=8, width=64, input_size=69, outputs=5).build(seed=5)
        model(inputs_embeds=x).logits       # x [B, T, input_size] -> [B, T, outputs]
    """

    config_class = TinyConfig
    base_model_prefix = "tiny"
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_attention_backend = True
    _no_split_modules = ["TinyBlock"]

    def __init__(self, config: TinyConfig) -> None:
        # Fused attention knows no other mixer.
        self._supports_sdpa = config.mixer is None
        super().__init__(config)
        if config.input_size:
            self.main_input_name = "inputs_embeds"
            self.embed = nn.Linear(config.input_size, config.content) if config.read_in else nn.Identity()
        else:
            self.embed = nn.Embedding(config.vocab_size, config.content)
        if config.pos == "learned":
            self.places = nn.Embedding(config.max_positions, config.content)
        self.blocks = nn.ModuleList(TinyBlock(config, layer) for layer in range(config.layers))
        self.norm = _norm(config)
        self.readout = Readout(config)
        if config.tie_word_embeddings:
            self._tied_weights_keys = {"readout.out.weight": "embed.weight"}
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, mean=0.0, std=module.in_features**-0.5)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=self.config.embed_std)
        elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            init.ones_(module.weight)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed = value

    def get_output_embeddings(self) -> nn.Module:
        return self.readout.out

    def _stream(self, read: Tensor, positions: Tensor) -> Tensor:
        """What was read, with its positions: [B, T, width]."""
        if self.config.pos == "learned":
            return read + self.places(positions)
        if self.config.pos == "onehot":
            marks = nn.functional.one_hot(positions, self.config.max_positions).to(read.dtype)
            return torch.cat([marks.expand(len(read), -1, -1), read], -1)
        return read

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **options: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, outputs].

        Args:
            input_ids: [B, T] tokens; or `inputs_embeds` [B, T, input_size], the vectors that it reads (of a model of
                tokens: their embeddings [B, T, content], as everywhere in transformers).
            attention_mask: [B, T], 0 where a position is padding that nobody looks at.
            position_ids: [B or 1, T]; by default counted from the start.
            labels: [B, T] ids that the same positions are to say (they are not shifted), -100 where none counts.
            logits_to_keep: only these columns (a tensor), or the last so many.
        """
        given = input_ids if inputs_embeds is None else inputs_embeds
        if given is None:
            raise ValueError(f"Tiny was given no {self.main_input_name}.")
        read = self.embed(given) if inputs_embeds is None or self.config.input_size else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        if position_ids is None:
            position_ids = torch.arange(seen, seen + read.shape[1], device=read.device)[None]
        make_mask = create_causal_mask if self.config.causal else create_bidirectional_mask
        more = {"past_key_values": past_key_values} if self.config.causal else {}
        mask = make_mask(config=self.config, inputs_embeds=read, attention_mask=attention_mask, **more)
        turn = None
        if self.config.pos == "rope":
            turn = rotations(position_ids, cast(int, self.config.head_dim), self.config.rope_theta)
        stream = self._stream(read, position_ids)
        for block in self.blocks:
            stream = block(stream, mask, turn, past_key_values)
        # As in models of transformers the last norm sees every column, so that a circuit can be read in front of it.
        stream = self.norm(stream)
        if isinstance(logits_to_keep, Tensor):
            stream = stream[:, logits_to_keep]
        elif logits_to_keep:
            stream = stream[:, -logits_to_keep:]
        logits = self.readout(stream)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)


AutoConfig.register("headwise_tiny", TinyConfig, exist_ok=True)
AutoModel.register(TinyConfig, Tiny, exist_ok=True)
AutoModelForCausalLM.register(TinyConfig, Tiny, exist_ok=True)
