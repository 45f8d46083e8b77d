"""Small heads that guess the model's next tokens from its last hidden states, and how a draft is made of their guesses.

Words used here: the model has just chosen token x(t+1) from its state h(t). Guess number i, from 1, is what the state
h(t+i) will be, from h(t) and the tokens up to x(t+i); the model's own unembedding, which stays as it is and is shared,
turns it into token x(t+1+i).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, silu, smooth_l1_loss
from transformers import MistralConfig, MistralModel, PreTrainedModel

from headwise.drafting import Draft, Drafter, News, Reading
from headwise.method import load
from headwise.models import fingerprint, name_of
from headwise.verifying import DraftMethod
from headwise.writing import write_aside

FORMAT = "headwise draft heads 1"
# Tokens before the newest that every head may look at.
TAIL = 2
CONFIG, WEIGHTS = "config.json", "heads.safetensors"


@dataclass(frozen=True)
class Lesson:
    """What heads learn from.

    Fields:
        soft: the model's own distribution over the next token, instead of the token that was chosen.
        hidden: weight of the distance between guessed and true states.
        decay: each later guess counts that much of the one before.
    """

    soft: bool = False
    hidden: float = 0.0
    decay: float = 0.8


class DraftHeads(nn.Module):
    """Base of draft heads; `step` says how one guess is made.

    Args:
        method: whose heads they are; kept with them.
        model: the model whose tokens are guessed; its embedding and unembedding are used and never trained.
        count: guesses, one after the other.
        reach: latest states that are looked at.
    """

    lesson: ClassVar[Lesson] = Lesson()

    def __init__(self, method: "HeadsMethod", model: PreTrainedModel, count: int, reach: int = 1) -> None:
        super().__init__()
        if count < 1:
            raise ValueError(f"{count} heads were asked for; allowed is 1 or more.")
        # Inside a tuple they are no submodules: neither saved nor trained.
        self._model = (model.get_input_embeddings(), model.get_output_embeddings())
        self.method, self.count, self.reach = method, count, reach
        self.vocabulary, self.width = model.get_output_embeddings().weight.shape
        self.made_for = {"model": name_of(model), "fingerprint": fingerprint(model)}

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids [...] -> the model's embeddings [..., D]."""
        return self._model[0](ids).detach()

    def logits(self, guess: Tensor) -> Tensor:
        """Guessed states [..., D] -> logits [..., V]."""
        unembedding = self._model[1]
        bias = getattr(unembedding, "bias", None)
        return linear(guess, unembedding.weight.detach(), None if bias is None else bias.detach())

    def starts(self, states: Tensor, real: Tensor) -> Tensor:
        """What guesses begin with, at every column: states [B, T, D] and which columns are real [B, T] -> [B, T, D]."""
        return states

    def step(self, i: int, start: Tensor, tokens: Tensor) -> Tensor:
        """Guess number i: start [..., D] and embeddings of x(t-1), x(t), ..., x(t+i) [..., TAIL + i, D] -> [..., D]."""
        raise TypeError(f"{type(self).__name__} does not say how it guesses.")

    def context(self, states: Tensor, real: Tensor) -> Any:
        """What all guesses of one draft share, from the latest states [R, W, D] of each row."""
        return self.starts(states, real)[:, -1]

    def guess(self, i: int, context: Any, tokens: Tensor) -> Tensor:
        """Guess number i for F branches of each row: embeddings [R, F, TAIL + i, D] -> [R, F, D]."""
        return self.step(i, context[:, None].expand(*tokens.shape[:2], -1), tokens)

    def guesses(self, states: Tensor, ids: Tensor) -> list[Tensor]:
        """All guesses at once, for training, from whole texts without padding.

        Args:
            states: [B, T, D] of the tokens ids [B, T].

        Returns:
            `count` tensors [B, P, D], P = T - count - TAIL; place p stands at column t = p + TAIL - 1.
        """
        places = self._places(ids)
        start = self.starts(states, torch.ones_like(ids, dtype=torch.bool))[:, TAIL - 1 : TAIL - 1 + places]
        tokens = self.embed(ids).unfold(1, TAIL + self.count, 1)[:, :places].transpose(-1, -2)
        return [self.step(i, start, tokens[:, :, : TAIL + i]) for i in range(1, self.count + 1)]

    def _places(self, ids: Tensor) -> int:
        places = ids.shape[1] - self.count - TAIL
        if places < 1:
            raise ValueError(f"Texts of {ids.shape[1]} tokens teach {self.count} heads nothing; use longer ones.")
        return places

    def loss(self, states: Tensor, ids: Tensor) -> Tensor:
        """The loss of all guesses on texts: states [B, T, D] of ids [B, T]."""
        total, weights = states.new_zeros(()), 0.0
        for i, guess in enumerate(self.guesses(states, ids), start=1):
            places, weight = guess.shape[1], self.lesson.decay**i
            truth = states[:, TAIL - 1 + i : TAIL - 1 + i + places]
            said = self.logits(guess).flatten(0, 1).float()
            target = ids[:, TAIL + i : TAIL + i + places].flatten()
            if self.lesson.soft:
                with torch.no_grad():
                    target = self.logits(truth).flatten(0, 1).float().softmax(-1)
            total = total + weight * cross_entropy(said, target)
            if self.lesson.hidden:
                total = total + weight * self.lesson.hidden * smooth_l1_loss(guess, truth)
            weights += weight
        return total / weights

    @torch.no_grad()
    def accuracy(self, states: Tensor, ids: Tensor) -> list[float]:
        """For each guess, the share of places where the token that it ranks first is the one that came."""
        right = []
        for i, guess in enumerate(self.guesses(states, ids), start=1):
            target = ids[:, TAIL + i : TAIL + i + guess.shape[1]]
            right.append(float((self.logits(guess).argmax(-1) == target).float().mean()))
        return right

    def save_pretrained(self, folder: "str | Path") -> None:
        """Write heads.safetensors and config.json."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        values = {name: value.detach().contiguous().cpu() for name, value in self.state_dict().items()}
        write_aside(folder / WEIGHTS, lambda path: save_file(values, path))
        facts = {"format": FORMAT, **self.method.identity(), **self.made_for}
        facts |= {"vocabulary": self.vocabulary, "width": self.width}
        text = json.dumps(facts, indent=2) + "\n"
        write_aside(folder / CONFIG, lambda path: path.write_text(text, encoding="utf-8"))

    @staticmethod
    def from_pretrained(folder: "str | Path", model: PreTrainedModel) -> "DraftHeads":
        """Heads that `save_pretrained` wrote, for the model they were trained with.

        Raises:
            ValueError: the folder holds no heads, or heads of another model, vocabulary or width.
        """
        facts = _facts(Path(folder))
        vocabulary, width = model.get_output_embeddings().weight.shape
        for name, have in (("vocabulary", vocabulary), ("width", width)):
            if facts[name] != have:
                raise ValueError(
                    f"The heads in {folder} guess for a {name} of {facts[name]}, and this model has one of {have}."
                )
        if facts["fingerprint"] != fingerprint(model):
            raise ValueError(
                f"The heads in {folder} were trained with other weights ({facts['model']}, {facts['fingerprint']}) "
                f"than these ({name_of(model)}, {fingerprint(model)}). Train others with `headwise draft train`."
            )
        method = load(facts["name"])(**{key: _tuples(value) for key, value in facts["fields"].items()})
        heads = method.untrained(model)
        try:
            heads.load_state_dict(load_file(Path(folder) / WEIGHTS))
        except (OSError, SafetensorError, RuntimeError) as problem:
            raise ValueError(f"{folder} holds no draft heads: {' '.join(str(problem).split())}.") from problem
        return heads.to(model.device, model.dtype).eval()


def _facts(folder: Path) -> dict[str, Any]:
    try:
        facts = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise ValueError(f"{folder} holds no draft heads: {problem}.") from problem
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise ValueError(f"{folder} holds no draft heads: its {CONFIG} was written by something else.")
    return facts


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@dataclass(frozen=True)
class HeadsMethod(DraftMethod):
    """Base of methods that draft with trained heads; each has the fields `path` and `tree`."""

    path: str = ""
    tree: tuple[int, ...] = (3, 2, 1, 1)

    def __post_init__(self) -> None:
        if not self.tree or min(self.tree) < 1:
            raise ValueError(f"tree is {self.tree}; it needs one number of branches, 1 or more, for each guess.")

    def untrained(self, model: PreTrainedModel) -> DraftHeads:
        """New heads for this model, one for each level of the tree."""
        raise TypeError(f"{type(self).__name__} does not say what its heads are.")

    def drafter(self, model: PreTrainedModel) -> "HeadDrafter":
        """A drafter with the heads in the folder `path`. Raises ValueError where they are not for this model."""
        if not self.path:
            raise ValueError(
                f"{type(self).__name__} needs heads trained for this model: make them with `headwise draft train`, and "
                "give their folder as `path`."
            )
        return self.drafting(DraftHeads.from_pretrained(self.path, model))

    def drafting(self, heads: DraftHeads) -> "HeadDrafter":
        """A drafter with these heads."""
        return HeadDrafter(heads, self.tree)


class HeadDrafter(Drafter):
    """Drafts a tree: at each depth every branch goes on with its likeliest tokens."""

    wants_hidden = True

    def __init__(self, heads: DraftHeads, tree: tuple[int, ...]) -> None:
        self.heads, self.tree = heads, tree[: heads.count]
        self.name = type(heads.method).__name__
        self.tokens: dict[int, list[int]] = {}
        self.states: dict[int, Tensor] = {}

    def begin(self, model: PreTrainedModel, texts: list[list[int]], sampling: bool) -> None:
        """Forget what was before."""
        vocabulary = model.get_output_embeddings().weight.shape[0]
        if vocabulary != self.heads.vocabulary:
            raise ValueError(
                f"{self.name}'s heads guess among {self.heads.vocabulary} tokens, and this model has {vocabulary}."
            )
        self.tokens = {row: text[-TAIL - 1 :] for row, text in enumerate(texts)}
        self.states = {}

    def accept(self, news: Mapping[int, News], read: "Reading | None" = None) -> None:
        """Keep the latest tokens and states."""
        for row, one in news.items():
            self.tokens[row] = (self.tokens[row] + one.tokens)[-TAIL - 1 :]
            had = self.states.get(row)
            states = one.hidden if had is None else torch.cat([had, one.hidden])
            self.states[row] = states[-self.heads.reach :]

    @torch.no_grad()
    def propose(self, rooms: Mapping[int, int]) -> dict[int, Draft]:
        """One tree for each row."""
        rows, device = list(rooms), next(iter(self.states.values())).device
        kept = [self.states[row] for row in rows]
        wide = max(map(len, kept))
        states = torch.stack([nn.functional.pad(one, (0, 0, wide - len(one), 0)) for one in kept])
        real = torch.tensor([[False] * (wide - len(one)) + [True] * len(one) for one in kept], device=device)
        context = self.heads.context(states, real)
        last = [[self.tokens[row][0]] * (TAIL + 1 - len(self.tokens[row])) + self.tokens[row] for row in rows]
        tokens = self.heads.embed(torch.tensor(last, device=device))[:, None]
        found: list[list[int]] = [[] for _ in rows]
        parents, level = [], [-1]
        for i, branches in enumerate(self.tree[: max(rooms.values())], start=1):
            chosen = self.heads.logits(self.heads.guess(i, context, tokens)).topk(branches, -1).indices
            before = len(parents)
            parents += [parent for parent in level for _ in range(branches)]
            level = list(range(before, len(parents)))
            for own, new in zip(found, chosen.flatten(1).tolist(), strict=True):
                own += new
            new = self.heads.embed(chosen.flatten(1))[:, :, None]
            tokens = torch.cat([tokens.repeat_interleave(branches, 1), new], 2)
        tree = None if all(parent == place - 1 for place, parent in enumerate(parents)) else parents
        return {row: Draft(own, tree, source=self.name) for row, own in zip(rows, found, strict=True)}


class ResBlock(nn.Module):
    """x + SiLU(W x + b); at first it changes nothing."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + silu(self.linear(x))


def res_blocks(width: int, layers: int) -> nn.Sequential:
    """So many blocks one after the other, each with weights of its own."""
    return nn.Sequential(*[ResBlock(width) for _ in range(layers)])


class Joined(nn.Module):
    """A residual block that takes a state and the tokens after it: at first the state goes through unchanged."""

    def __init__(self, width: int, tokens: int) -> None:
        super().__init__()
        self.keep, self.change = (nn.Linear((tokens + 1) * width, width, bias=b) for b in (False, True))
        nn.init.zeros_(self.keep.weight)
        nn.init.eye_(self.keep.weight[:, :width])
        nn.init.zeros_(self.change.weight)
        nn.init.zeros_(self.change.bias)

    def forward(self, state: Tensor, tokens: Tensor) -> Tensor:
        """From a state [..., D] and tokens [..., n, D] to a state [..., D]."""
        both = torch.cat([state, tokens.flatten(-2)], -1)
        return self.keep(both) + silu(self.change(both))


class HydraHeads(DraftHeads):
    """Head i reads the state and every token since; with `prefix`, the state after one more layer over all states."""

    def __init__(self, method: HeadsMethod, model: PreTrainedModel, layers: int, prefix: bool, reach: int) -> None:
        super().__init__(method, model, len(method.tree), reach)
        numbers = range(1, self.count + 1)
        self.joins = nn.ModuleList(Joined(self.width, i) for i in numbers)
        self.blocks = nn.ModuleList(res_blocks(self.width, layers - 1) for _ in numbers)
        self.prefix = Context(self.width, 1, reach) if prefix else None

    def starts(self, states: Tensor, real: Tensor) -> Tensor:
        """The states themselves, or with what the prefix layer adds."""
        return states if self.prefix is None else states + self.prefix(states, real)

    def step(self, i: int, start: Tensor, tokens: Tensor) -> Tensor:
        """Tokens since the state, x(t+1) to x(t+i), side by side with it."""
        return self.blocks[i - 1](self.joins[i - 1](start, tokens[..., TAIL:, :]))


class Context(nn.Module):
    """Transformer layers of transformers' own over the model's latest states; at first they add nothing."""

    def __init__(self, width: int, layers: int, reach: int) -> None:
        super().__init__()
        self.body = MistralModel(small_config(width, layers, reach))
        self.body.embed_tokens = None
        self.out = nn.Linear(width, width, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, states: Tensor, real: Tensor) -> Tensor:
        """From states [B, T, D], of which `real` [B, T] count, to [B, T, D]; a state sees those within the reach."""
        out = self.body(inputs_embeds=states, attention_mask=real.long(), use_cache=False)
        return self.out(out.last_hidden_state)


def small_config(width: int, layers: int, reach: int) -> MistralConfig:
    """Layers as wide as the model, with heads of 64 dimensions where that divides it."""
    heads = max(1, width // 64)
    while width % heads or (width // heads) % 2:
        heads -= 1
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers, "vocab_size": 1}
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return MistralConfig(num_attention_heads=heads, num_key_value_heads=heads, sliding_window=reach, **sizes, **ends)
