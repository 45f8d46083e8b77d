"""How Does Attention Work in Vision Transformers? A Visual Analytics Attempt. Li et al., 2023. arXiv:2303.13731

Row s112 of the mission. A small vision transformer is trained here on scikit-learn's digits; each head's importance
is what the development images lose without it; then heads are removed for good, in that order, on other images. Apart
from that, an autoencoder must tell constructed attention maps apart by their kind.
"""

import random
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import ViTConfig, ViTForImageClassification

from headwise.data import DigitImages
from headwise.do import Zero, do
from headwise.heads import ImportanceFlips, ImportanceLoss, ImportanceProbability
from headwise.progress import hidden
from headwise.replicate import Outcome, Replication, settle
from headwise.stats import spearman
from headwise.task import Batch, answer_logits, correct

KINDS = ("diagonal", "row", "content")


def trained_vit(batch: Batch, seed: int = 0, epochs: int = 40) -> ViTForImageClassification:
    """A vision transformer of 4 layers with 4 heads, trained on these images."""
    torch.manual_seed(seed)
    size = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.1}
    images = {"image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 10}
    model = ViTForImageClassification(ViTConfig(**size, **none, **images))
    pixels, labels = batch.inputs["pixel_values"], batch.answer[:, 0]
    steps = epochs * -(-len(pixels) // 64)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    model.train()
    for _ in tqdm(range(epochs), desc="s112 training", disable=hidden(), leave=False):
        for rows in torch.randperm(len(pixels)).split(64):
            loss = nn.functional.cross_entropy(model(pixel_values=pixels[rows]).logits, labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def constructed_maps(n: int, seed: int = 0, side: int = 4) -> tuple[Tensor, Tensor]:
    """Attention maps of three known kinds over side x side patches: [n, T, T] and their kinds [n].

    Diagonal looks at a patch at a fixed small offset, row at the patches of the own image row, content at patches that
    share a random class. Noise is mixed in at random strength.
    """
    generator = torch.Generator().manual_seed(seed)
    size, maps, kinds = side * side, [], []
    for i in range(n):
        kind = i % 3
        if kind == 0:
            offset = int(torch.randint(-2, 3, (1,), generator=generator))
            seen = torch.eye(size).roll(offset, 1)
        elif kind == 1:
            seen = torch.block_diag(*[torch.ones(side, side)] * side)
        else:
            classes = torch.randint(0, 4, (size,), generator=generator)
            seen = (classes[:, None] == classes[None, :]).float()
        noise = torch.rand(size, size, generator=generator)
        strength = 0.2 + 0.4 * float(torch.rand(1, generator=generator))
        seen = seen / seen.sum(-1, keepdim=True)
        maps.append((1 - strength) * seen + strength * noise / noise.sum(-1, keepdim=True))
        kinds.append(kind)
    return torch.stack(maps), torch.tensor(kinds)


def purity(clusters: np.ndarray, kinds: np.ndarray) -> float:
    """Share of maps that are of the most frequent kind of their cluster."""
    return sum(np.bincount(kinds[clusters == c]).max() for c in np.unique(clusters)) / len(kinds)


@dataclass(frozen=True)
class VitHeads(Replication):
    """Trains a vision transformer, ranks its heads by what is lost without each, and removes them in that order."""

    row: ClassVar[str] = "s112"
    claim: ClassVar[str] = (
        "Masking one head at a time tells which heads a vision transformer can lose, and an autoencoder "
        "sorts their maps."
    )
    paper: ClassVar[str] = "case studies with experts, no figure"
    changed: ClassVar[str] = (
        "a first training (small initial weights, shifted images) reached 85 % and failed; the training was "
        "then chosen on training images alone."
    )

    least_test: ClassVar[float] = 97.0
    least_kept: ClassVar[float] = 0.95
    least_lost: ClassVar[float] = 20.0
    least_purity: ClassVar[float] = 0.8

    def run(self, seed: int = 0) -> Outcome:
        """Importance comes from 200 development images of the test part, the figures from the 300 others."""
        torch_state = torch.random.get_rng_state()
        train = DigitImages(part="train").make(None, 1297, seed)
        model = trained_vit(train, seed, epochs=80 if self.full else 40)
        dev, held = DigitImages().make(None, 500, seed).split(0.4)
        detectors = {"loss": ImportanceLoss(), "probability": ImportanceProbability(), "flips": ImportanceFlips()}
        importance = {name: detector.score(model, dev) for name, detector in detectors.items()}
        by_loss = importance["loss"]
        order = by_loss.top(len(by_loss.table))
        half = len(order) // 2
        draw = random.Random(f"removal {seed}")
        removals = {"least": order[::-1], "most": order}
        removals |= {f"random {i}": draw.sample(order, len(order)) for i in range(5)}
        curves = {
            name: [self._without(model, held, units[:k]) for k in range(len(units))] for name, units in removals.items()
        }
        agreement = {
            name: spearman(by_loss.table["value"].to_numpy(), importance[name].table["value"].to_numpy())
            for name in ("probability", "flips")
        }
        sorted_maps = self._sorted(seed)
        torch.random.set_rng_state(torch_state)
        return self._judge(curves, half, agreement, sorted_maps, len(held), {"order": order})

    def _without(self, model, batch: Batch, units: list[str]) -> float:
        with torch.no_grad(), do(model, *[Zero(unit) for unit in units]):
            return 100 * float(correct(answer_logits(model, batch), replace(batch, foil=None)).mean())

    def _sorted(self, seed: int) -> dict[str, float]:
        """Purity of clusters: in the autoencoder's 4 numbers, in the raw maps, and with shuffled labels."""
        from sklearn.cluster import KMeans

        maps, kinds = constructed_maps(600 if self.full else 300, seed)
        flat = maps.flatten(1)
        flat = (flat - flat.mean(0)) / flat.std()
        torch.manual_seed(seed)
        width = flat.shape[1]
        encoder = nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, 4))
        decoder = nn.Sequential(nn.Linear(4, 64), nn.GELU(), nn.Linear(64, width))
        optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=2e-3)
        for _ in tqdm(range(600), desc="s112 autoencoder", disable=hidden(), leave=False):
            loss = (decoder(encoder(flat)) - flat).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            inside = encoder(flat).numpy()
        labels, found = kinds.numpy(), {}
        for name, space in (("autoencoder", inside), ("raw", flat.numpy())):
            clusters = KMeans(8, n_init=10, random_state=seed).fit_predict(space)
            found[name] = float(purity(clusters, labels))
            if name == "autoencoder":
                found["shuffled"] = float(purity(clusters, np.random.default_rng(seed).permutation(labels)))
        return found

    def _judge(self, curves, half: int, agreement, sorted_maps, n: int, extra) -> Outcome:
        whole = curves["least"][0]
        least, most = curves["least"][half], curves["most"][half]
        at_random = [curve[half] for name, curve in curves.items() if name.startswith("random")]
        checks = {
            f"without the less important half at least {100 * self.least_kept:.0f} % of the accuracy is left": least
            >= self.least_kept * whole,
            f"without the more important half at least {self.least_lost:.0f} points are lost": whole - most
            >= self.least_lost,
            f"the model reaches {self.least_test:.0f} %": whole >= self.least_test,
            f"the autoencoder's clusters have a purity above {self.least_purity}": sorted_maps["autoencoder"]
            > self.least_purity,
        }
        measured = (
            f"{whole:.1f} % of {n} held-out images; without the less important {half} of {2 * half} heads "
            f"{least:.1f} %, without the "
            f"more important {most:.1f} %; purity of map clusters {sorted_maps['autoencoder']:.2f}"
        )
        baseline = (
            f"without {half} random heads {sum(at_random) / len(at_random):.1f} % (5 draws, {min(at_random):.1f} to "
            f"{max(at_random):.1f}); purity of raw maps {sorted_maps['raw']:.2f}, of shuffled labels "
            f"{sorted_maps['shuffled']:.2f}"
        )
        numbers = {"curves": curves, "agreement_with_loss": agreement, "purity": sorted_maps, "held_out": n, **extra}
        return settle(measured, baseline, checks, numbers)
