"""Functions to be learned from examples in the prompt: how examples are laid out, and what the best predictor says."""

import torch
from torch import Tensor

from headwise.task import Batch


def joined(x: Tensor, y: Tensor) -> Batch:
    """Each example is one position (x, y), the query the last, (x, 0); nobody looks at it, itself included.

    Args:
        x: [B, n + 1, d], the query last. y: [B, n + 1].

    Returns:
        inputs [B, n + 1, d + 1]; `answer` [B, 1] is the y of the query. Spans: "examples", "query".
    """
    n = x.shape[1] - 1
    seen = torch.cat([y[:, :-1], torch.zeros_like(y[:, :1])], 1)
    mask = torch.ones(len(x), n + 1, dtype=torch.long)
    mask[:, -1] = 0
    at = torch.full((len(x), 1), n)
    return Batch(
        {"inputs_embeds": torch.cat([x, seen[..., None]], -1), "attention_mask": mask},
        at=at,
        answer=y[:, -1:],
        spans={"examples": torch.tensor([0, n]).expand(len(x), 2), "query": torch.cat([at, at + 1], 1)},
    )


def interleaved(x: Tensor, y: Tensor, about: "dict | None" = None) -> Batch:
    """Positions x, y, x, y, ...; at every x its y is to be told from the examples before it.

    Args:
        x: [B, n, d]. y: [B, n].

    Returns:
        inputs [B, 2n, d + 1]: x fills the first d channels, y the last; `at` and `answer` [B, n].
    """
    rows, n, d = x.shape
    whole = torch.zeros(rows, 2 * n, d + 1)
    whole[:, 0::2, :d] = x
    whole[:, 1::2, d] = y
    return Batch(
        {"inputs_embeds": whole}, at=torch.arange(0, 2 * n, 2).expand(rows, n), answer=y, about=dict(about or {})
    )


def pairs(batch: Batch) -> tuple[Tensor, Tensor]:
    """Inputs x [B, n, d] and y [B, n] of interleaved examples."""
    whole = batch.inputs["inputs_embeds"]
    return whole[:, 0::2, :-1], batch.answer


def squared(logits: Tensor, batch: Batch) -> Tensor:
    """Squared error, mean over the answers of a prompt: logits [B, P, 1 or more] -> [B]."""
    return (logits[..., 0] - batch.answer).square().mean(-1)


def gaussian(
    x: Tensor,
    y: Tensor,
    noise: "float | Tensor",
    mean: "Tensor | None" = None,
    cov: "Tensor | None" = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What Bayes says of each y from the examples before it, where y = w.x + noise and w is Gaussian.

    Args:
        x: [B, n, d]. y: [B, n]. noise: variance, above 0; a number, or [B].
        mean: [d] of the prior, by default 0. cov: [d, d], by default the identity.

    Returns:
        mean, variance (noise included) and log density of the y that came, [B, n] each, in float64.
    """
    rows, n, d = x.shape
    x, y = x.double(), y.double()
    noise = torch.as_tensor(noise, dtype=torch.float64)
    w = torch.zeros(rows, d, dtype=torch.float64) if mean is None else mean.double().expand(rows, d).clone()
    spread = (torch.eye(d, dtype=torch.float64) if cov is None else cov.double()).expand(rows, d, d).clone()
    means, variances = [], []
    for i in range(n):
        at = x[:, i]
        moved = (spread @ at[..., None])[..., 0]
        variance = (moved * at).sum(-1) + noise
        guess = (w * at).sum(-1)
        means.append(guess)
        variances.append(variance)
        gain = moved / variance[:, None]
        w = w + gain * (y[:, i] - guess)[:, None]
        spread = spread - gain[:, :, None] * moved[:, None]
    mu, var = torch.stack(means, 1), torch.stack(variances, 1)
    density = -0.5 * ((y - mu).square() / var + var.log() + torch.log(torch.tensor(2 * torch.pi)))
    return mu, var, density


def mixture(
    parts: "list[tuple[Tensor, Tensor, Tensor]]", prior: "list[float] | Tensor"
) -> tuple[Tensor, Tensor, Tensor]:
    """Bayes over several families of functions, each weighed by how well it foretold the examples so far.

    Args:
        parts: what `gaussian` said for each family.
        prior: [families] how often each is drawn.

    Returns:
        mean and variance [B, n], and the weights of the families [families, B, n] at each position.
    """
    mu, var, density = (torch.stack([part[i] for part in parts]) for i in range(3))
    before = torch.cat([torch.zeros_like(density[..., :1]), density.cumsum(-1)[..., :-1]], -1)
    weight = (before + torch.as_tensor(prior, dtype=torch.float64).log()[:, None, None]).softmax(0)
    mean = (weight * mu).sum(0)
    return mean, (weight * (var + mu.square())).sum(0) - mean.square(), weight
