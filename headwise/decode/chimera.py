"""Chimera: A Lossless Decoding Method for Accelerating Large Language Models Inference by Fusing all Tokens.
Zeng et al., 2024. arXiv:2402.15758
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel, PreTrainedModel

from headwise.draft_heads import TAIL, DraftHeads, HeadsMethod, Lesson, small_config


@dataclass(frozen=True)
class Chimera(HeadsMethod):
    """A small draft model: three tokens at a time, then one layer that looks back at the model's own states.

    Fields:
        path: folder of trained heads.
        tree: branches at each depth; as many guesses as depths.
        reach: latest states that are looked at.
    """

    row: ClassVar[str] = "s033"
    path: str = ""
    tree: tuple[int, ...] = (3, 2, 1, 1)
    reach: int = 64

    def untrained(self, model: PreTrainedModel) -> DraftHeads:
        """Heads that pass the state on nearly unchanged."""
        return ChimeraHeads(self, model)


class ChimeraHeads(DraftHeads):
    """Trigram encoder, full-context encoder, and one residual head for each guess."""

    lesson = Lesson(soft=True, hidden=1.0, decay=0.8)

    def __init__(self, method: Chimera, model: PreTrainedModel) -> None:
        super().__init__(method, model, len(method.tree), method.reach)
        width = self.width
        self.trigram = nn.Sequential(nn.Linear(3 * width, width), nn.SiLU(), nn.Linear(width, width))
        config = small_config(width, 1, method.reach).to_dict()
        self.body = LlamaModel(LlamaConfig(**{key: config[key] for key in _SHARED}))
        self.body.embed_tokens = None
        self.heads = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(self.count))
        for head in self.heads:
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    def triples(self, tokens: Tensor) -> Tensor:
        """Embeddings of x(t-1), x(t), ..., x(t+i) [..., TAIL + i, D] -> one state a guessed token [..., i, D]."""
        return self.trigram(tokens.unfold(-2, 3, 1).transpose(-1, -2).flatten(-2))

    def context(self, states: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """The latest states, and which of them are real."""
        return states, real

    def guess(self, i: int, context: tuple[Tensor, Tensor], tokens: Tensor) -> Tensor:
        """Each branch reads the states and its own tokens."""
        states, real = context
        rows, branches, width = *tokens.shape[:2], states.shape[1]
        drafted = self.triples(tokens).flatten(0, 1)
        text = torch.cat([states.repeat_interleave(branches, 0), drafted], 1)
        seen = nn.functional.pad(real.repeat_interleave(branches, 0), (0, i), value=True)
        order = torch.ones(width + i, width + i, dtype=torch.bool, device=states.device).tril()
        places = torch.arange(width + i, device=states.device).expand(len(text), -1)
        read = self._read(text, order & seen[:, None], places)[:, -1].unflatten(0, (rows, branches))
        return self._head(i, states[:, -1:].expand_as(read), read)

    def guesses(self, states: Tensor, ids: Tensor) -> list[Tensor]:
        """All places at once: a drafted token sees the states up to its own place, and the tokens of its own draft."""
        places, length, n = self._places(ids), ids.shape[1], self.count
        device = ids.device
        tokens = self.embed(ids).unfold(1, TAIL + n, 1)[:, :places].transpose(-1, -2)
        drafted = self.triples(tokens)
        text = torch.cat([states, drafted.flatten(1, 2)], 1)
        # Where each column stands: at its place in the text; of which draft it is, and the last state that draft sees.
        begin = torch.arange(places, device=device) + TAIL - 1
        at = torch.cat([torch.arange(length, device=device), (begin[:, None] + torch.arange(1, n + 1)).flatten()])
        last = torch.cat([torch.arange(length, device=device), begin.repeat_interleave(n)])
        draft = torch.cat([at.new_full((length,), -1), torch.arange(places, device=device).repeat_interleave(n)])
        to_state = (draft == -1) & (at <= last[:, None]) & (at > last[:, None] - self.reach)
        to_draft = (draft == draft[:, None]) & (draft != -1) & (at <= at[:, None])
        read = self._read(text, (to_state | to_draft).expand(len(ids), -1, -1), at.expand(len(ids), -1))
        read = read[:, length:].unflatten(1, (places, n))
        return [self._head(i, states[:, begin], read[:, :, i - 1]) for i in range(1, n + 1)]

    def _read(self, text: Tensor, seen: Tensor, places: Tensor) -> Tensor:
        mask = torch.zeros(seen.shape, dtype=text.dtype, device=text.device)
        mask = mask.masked_fill(~seen, torch.finfo(text.dtype).min)[:, None]
        return self.body(
            inputs_embeds=text, attention_mask=mask, position_ids=places, use_cache=False
        ).last_hidden_state

    def _head(self, i: int, state: Tensor, read: Tensor) -> Tensor:
        return state + self.heads[i - 1](torch.cat([state, read], -1))


_SHARED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "bos_token_id",
    "eos_token_id",
)
