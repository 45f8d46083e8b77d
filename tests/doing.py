"""A model run under interventions, what it holds at some sites, and when two tensors are the same."""

import torch

from headwise.do import do
from headwise.tap import tap

HEAD = 8


def close(left, right, tolerance=1e-4):
    torch.testing.assert_close(left, right, atol=tolerance, rtol=tolerance)


def run(model, inputs, *interventions):
    with torch.no_grad(), do(model, *interventions):
        return model(**inputs)[0]


def values(model, inputs, *sites):
    with torch.no_grad(), tap(model, *sites) as t:
        model(**inputs)
    return t
