"""Path patching by the letter, the slow twin of headwise.paths: many whole runs in which all but one input is frozen.

Goldowsky-Dill et al. (2023): an input is what its reader computes when every place that it reads holds a chosen value.
So each input is recorded in a run of its own, with all earlier places held; then heads are given the recorded queries,
keys and values.
"""

import torch

from headwise.anatomy import anatomy
from headwise.listen import listen
from headwise.site import Site
from headwise.tap import tap
from headwise.task import answer_logits


def _held(value):
    return lambda *_: value.clone()


@torch.no_grad()
def literal(model, batch, edges, metric):
    """[B] the metric with these edges patched, all else computed again."""
    body, edges = anatomy(model), set(edges)
    layers = sorted(body.blocks[""])
    first = Site(layers[0], "resid_pre")
    wanted = ["z", "mlp", str(first)]

    def places(inputs):
        with tap(model, *wanted) as t:
            answer_logits(model, batch, inputs)
        values = {"embed": t[first]}
        for n in layers:
            values |= {f"L{n}.H{i}": t[f"L{n}.z"][:, :, i] for i in range(body.heads(n))}
            values[f"L{n}.mlp"] = t[f"L{n}.mlp"]
        return values

    corrupt, current = places(batch.corrupt), places(batch.inputs)

    def frozen(target):
        """Handlers that hold every place at its value, or its corrupt value where the edge to `target` is patched."""
        value = {s: corrupt[s] if (s, target) in edges else current[s] for s in current}
        held = [(first, _held(value["embed"]))]
        for n in layers:
            held.append((Site(n, "z"), _held(torch.stack([value[f"L{n}.H{i}"] for i in range(body.heads(n))], 2))))
            held.append((Site(n, "mlp"), _held(value[f"L{n}.mlp"])))
        return held

    def see(target, site):
        """What the reader makes of its input; seen before anything is held at that site."""
        seen = []

        def note(value, _):
            seen.append(value.clone())

        with listen(model, [(site, note), *frozen(target)]):
            logits = answer_logits(model, batch)
        return logits if target == "logits" else seen[-1]

    for n in layers:
        made = {}
        for side, letter, count in (
            ("q", "H", body.heads(n)),
            ("k", "G", body.kv_heads(n)),
            ("v", "G", body.kv_heads(n)),
        ):
            rows = [see(f"L{n}.{letter}{i}.{side}", Site(n, side))[:, i] for i in range(count)]
            made[side] = torch.stack(rows, 1)
        given = [(Site(n, side), _held(value)) for side, value in made.items()]
        with listen(model, given), tap(model, f"L{n}.z") as t:
            answer_logits(model, batch)
        current |= {f"L{n}.H{i}": t[f"L{n}.z"][:, :, i] for i in range(body.heads(n))}
        current[f"L{n}.mlp"] = see(f"L{n}.mlp", Site(n, "mlp"))
    return metric(see("logits", first), batch)
