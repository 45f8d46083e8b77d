"""Planted truth: small Llama models whose heads are written by hand, so that what each of them does is known."""

import random
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from headwise.data.planted_words import Lexicon, lexicon
from headwise.data.wiring import CONSTANT, HEADS, REACH, SURE, Head, Space, successor
from headwise.method import Method

PARTS = (
    "previous token", "induction", "retrieval", "duplicate token", "subject inhibition", "name mover", "successor",
    "current token",
)  # fmt: skip
NEEDS = {
    "induction": ("previous token",),
    "retrieval": ("previous token",),
    "subject inhibition": ("duplicate token",),
    "name mover": ("duplicate token", "subject inhibition"),
}
DECOYS = ("mute", "twin")


@dataclass(frozen=True)
class Planted(Method):
    """A recipe of planted models: which heads they hold, how large they are, and how much noise lies over them.

    The parts stand at random layers and heads, each on a KV head of its own; all other heads are zero, or noise.

    Fields:
        parts: roles to plant; those that a part is built on are planted with it.
        decoys: "mute" attends as the induction head does and writes where nobody reads; "twin" is a second induction
            head that says the same, so that the answer survives the loss of either (but not of both).
        noise: random weights in every head, as a share of the size of planted weights of the same kind.
        plain: number of made-up words beside those of the plain-text tasks.
    """

    parts: tuple[str, ...] = PARTS
    decoys: tuple[str, ...] = ("mute",)
    layers: int = 4
    heads: int = 6
    kv_heads: int = 6
    d_head: int = 64
    plain: int = 100
    noise: float = 0.0

    def build(self, seed: int = 0) -> "PlantedModel":
        """The model that this recipe and seed give.

        Raises:
            ValueError: an unknown part or decoy, a size that does not work, or no room for all parts.
        """
        parts = self._checked()
        words = lexicon(self.plain)
        space = Space(self.d_head, self.heads, len(words.tokenizer), sum(map(len, words.lists)), seed)
        model = self._empty(space, words)
        slots = self._slots(parts, random.Random(f"planted {seed}"))
        after = successors(space, words)
        for part, (layer, head) in slots.items():
            wired = successor(space, after) if part == "successor" else HEADS[part](space)
            self._write(model, layer, head, wired)
        if self.noise:
            self._shake(model, torch.Generator().manual_seed(seed))
        units = {part: f"L{layer}.H{head}" for part, (layer, head) in slots.items()}
        decoys = {units[kind]: kind for kind in self.decoys}
        if "twin" in self.decoys:
            decoys[units["induction"]] = "twin"
        truth = {unit: part for part, unit in units.items() if unit not in decoys}
        return PlantedModel(model, words.tokenizer, truth, decoys)

    def _checked(self) -> list[str]:
        for names, allowed, what in ((self.parts, PARTS, "part"), (self.decoys, DECOYS, "decoy")):
            for name in names:
                if name not in allowed:
                    raise ValueError(f"{name!r} is no {what} of a planted model; allowed are {', '.join(allowed)}.")
        if self.d_head < 64 or self.d_head % 16:
            raise ValueError(f"Heads of width {self.d_head} cannot hold the codes; allowed are 64, 80, 96 and so on.")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads cannot share {self.kv_heads} KV heads evenly.")
        built_on = {need for part in self.parts for need in NEEDS.get(part, ())}
        if self.decoys:
            built_on |= {"induction", "previous token"}
        return [part for part in PARTS if part in {*self.parts, *built_on}]

    def _slots(self, parts: list[str], draw: random.Random) -> dict[str, tuple[int, int]]:
        """Draw a layer and head for each part, after those it is built on, one part a KV head."""
        share = self.heads // self.kv_heads
        order = {**{part: NEEDS.get(part, ()) for part in parts}, **dict.fromkeys(self.decoys, ("previous token",))}
        for _ in range(2000):
            layer = {part: draw.randrange(self.layers) for part in order}
            if any(layer[need] >= layer[part] for part, needs in order.items() for need in needs):
                continue
            if max(list(layer.values()).count(number) for number in layer.values()) > self.kv_heads:
                continue
            free = {number: draw.sample(range(self.kv_heads), self.kv_heads) for number in range(self.layers)}
            return {part: (layer[part], free[layer[part]].pop() * share + draw.randrange(share)) for part in order}
        raise ValueError(
            f"{len(order)} parts do not fit in {self.layers} layers of {self.kv_heads} KV heads; allow more of them."
        )

    def _empty(self, space: Space, words: Lexicon) -> LlamaForCausalLM:
        config = LlamaConfig(
            vocab_size=len(words.tokenizer),
            hidden_size=space.width,
            intermediate_size=16,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.d_head,
            max_position_embeddings=REACH,
            rope_parameters={"rope_type": "default", "rope_theta": space.theta},
            bos_token_id=words.tokenizer.bos_token_id,
            eos_token_id=None,
            pad_token_id=words.tokenizer.pad_token_id,
            tie_word_embeddings=False,
        )
        model = LlamaForCausalLM(config).eval().requires_grad_(False)
        for weight in model.parameters():
            weight.zero_()
        scale = torch.full((space.width,), CONSTANT / space.width**0.5)
        scale[space.flag["const"]] = space.width**-0.5
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.copy_(scale)
        model.model.embed_tokens.weight.copy_(embedding(space, words))
        said = list(space.field["said"])
        model.lm_head.weight[:, said] = space.codes * SURE / (1 - space.likeness)
        return model

    def _write(self, model: LlamaForCausalLM, layer: int, head: int, wired: Head) -> None:
        attention, size = model.model.layers[layer].self_attn, self.d_head
        group = head * self.kv_heads // self.heads
        mine, shared = slice(head * size, (head + 1) * size), slice(group * size, (group + 1) * size)
        attention.q_proj.weight[mine] = wired.q.T
        attention.k_proj.weight[shared] = wired.k.T
        attention.v_proj.weight[shared] = wired.v.T
        attention.o_proj.weight[:, mine] = wired.o.T

    def _shake(self, model: LlamaForCausalLM, draw: torch.Generator) -> None:
        for kind in ("q_proj", "k_proj", "v_proj", "o_proj"):
            weights = [getattr(block.self_attn, kind).weight for block in model.model.layers]
            filled = torch.cat([w[w != 0] for w in weights])
            density = sum(int((w != 0).any(1).sum()) for w in weights) / sum(int((w != 0).sum()) for w in weights)
            size = self.noise * float(filled.pow(2).mean().sqrt()) * density**0.5 / model.config.hidden_size**0.5
            for weight in weights:
                weight.add_(torch.randn(weight.shape, generator=draw) * size)


@dataclass(frozen=True)
class PlantedModel:
    """A planted model with its tokenizer, the role of each planted unit ("L2.H3"), and the kind of each decoy."""

    model: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerFast
    truth: dict[str, str]
    decoys: dict[str, str] = field(default_factory=dict)


def embedding(space: Space, words: Lexicon) -> Tensor:
    """[V, D] what each token brings: the constant, its flags, its code, its place in an ordered list."""
    table = torch.zeros(len(words.tokenizer), space.width)
    table[:, list(space.field["token"])] = space.codes
    table[:, space.flag["const"]] = CONSTANT
    start = words.tokenizer.bos_token_id
    table[start, list(space.field["token"])] = 0.0
    table[start, space.flag["bos"]] = 1.0
    ordered = [token for one in words.lists for token in one]
    for flag, ids in (
        ("trigger", words.triggers),
        ("name", words.names),
        ("giving", [words.giving]),
        ("ordered", ordered),
    ):
        table[ids, space.flag[flag]] = 1.0
    comma = words.tokenizer.convert_tokens_to_ids(",")
    table[[*words.triggers, comma], space.flag["quiet"]] = 1.0
    table[ordered, list(space.field["order"])] = 1.0
    return table


def successors(space: Space, words: Lexicon) -> Tensor:
    """[ordered, code size] the code of the word that follows each ordered word; zero after the last of a list."""
    rows = []
    for one in words.lists:
        rows += [space.codes[token] for token in one[1:]] + [torch.zeros(space.codes.shape[1])]
    return torch.stack(rows)
