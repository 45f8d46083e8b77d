"""The stacks of a model, how their sites are named, and when two tensors are the same."""

import torch

from headwise.anatomy import anatomy


def close(left, right, tolerance=1e-5):
    torch.testing.assert_close(left, right, atol=tolerance, rtol=tolerance)


def stacks(model):
    return sorted({stack for stack, _ in anatomy(model).by_place})


def named(stack, kind):
    return f"{stack}.L*.{kind}" if stack else kind
