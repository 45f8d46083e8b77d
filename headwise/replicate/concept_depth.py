"""Exploring Concept Depth: How Large Language Models Acquire Knowledge at Different Layers? Jin et al., 2024.
arXiv:2404.07066

Row s140 of the mission. Four concepts, thought to be of rising difficulty before any was measured: whether the last
word is a person or a thing; whether a sentence praises; whether a statement about a capital is true; and the same
where the statement may be denied. Words and countries of the tested prompts are none of those that were fitted on.
"""

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headwise.data.layout import encode, pad_id, start_ids
from headwise.data.words import CAPITALS, NAMES, NOUNS
from headwise.features import ConceptDepth as Probes
from headwise.features.concept_depth import depths
from headwise.models import open_model
from headwise.progress import hidden
from headwise.replicate import Outcome, Replication, settle
from headwise.task import Batch, pad_left

GOOD = (
    "great", "lovely", "wonderful", "brilliant", "delightful", "superb",
    "charming", "excellent", "pleasant", "splendid", "perfect", "beautiful",
)  # fmt: skip
BAD = (
    "awful", "terrible", "boring", "dreadful", "horrible", "clumsy",
    "poor", "disappointing", "dull", "ugly", "painful", "tedious",
)  # fmt: skip
FILMS = ("film", "book", "play", "meal", "song", "trip", "game", "house")
Row = tuple[str, int, int]


def kinds(draw: random.Random) -> list[Row]:
    """Is the last word a person or a thing?"""
    frames = ("Look at the picture of {}", "I was told about {}", "We spoke of {}")
    words = [(word, i) for i, group in enumerate((NAMES[:40], NOUNS[:40])) for word in group]
    return [(frame.format(word), label, i) for i, (word, label) in enumerate(words) for frame in frames]


def praise(draw: random.Random) -> list[Row]:
    """Does the sentence praise? Its last token is a stop."""
    words = [(word, label, i) for label, group in enumerate((BAD, GOOD)) for i, word in enumerate(group)]
    rows = []
    for word, label, i in words:
        for thing in FILMS:
            end = draw.choice(("we saw it on Monday.", "they told us so.", "that is what I think."))
            rows.append((f"The {thing} was {word}, {end}", label, i + 100 * label))
    return rows


def truth(draw: random.Random) -> list[Row]:
    """Is the statement true?"""
    frames = ("{} is the capital of {}.", "The city of {} is the capital of {}.")
    lands = list(CAPITALS)
    rows = []
    for i, land in enumerate(lands):
        other = draw.choice([one for one in lands if one != land])
        for frame in frames:
            rows += [(frame.format(CAPITALS[land], land), 1, i), (frame.format(CAPITALS[other], land), 0, i)]
    return rows


def denied(draw: random.Random) -> list[Row]:
    """Is the statement true, which may be the denial of one?"""
    rows = []
    for text, label, group in truth(draw):
        if text.startswith("The city"):
            rows.append((f"It is true that {text.replace('The city of ', '')}", label, group))
            rows.append((f"It is false that {text.replace('The city of ', '')}", 1 - label, group))
    return rows


CONCEPTS: dict[str, Callable[[random.Random], list[Row]]] = {
    "kind": kinds,
    "praise": praise,
    "truth": truth,
    "denied": denied,
}


def concept(tokenizer: PreTrainedTokenizerBase, name: str, most: int, seed: int, noise: str = "") -> Batch:
    """Prompts of one concept, their class as the answer, read at the last token; `noise` stands before each."""
    draw = random.Random(f"{name} {seed}")
    rows = CONCEPTS[name](draw)
    groups = sorted({group for *_, group in rows})
    kept = set(draw.sample(groups, min(len(groups), max(8, most * len(groups) // len(rows)))))
    rows = [row for row in rows if row[2] in kept]
    ids, mask = pad_left(
        [start_ids(tokenizer) + encode(tokenizer, f"{noise}{text}") for text, *_ in rows], pad_id(tokenizer)
    )
    return Batch(
        {"input_ids": ids, "attention_mask": mask},
        at=torch.full((len(rows), 1), ids.shape[1] - 1),
        answer=torch.tensor([[label] for _, label, _ in rows]),
        texts=[text for text, *_ in rows],
        about={"concept": name, "groups": [group for *_, group in rows]},
    )


@dataclass(frozen=True)
class ConceptDepth(Replication):
    """Probes every layer for four concepts: as the model is, behind noise, and with coarser weights."""

    row: ClassVar[str] = "s140"
    claim: ClassVar[str] = (
        "Simple concepts can be read from shallow layers and complex ones only from deeper layers; noise and coarse "
        "weights move them deeper."
    )
    paper: ClassVar[str] = "holds for Gemma, LLaMA and Qwen on nine data sets; noise and quantisation delay convergence"
    changed: ClassVar[str] = (
        "convergence was first the layer from which on accuracy stays near its best, which a fall in the last layer "
        "put beyond the model (1.03 for two concepts); it is now the first layer near the best. It was partly then too."
    )

    most: ClassVar[int] = 200
    least_known: ClassVar[float] = 0.65
    most_control: ClassVar[float] = 0.58
    bits: ClassVar[int] = 4

    def run(self, seed: int = 0) -> Outcome:
        """Three fits of the same probes."""
        model, tokenizer = open_model("default")
        most = 2 * self.most if self.full else self.most
        draw = random.Random(f"s140 {seed}")
        noise = "".join(draw.choice("bcdfghjklmnpqrstvwxz#%&") for _ in range(24)) + " "
        with tqdm(total=3, desc="s140", disable=hidden(), leave=False) as bar:
            settings = {}
            for name, one, before in (
                ("plain", model, ""),
                ("noise", model, noise),
                ("coarse", _coarser(model, self.bits), ""),
            ):
                batches = [concept(tokenizer, key, most, seed, before) for key in CONCEPTS]
                settings[name] = self._read(one, batches, seed)
                bar.update()
        return self._judge(settings)

    def _read(self, model: PreTrainedModel, batches: list[Batch], seed: int) -> dict:
        """By concept: best accuracy, largest control, depth of convergence with its 95 % interval over prompts."""
        reader = Probes(seed=seed).fit(model, batches)
        found = {}
        rng = np.random.default_rng(seed)
        for name, one in reader.found.items():
            right = reader.tables[f"{name}/right"].float()
            draws = []
            for _ in range(500):
                rows = torch.from_numpy(rng.integers(right.shape[1], size=right.shape[1]))
                draws.append(depths(right[:, rows].mean(1))["converges"])
            found[name] = {
                "converges": one["converges"],
                "interval": [float(np.quantile(draws, q)) for q in (0.025, 0.975)],
                "best": max(one["accuracy"]),
                "first": one["accuracy"][0],
                "control": float(np.mean(one["control"])),
                "accuracy": [round(v, 3) for v in one["accuracy"]],
                "tested": right.shape[1],
            }
        return found

    def _judge(self, settings: dict) -> Outcome:
        plain = settings["plain"]
        known = [name for name in CONCEPTS if plain[name]["best"] >= self.least_known]
        easy, hard = known[0], known[-1]
        later = [plain[a]["converges"] <= plain[b]["converges"] for a, b in zip(known, known[1:], strict=False)]
        moved = {
            kind: np.mean([settings[kind][name]["converges"] - plain[name]["converges"] for name in known])
            for kind in ("noise", "coarse")
        }
        control = max(one["control"] for one in plain.values())
        checks = {
            f"{easy} converges at a shallower layer than {hard}, their intervals apart": len(known) > 1
            and plain[easy]["interval"][1] < plain[hard]["interval"][0],
            "convergence is ordered as the concepts were": len(known) > 1 and all(later),
            f"probes of shuffled labels are right in at most {100 * self.most_control:.0f} %": control
            <= self.most_control,
            "behind noise convergence is as deep or deeper": moved["noise"] >= 0,
            f"with weights of {self.bits} bits it is as deep or deeper": moved["coarse"] >= 0,
        }
        parts = [
            f"{name} {one['converges']:.2f} ({one['interval'][0]:.2f} to {one['interval'][1]:.2f}; best "
            f"{100 * one['best']:.0f} %{'' if name in known else ', not known'})"
            for name, one in plain.items()
        ]
        measured = (
            f"depth of convergence: {'; '.join(parts)}; behind noise {moved['noise']:+.2f}, with {self.bits}-bit "
            f"weights {moved['coarse']:+.2f}"
        )
        baseline = f"shuffled labels: at most {100 * control:.0f} % right; behind the first layer " + ", ".join(
            f"{name} {100 * one['first']:.0f} %" for name, one in plain.items()
        )
        return settle(measured, baseline, checks, {**settings, "moved": {k: float(v) for k, v in moved.items()}})


@torch.no_grad()
def _coarser(model: PreTrainedModel, bits: int) -> PreTrainedModel:
    """A copy whose linear layers inside blocks are rounded to so many bits, a scale for each row."""
    coarse = copy.deepcopy(model)
    top = 2 ** (bits - 1) - 1
    for name, parameter in coarse.named_parameters():
        if parameter.ndim == 2 and ".layers." in name:
            scale = parameter.abs().amax(1, keepdim=True).clamp_min(1e-12) / top
            parameter.copy_((parameter / scale).round().clamp(-top - 1, top) * scale)
    return coarse
