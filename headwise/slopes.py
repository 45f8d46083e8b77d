"""How steeply the metric changes along every edge at once: one forward and one backward pass.

The gradient is taken at each input, in front of its norm, every head's query, key and value apart. Times what a source
would change there, it is the first-order estimate of patching that edge (attribution patching of edges).
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise

import torch
from torch import Tensor, nn

from headwise.edges import Part, after_output, before_input
from headwise.graph import Graph
from headwise.listen import listen
from headwise.method import Method
from headwise.paths import SIDES, Paths, Taken
from headwise.scan import skipping
from headwise.site import Site
from headwise.task import Batch, answer_logits

# Where a run is entered with another value: "embed", or the heads ("z") or the MLP ("mlp") of a layer.
Entry = tuple[str, int]
# A step between two prompts is halved as long as it is longer than this, to at most so many times the steps asked for.
SHORTEST, MOST = 2.0**-20, 8


def slopes(
    paths: Paths,
    entry: Entry = ("embed", 0),
    value: Tensor | None = None,
    change: Tensor | None = None,
    toward: float = 0.0,
) -> Tensor:
    """The gradient of the metric along every edge, at the clean run or at one with another value at `entry`.

    Args:
        entry: ("embed", 0), or ("z", layer) and ("mlp", layer); then only what reads it is measured.
        value: what stands at the entry, None for what the clean run has there: [B, T, D], for z [B, T, H, d].
        change: [B, sources, T, D] what each source changes; by default what its corrupt value would, in this run.
        toward: share of the way, in every input, from what is written in this run to what the corrupt run reads.

    Returns:
        [B, targets, sources] the gradient times what the source would change, summed over columns; 0 where there is
        no edge.
    """
    kind, layer = entry
    parts = paths.edges.parts
    first = 0 if kind == "embed" else next(i for i, part in enumerate(parts) if part.number == layer)
    with torch.enable_grad(), _fixed_parameters(paths), ExitStack() as hooks:
        here = _mix(paths, hooks, toward) if toward else paths.own
        watch = _Watch(paths, hooks, parts[first:], entry, value)
        total = paths.metric(answer_logits(paths.model, paths.batch), paths.batch).sum()
        found = torch.autograd.grad(total, list(watch.seen.values()), allow_unused=True)
    gradients = dict(zip(watch.seen, found, strict=True))
    if change is None:
        change = paths.between(here, paths.other) if toward else paths.change
    result = torch.zeros(len(paths), *paths.exists.shape, device=paths.model.device)
    for part in parts[first:]:
        _into_block(paths, watch, part, gradients, change, result)
    end = gradients.get("end")
    if end is not None:
        _contract(paths, change, result, [len(paths.targets) - 1], end[None])
    return result * paths.exists.to(result.device)


def mean_slopes(paths: Paths, entry: Entry, clean: Tensor, corrupt: Tensor, steps: int) -> Tensor:
    """Mean of `slopes` over values at `entry` from the corrupt to the clean one, the clean one the last of them.

    Raises:
        ValueError: there are no steps.
    """
    _check_steps(steps)
    total = slopes(paths, entry, clean)
    for step in range(1, steps):
        total += slopes(paths, entry, corrupt + step / steps * (clean - corrupt))
    return total / steps


def masked(paths: Paths, steps: int) -> Tensor:
    """Mean of what every edge's own mask does to the metric, while the masks of all edges move from clean to corrupt.

    At a share of the way every input lies that far between what is written in this run and what it reads on the corrupt
    prompt. The gradient by one mask is that by its input, times what the source writes on the corrupt prompt minus what
    it writes here. With more steps all edges together add up to the whole difference of the metric.

    Args:
        steps: points at which the gradient is taken, the clean run the first; where all is corrupt it is 0.

    Returns:
        [B, targets, sources] with the sign of `slopes`.

    Raises:
        ValueError: there are no steps.
    """
    _check_steps(steps)
    return sum((slopes(paths, toward=step / steps) for step in range(1, steps)), slopes(paths)) / steps


def followed(paths: Paths, steps: int) -> Tensor:
    """What each edge passes on while the embeddings go from the corrupt prompt to the clean one, in small steps.

    Over each step, the gradient in its middle times what the source changed meanwhile. So the edges across any cut of
    the model add up to the whole difference of the metric, however sharp its turns are: where one step changes the
    metric by more than its share, the step is halved.

    Args:
        steps: steps of equal length to begin with, and shares of the metric that one may change.

    Returns:
        [B, targets, sources] with the sign of `slopes`: what the metric gains towards the corrupt prompt.

    Raises:
        ValueError: there are no steps.
    """
    _check_steps(steps)
    first = paths.edges.parts[0].number
    clean, corrupt = paths.own.resid[first], paths.other.resid[first]

    def between(at: Tensor) -> Tensor:
        """Embeddings [B, T, D] a share [B] of the way from the corrupt to the clean ones."""
        return torch.lerp(corrupt, clean, at[:, None, None].to(clean.dtype))

    def run(at: Tensor) -> tuple[Tensor, Taken]:
        with torch.no_grad():
            return paths.take(paths.batch.inputs, between(at))

    points = _points(lambda at: run(at)[0].float(), steps, len(paths), clean.device)
    before = run(points[0])[1]
    total = torch.zeros(len(paths), *paths.exists.shape, device=paths.model.device)
    for low, high in pairwise(points):
        after = run(high)[1]
        total += slopes(paths, value=between((low + high) / 2), change=paths.between(after, before))
        before = after
    return total


def _points(value: Callable[[Tensor], Tensor], steps: int, rows: int, device: torch.device) -> Tensor:
    """[K, B] from 0 to 1, by row, so near to each other that `value` changes little from one to the next."""
    at = torch.linspace(0, 1, steps + 1, device=device)[:, None].repeat(1, rows)
    values = torch.stack([value(one) for one in at])
    while len(at) <= MOST * steps:
        length, jump = at.diff(dim=0), values.diff(dim=0).abs()
        whole = values.amax(0) - values.amin(0)
        jump = jump * (length > SHORTEST)
        if bool((jump <= 1.25 * whole / steps).all()):
            break
        where = jump.argmax(0, keepdim=True)
        new = at.gather(0, where) + length.gather(0, where) / 2
        at, order = torch.cat([at, new]).sort(0)
        values = torch.cat([values, value(new[0])[None]]).gather(0, order)
    return at


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"A gradient cannot be taken at {steps} points; steps is at least 1.")


def attributed(method: Method, parts: list[Paths], batch: Batch, found: list[Tensor]) -> Graph:
    """The graph of all edges, each with the estimated loss of the metric when it is patched."""
    where = parts[0].exists
    values = torch.cat([-one.permute(1, 2, 0)[where.to(one.device)] for one in found], 1)
    edges = parts[0].all()
    return Graph.of_edges(method, parts[0].model, batch, parts[0].edges.heads, edges, values.cpu().float().numpy())


@contextmanager
def _fixed_parameters(paths: Paths) -> Iterator[None]:
    """While the block lasts no parameter asks for a gradient, so that nothing is kept for one."""
    asking = [p for p in paths.model.parameters() if p.requires_grad]
    try:
        for parameter in asking:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


def _mix(paths: Paths, hooks: ExitStack, share: float) -> Taken:
    """While the hooks last, what every norm reads is a share of the way to what it reads on the corrupt prompt.

    What a run writes meanwhile is in what is handed back.
    """
    first, rows = paths.edges.parts[0].number, len(paths)
    here = Taken(resid={first: paths.own.resid[first]})

    def mix(other: Tensor) -> Callable:
        return lambda value: torch.lerp(value, other.to(value.dtype), share)

    def wrote(part: Part) -> Callable:
        def keep(value: Tensor) -> None:
            here.z[part.number] = value.detach().unflatten(-1, (len(part.heads), -1))

        return keep

    for part in paths.edges.parts:
        number = part.number
        before_input(hooks, part.before, mix(paths.other.resid[number]), rows)
        before_input(hooks, part.out, wrote(part), rows)
        if part.mlp is not None:
            before_input(hooks, part.mid, mix(paths.other.mid[number]), rows)
            after_output(hooks, part.mlp, lambda value, number=number: here.mlp.update({number: value.detach()}), rows)
    before_input(hooks, paths.edges.final, mix(paths.other.end), rows)
    return here


class _Watch:
    """Hooks that keep, in the graph of the gradient, what every block's heads and MLP and the last norm read."""

    def __init__(self, paths: Paths, hooks: ExitStack, parts: list[Part], entry: Entry, value: Tensor | None) -> None:
        self.seen: dict[tuple[str, object] | str, Tensor] = {}
        self.given: dict[int, Tensor] = {}
        kind, layer = entry
        rows, begin = len(paths), []
        shared = paths.shared and kind != "embed"
        kept = value if kind == "embed" and value is not None else paths.own.resid[parts[0].number]

        def root(given: Tensor, _: object) -> Tensor:
            start = given if kind == "embed" and value is None else kept.to(given.dtype)
            return start.detach().requires_grad_(kind == "embed")

        def leaf(instead: Tensor | None) -> Callable:
            return lambda given: (given if instead is None else instead.to(given.dtype)).detach().requires_grad_()

        if kind == "embed" or shared:
            begin = [(Site(parts[0].number, "resid_pre"), root)]
        hooks.enter_context(skipping(paths.edges.body, parts[0].number if shared else None, paths.tuples))
        hooks.enter_context(listen(paths.model, begin))
        for part in parts:
            hooks.callback(part.before.register_forward_hook(self._note(part.number), with_kwargs=True).remove)
            for module in dict.fromkeys(paths.edges.weights.door(side, part.number)[0] for side in SIDES):
                hooks.callback(module.register_forward_hook(self._keep(module)).remove)
            if part.number == layer and kind == "z":
                before_input(hooks, part.out, leaf(None if value is None else value.flatten(-2)), rows)
            if part.mlp is not None:
                before_input(hooks, part.mid, self._view(("mlp", part.number)), rows)
                if part.number == layer and kind == "mlp":
                    after_output(hooks, part.mlp, leaf(value), rows)
        before_input(hooks, paths.edges.final, self._view("end"), rows)

    def _note(self, number: int) -> Callable:
        def note(_: nn.Module, args: tuple, kwargs: dict, __: Tensor) -> None:
            self.given[number] = (args[0] if args else next(iter(kwargs.values()))).detach()

        return note

    def _keep(self, module: nn.Module) -> Callable:
        def keep(_: nn.Module, __: tuple, output: Tensor) -> None:
            if output.requires_grad:
                self.seen["door", module] = output

        return keep

    def _view(self, name: tuple[str, object] | str) -> Callable:
        def view(value: Tensor) -> Tensor | None:
            if not value.requires_grad:
                return None
            # A view is a place of its own in the graph: the gradient through the residual stream is not counted.
            self.seen[name] = value.view_as(value)
            return self.seen[name]

        return view


def _into_block(paths: Paths, watch: _Watch, part: Part, gradients: dict, change: Tensor, result: Tensor) -> None:
    """Gradients at a block's inputs, from those at its queries, keys and values back through weights and norm."""
    edges, number = paths.edges, part.number
    rows, targets = [], []
    given = watch.given[number]
    for side in SIDES:
        module, columns = edges.weights.door(side, number)
        gradient = gradients.get(("door", module))
        if gradient is None:
            continue
        gradient = gradient.reshape(*given.shape[:2], -1)
        for unit, c in enumerate(part.readers[side]):
            mine = gradient[..., columns[unit].to(gradient.device)].float()
            rows.append(mine @ edges.maker(side, number, unit).t())
            targets.append(c)
    if rows:
        normed = torch.stack(rows).to(given.dtype)
        with torch.enable_grad():
            start = given.expand(len(rows), *given.shape).clone().requires_grad_()
            (back,) = torch.autograd.grad(part.before.forward(start), start, normed)
        _contract(paths, change, result, targets, back)
    mlp = gradients.get(("mlp", number))
    if mlp is not None:
        _contract(paths, change, result, list(part.readers["mlp"]), mlp.reshape(1, *given.shape))


def _contract(paths: Paths, change: Tensor, result: Tensor, targets: list[int], gradient: Tensor) -> None:
    """Put gradients [A, B, T, D] at inputs, times every source's change, into their rows of the result."""
    read = int(paths.exists[targets].any(0).nonzero().max()) + 1
    flat = gradient.detach().float().transpose(0, 1).flatten(2)
    result[:, targets, :read] = torch.bmm(flat, change[:, :read].flatten(2).transpose(1, 2))
