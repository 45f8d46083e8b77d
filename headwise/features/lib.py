"""The Local Interaction Basis: Identifying Computationally-Relevant and Sparsely Interacting Features in Neural
Networks. Bushnaq et al., 2024. arXiv:2405.10928

Row s024 of the mission.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from headwise.direct import predicts
from headwise.do import Patch, do
from headwise.reader import FeatureMethod, Map, Reader, layers_of, states
from headwise.tap import tap
from headwise.task import Batch, answer_logits


@dataclass(frozen=True)
class LIB(FeatureMethod):
    """At each place a basis of what matters behind it: principal axes, turned so that the Jacobian's parts are apart.

    Activations are centred and whitened, axes without variance dropped. In that space the axes are the right singular
    vectors of the Jacobian to the next place's basis (to the logits at the end), over all prompts; each is as long as
    its singular value, and those of no length are dropped. Places see each other at the columns `at` only.

    Fields:
        places: sites of the residual stream in the order of the model; behind every layer by default.
        probes: gradients for each part of the prompts; where the next basis has no more directions, one for each of
            them, else along random ones.
        drop: what is left out, as a share of the largest variance, or of the largest squared singular value.
        rows: prompts in one part.
    """

    row: ClassVar[str] = "s024"
    places: tuple[str, ...] = ()
    probes: int = 16
    drop: float = 1e-6
    rows: int = 32
    seed: int = 0

    def fit(self, model: PreTrainedModel, batches: Sequence[Batch]) -> Reader:
        """Maps "L5.resid_post" (this basis) and "L5.resid_post pca" (principal axes), tables with their ways back.

        Raises:
            ValueError: no prompts, a place that the model does not have, or one that never varies.
        """
        predicts(model, "LIB")
        places = list(self.places) or [f"L{n}.resid_post" for n in layers_of(model, ())]
        values = states(model, batches, places)
        maps, tables, lengths = {}, {}, {}
        following: tuple[str, Callable[[Tensor], Tensor]] | None = None
        draw = torch.Generator().manual_seed(self.seed)
        for place in reversed(places):
            mean, axes, spread = _principal(place, values[place], self.drop)
            moment = torch.zeros(len(spread), len(spread))
            for gradient, share in self._gradients(model, batches, place, following, draw):
                turned = gradient @ (axes * spread)
                moment += share * turned.T @ turned
            moment /= len(values[place])
            size, turn = torch.linalg.eigh(moment)
            kept = size.flip(0) > self.drop * size[-1]
            length, turn = size.flip(0)[kept].sqrt(), turn.flip(1)[:, kept]
            weight = (axes / spread) @ turn * length
            maps |= {place: Map(place, weight, -mean @ weight), f"{place} pca": Map(place, axes, -mean @ axes)}
            tables |= {f"{place}/back": (turn / length).T @ (axes * spread).T, f"{place} pca/back": axes.T.clone()}
            lengths[place] = length.tolist()
            following = place, maps[place]
        found = {"lengths": lengths, "places": places}
        return Reader.of(self, model, batches, maps, tables=tables, found=found)

    def _gradients(
        self,
        model: PreTrainedModel,
        batches: Sequence[Batch],
        place: str,
        following: tuple[str, Callable[[Tensor], Tensor]] | None,
        draw: torch.Generator,
    ) -> Iterator[tuple[Tensor, float]]:
        """[n, D] gradients at a place along directions of what follows, part by part, and what each counts."""
        for batch in batches:
            for part in batch.chunks(self.rows):
                with _onward(model, part, place, following) as (start, goal):
                    many = goal.shape[-1]
                    exact = many <= self.probes
                    for probe in range(many if exact else self.probes):
                        # Columns read one another, so each has a sign of its own: their products vanish on average.
                        shape = goal.shape[:-1] if exact else goal.shape
                        signs = (torch.rand(shape, generator=draw) < 0.5).to(goal) * 2 - 1
                        along = (goal[..., probe] if exact else goal) * signs
                        (back,) = torch.autograd.grad(along.sum(), start, retain_graph=True)
                        yield _at(back, part).flatten(0, 1).float().cpu(), 1.0 if exact else 1 / self.probes


def _principal(place: str, values: Tensor, drop: float) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [D], principal axes [D, K] and standard deviations [K] along them, largest first."""
    mean = values.mean(0)
    _, size, axes = torch.linalg.svd(values - mean, full_matrices=False)
    variance = size.square() / len(values)
    if not variance[0] > 0:
        raise ValueError(f"{place} has the same value in every column of these prompts, so there is no basis of it.")
    kept = variance > drop * variance[0]
    return mean, axes[kept].T.contiguous(), variance[kept].sqrt()


def _at(value: Tensor, part: Batch) -> Tensor:
    """[B, P, D] of a value [B, T, D]."""
    return value[torch.arange(len(part), device=value.device)[:, None], part.at.to(value.device)]


@contextmanager
def _onward(
    model: PreTrainedModel, part: Batch, place: str, following: tuple[str, Callable[[Tensor], Tensor]] | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """A run kept for gradients: the value [B, T, D] at a place, and what follows it [B, P, K] in its own basis."""
    part = part.to(model.device)
    sites = [place] if following is None else [place, following[0]]
    with torch.enable_grad(), tap(model, *sites, grad=True) as t:
        logits = answer_logits(model, part)
        goal = logits.float() if following is None else following[1](_at(t[following[0]], part))
        yield t[place], goal


def interactions(
    model: PreTrainedModel, reader: Reader, batch: Batch, source: str, target: str, steps: int = 4, rows: int = 32
) -> Tensor:
    """[K target, K source] how strongly each direction of a place acts on each of the next, by integrated gradients.

    Between the mean activation and each prompt's, the gradient times the way is the share of a source direction in a
    target's change; the table is the root of its mean square over prompts.

    Args:
        source, target: maps of the reader at two places, such as "L0.resid_mid" or "L0.resid_mid pca".
        steps: points of the way at which gradients are taken.
    """
    reader.belongs(model)
    first, then = reader[source], reader[target]
    back = reader.tables[f"{source}/back"]
    total, many = torch.zeros(then.weight.shape[1], first.weight.shape[1]), 0
    for part in batch.chunks(rows):
        own = states(model, [part], [first.site], flat=False)[first.site]
        way = first(own)
        share = torch.zeros(then.weight.shape[1], *way.shape)
        for step in range(steps):
            here = own - (1 - (step + 0.5) / steps) * way @ back
            # The value that is put in is the leaf: at some sites a later tap would miss part of what leads on from it.
            start = _spread_out(model, part, first.site, here).requires_grad_()
            with torch.enable_grad(), do(model, Patch(first.site, start)), tap(model, then.site, grad=True) as t:
                model.base_model(**part.to(model.device).inputs)
            goal = then(_at(t[then.site], part))
            for j in range(goal.shape[-1]):
                (one,) = torch.autograd.grad(goal[..., j].sum(), start, retain_graph=True)
                share[j] += _at(one, part).float().cpu() @ back.T * way / steps
        total += share.square().sum((1, 2))
        many += way.shape[0] * way.shape[1]
    return (total / many).sqrt()


def _spread_out(model: PreTrainedModel, part: Batch, site: str, values: Tensor) -> Tensor:
    """What the run has at a site [B, T, D], with other values [B, P, D] at the columns `at`."""
    with torch.no_grad(), tap(model, site) as t:
        model.base_model(**part.to(model.device).inputs)
    whole = t[site].clone()
    whole[torch.arange(len(part), device=whole.device)[:, None], part.at.to(whole.device)] = values.to(whole)
    return whole
