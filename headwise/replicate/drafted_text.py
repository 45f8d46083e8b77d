"""A small writer of real text, trained here letter by letter, and what draft heads for it are worth.

The writer is a plain Llama over the characters of the reference of the Python language. It is kept in headwise's
folder, so that the replications that draft for it train it once.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from headwise.data.reference import digest, paragraphs
from headwise.decode import Medusa
from headwise.draft_heads import HeadsMethod
from headwise.draft_training import self_written, states_after, train
from headwise.drafting import Drafter
from headwise.progress import hidden
from headwise.stats import sign_flip
from headwise.verifying import Verifying
from headwise.writing import home, write_aside

WIDTH, LAYERS, STEPS, LENGTH, TREE = 96, 3, 500, 96, (3, 2, 1, 1)
PROMPT, NEW = 32, 64


def letters() -> Tensor:
    """The text as numbers of its characters."""
    text = "\n\n".join(paragraphs())
    order = {letter: place for place, letter in enumerate(sorted(set(text)))}
    return torch.tensor([order[letter] for letter in text])


def windows(text: Tensor, rows: int, length: int, generator: torch.Generator) -> Tensor:
    """[rows, length] pieces of the text, drawn at random."""
    starts = torch.randint(len(text) - length, (rows,), generator=generator)
    return torch.stack([text[start : start + length] for start in starts.tolist()])


def writer(seed: int = 0) -> tuple[LlamaForCausalLM, Tensor, Tensor]:
    """The model, the text that it was trained on, and the last tenth, which it has not seen."""
    text = letters()
    cut = len(text) * 9 // 10
    torch.manual_seed(seed)
    size = {"hidden_size": WIDTH, "intermediate_size": 3 * WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 3}
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = LlamaConfig(vocab_size=int(text.max()) + 1, **size, **ends, initializer_range=0.05)
    model = LlamaForCausalLM(config)
    kept = home() / "trained" / f"writer-{seed}-{WIDTH}x{LAYERS}-{STEPS}-{digest(paragraphs())}.safetensors"
    if kept.is_file():
        model.load_state_dict(load_file(kept))
    else:
        _learn(model, text[:cut], seed)
        write_aside(kept, lambda path: save_file(model.state_dict(), path))
    return model.eval().requires_grad_(False), text[:cut], text[cut:]


def _learn(model: LlamaForCausalLM, text: Tensor, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1.0, (s + 1) / 30) * (1.02 - s / STEPS))
    for _ in tqdm(range(STEPS), desc="a writer of text", disable=hidden(), leave=False):
        ids = windows(text, 16, LENGTH, draw)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


@dataclass
class Trial:
    """What drafters gained: {name: [n] tokens a pass of each prompt}, and whether all text was the same."""

    per_pass: dict[str, np.ndarray] = field(default_factory=dict)
    accuracy: dict[str, list[float]] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    same: bool = True

    def mean(self, name: str) -> float:
        """Tokens a pass, mean over prompts."""
        return float(self.per_pass[name].mean())

    def best_of(self, names: Iterable[str]) -> str:
        """The one with the most tokens a pass."""
        return max(names, key=self.mean)

    def p(self, better: str, worse: str, seed: int) -> float:
        """Paired permutation test: how often would chance give a gain so large?"""
        return sign_flip(self.per_pass[better] - self.per_pass[worse], seed=seed)

    def numbers(self) -> dict:
        """Everything, for the record."""
        means = {name: self.mean(name) for name in self.per_pass}
        return {"tokens a pass": means, "accuracy": self.accuracy, "parameters": self.parameters, "same": self.same}


def medusas() -> dict[str, HeadsMethod]:
    """Medusa as in its paper, and two deeper ones: for the writer, Chimera and Clover lie between them in weights."""
    return {"Medusa": Medusa(tree=TREE)} | {f"Medusa of {n} layers": Medusa(tree=TREE, layers=n) for n in (5, 6)}


def trial(methods: dict[str, HeadsMethod], drafters: dict[str, Drafter], seed: int, full: bool, name: str) -> Trial:
    """Train all heads on the same self-written texts for as many steps, and draft greedy text with each.

    Args:
        methods: whose heads are trained.
        drafters: others that are tried beside them.
        full: more steps and prompts.
    """
    model, text, held = writer(seed)
    steps, prompts = (1000, 96) if full else (300, 32)
    draw = torch.Generator().manual_seed(seed + 1)
    ids = self_written(model, windows(text, 192, PROMPT, draw), NEW, temperature=0.5, seed=seed, rows=64)
    states = states_after(model, ids)
    cut = len(ids) * 7 // 8
    found, made = Trial(), dict(drafters)
    for key, method in methods.items():
        torch.manual_seed(seed)
        heads = method.untrained(model)
        train(heads, states[:cut], ids[:cut], steps, rate=2e-3, rows=8, seed=seed, name=f"{name} {key}")
        found.accuracy[key] = heads.accuracy(states[cut:], ids[cut:])
        found.parameters[key] = sum(p.numel() for p in heads.parameters())
        made[key] = method.drafting(heads)
    asked = windows(held, prompts, PROMPT, draw)
    options = {"max_new_tokens": NEW, "do_sample": False}
    bar = tqdm(total=len(made) * prompts, desc=f"{name} drafting", disable=hidden(), leave=False)
    plain = model.generate(asked, attention_mask=torch.ones_like(asked), **options)
    for key, drafter in made.items():
        gained = []
        for row in range(prompts):
            one = asked[row : row + 1]
            loop = Verifying(drafter)
            said = model.generate(one, attention_mask=torch.ones_like(one), custom_generate=loop, **options)
            found.same &= bool(torch.equal(said[0], plain[row]))
            gained.append(loop.stats.per_pass)
            bar.update()
        found.per_pass[key] = np.array(gained)
    bar.close()
    return found
