"""What a method may leave behind in a model: nothing."""

import hashlib

import torch
from transformers import PreTrainedModel


def traces(model: PreTrainedModel) -> tuple:
    """Hooks, attributes, attention, mode, weights to the last bit, and gradients; equal before and after."""
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()]
    own = [tuple(sorted(m.__dict__)) for m in model.modules()]
    weights = [(name, _digest(value)) for name, value in model.state_dict().items()]
    grads = [p.requires_grad and p.grad is None for p in model.parameters()]
    return hooks, own, model.config._attn_implementation, model.training, weights, grads


def _digest(value: torch.Tensor) -> str:
    return hashlib.blake2b(value.detach().flatten().contiguous().view(torch.uint8).numpy()).hexdigest()
