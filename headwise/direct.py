"""What each head itself adds to the logits of a token: its own result, scaled as the last norm scales the residual."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from headwise.probe import Layer
from headwise.tap import tap
from headwise.task import Batch
from headwise.weights import Weights


@contextmanager
def into_residual(weights: Weights, columns: Tensor) -> "Iterator[dict[int, Tensor]]":
    """While the model runs: what enters each layer's output projection, head by head, at columns [B, P].

    Yields:
        {layer: [B, P, H, d]}, filled by the forward pass. Where a gate multiplies z, this is the gated z.
    """
    taken: dict[int, Tensor] = {}
    hooks = []

    def reader(number: int, layer: Layer) -> Callable[[nn.Module, tuple], None]:
        def read(_: nn.Module, args: tuple) -> None:
            value = args[0].detach()
            value = value.view(len(columns), -1, value.shape[-1])
            rows = torch.arange(len(value), device=value.device)[:, None]
            taken[number] = value[rows, columns.to(value.device)].unflatten(-1, (layer.heads, -1)).float()

        return read

    try:
        for number in weights.layers:
            layer = weights.body.layer(number, weights.stack)
            if layer.out is None:
                raise ValueError(
                    f"The output projection of layer {number} of this {weights.body.model_type} was not found."
                )
            hooks.append(layer.out.register_forward_pre_hook(reader(number, layer)))
        yield taken
    finally:
        for hook in hooks:
            hook.remove()


def toward_answer(weights: Weights, batch: Batch) -> Tensor:
    """[B, P, D] the direction of the answer's logit minus the foil's; minus the mean over all tokens without a foil."""
    readout = weights.readout
    other = readout.mean(0) if batch.foil is None else readout[batch.foil.to(readout.device)]
    return readout[batch.answer.to(readout.device)] - other


def predicts(model: PreTrainedModel, name: str) -> None:
    """Raises ValueError when the model does not continue its prompt, so that answers cannot be read from it."""
    kind = type(model).__name__
    if model.config.is_encoder_decoder or not model.can_generate():
        why = "is an encoder-decoder" if model.config.is_encoder_decoder else "does not predict next tokens"
        raise ValueError(
            f"{name} reads how heads produce the next token of a prompt, but {kind} {why}; "
            "use a decoder with its language-model head."
        )


def direct_attribution(
    weights: Weights, batch: Batch, directions: Tensor, sources: Tensor | None = None, at_once: int = 8
) -> dict[int, Tensor]:
    """How far each head's own output at the columns `batch.at` moves the logits along a direction.

    Args:
        directions: [B, P, D] rows of `weights.readout`, or differences of them, one for each column.
        sources: [B, T] true for the keys whose values count, None for all; asks for patterns.

    Returns:
        {layer: [B, H]} in logits, mean over the P columns.
    """
    parts: dict[int, list[Tensor]] = {}
    for start in range(0, len(batch), at_once):
        rows = slice(start, start + at_once)
        part = batch.take(rows).to(weights.model.device)
        chosen = None if sources is None else sources[rows].to(weights.model.device)
        for number, value in _part(weights, part, directions[rows].to(weights.model.device), chosen).items():
            parts.setdefault(number, []).append(value.cpu())
    return {number: torch.cat(values) for number, values in parts.items()}


def _part(weights: Weights, part: Batch, toward: Tensor, sources: Tensor | None) -> dict[int, Tensor]:
    model = weights.model
    last = f"L{max(weights.body.blocks[weights.stack])}.resid_post"
    rows = torch.arange(len(part), device=model.device)[:, None]
    wanted = [last, *(f"L{n}.attn" for n in weights.layers if weights.post_norm(n) is not None)]
    wanted += [] if sources is None else ["pattern", "v", "z"]
    with torch.no_grad(), tap(model, *wanted) as t, into_residual(weights, part.at) as given:
        model.base_model(**part.inputs)
    scale = 1.0 if weights.final is None else weights.final.scale(t[last][rows, part.at])
    found = {}
    for number, z in given.items():
        if sources is not None:
            groups = weights.heads(number) // t[f"L{number}.v"].shape[1]
            value = t[f"L{number}.v"].float().repeat_interleave(groups, 1)
            seen = t[f"L{number}.pattern"].float().transpose(1, 2)[rows, part.at] * sources[:, None, None]
            own = t[f"L{number}.z"].float()[rows, part.at]
            # A gate between z and the output projection acts on the chosen part as on the whole.
            gate = torch.where(own.abs() > 1e-9, z / own, 0.0)
            z = torch.einsum("bphk,bhkd->bphd", seen, value) * gate
        out = torch.stack([weights.o(number, h) for h in range(weights.heads(number))])
        reach, post = toward / scale, weights.post_norm(number)
        if post is not None:
            reach = post.centre(reach * post.gain) / post.scale(t[f"L{number}.attn"][rows, part.at])
        found[number] = (torch.einsum("bpD,hdD->bphd", reach, out) * z).sum(-1).mean(1)
    return found
