"""Run a model with any set of its edges patched, as rows of one batch, from the first block that they change.

An input is the sum of what its edges bring. Where an edge is patched, it brings what its source writes on the corrupt
prompt; all other edges bring what is written in this run. So one patched edge is path patching, and all edges but those
of a circuit are the test of that circuit. Inputs are changed in front of the model's own norms and projections, and
everything behind them is computed by the model.
"""

import bisect
import difflib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from headwise.edges import Edges, Part, after_output, before_input
from headwise.graph import Edge, Graph
from headwise.listen import listen
from headwise.matmul import fast_matmul
from headwise.scan import noting_tuples, skipping
from headwise.site import Site
from headwise.task import Batch, Metric, answer_logits

SIDES = ("q", "k", "v")


@dataclass
class Taken:
    """What one run wrote and read, by layer: resid and mid are the inputs of the two norms, z enters the output
    projection [B, T, H, d], mlp is what the MLP wrote; end is the input of the last norm. All others [B, T, D].
    """

    resid: dict[int, Tensor] = field(default_factory=dict)
    z: dict[int, Tensor] = field(default_factory=dict)
    mid: dict[int, Tensor] = field(default_factory=dict)
    mlp: dict[int, Tensor] = field(default_factory=dict)
    end: Tensor | None = None


class Paths:
    """Prompts run clean and corrupt, ready to be run again with edges patched.

    Args:
        metric: reads logits, such as `headwise.task.logit_diff`.
        tokens: every column of "embed" is a source of its own, "embed@0", "embed@1" and so on.

    Attributes:
        sources, targets, exists: as in `Edges`, with the columns of the embedding where they are asked for.
        clean, corrupt: [B] the metric of the two runs.

    Raises:
        ValueError: there are no corrupt prompts, or they have another number of tokens.
    """

    def __init__(
        self, model: PreTrainedModel, edges: Edges, batch: Batch, metric: Metric, tokens: bool = False
    ) -> None:
        self.model, self.edges, self.metric = model, edges, metric
        self.batch = batch.to(model.device)
        corrupt = batch.flipped().inputs
        if any(corrupt[name].shape != value.shape for name, value in batch.inputs.items()):
            raise ValueError(
                "Clean and corrupt prompts must have the same number of tokens, or no path can be patched."
            )
        with torch.no_grad(), fast_matmul(model):
            self.corrupt, self.other = self.take(self.batch.corrupt)
            with noting_tuples(edges.body) as self.tuples:
                self.clean, self.own = self.take(self.batch.inputs)
        names = [f"embed@{t}" for t in range(self.own.end.shape[1])] if tokens else ["embed"]
        self.embeds = len(names)
        self.sources, self.targets = names + edges.sources[1:], edges.targets
        self.exists = torch.cat([edges.exists[:, :1].expand(-1, self.embeds), edges.exists[:, 1:]], 1)
        self.source_at = {source: i for i, source in enumerate(self.sources)}
        self._begins = [part.readers["q"].start for part in edges.parts]
        self.shared = True
        self.shared = self._agrees()

    def take(self, inputs: dict[str, Tensor], start: Tensor | None = None) -> tuple[Tensor, Taken]:
        """The metric [B] of one run, and what it wrote and read; `start` [B, T, D] is what enters its first block."""
        taken, first, rows = Taken(), Site(self.edges.parts[0].number, "resid_pre"), len(self.batch)
        ended: dict[int, Tensor] = {}

        def keep(store: dict[int, Tensor], number: int) -> Callable:
            return lambda value: store.__setitem__(number, value.detach())

        with ExitStack() as hooks:
            if start is not None:
                hooks.enter_context(listen(self.model, [(first, lambda given, _: start.to(given.dtype))]))
            for part in self.edges.parts:
                before_input(hooks, part.before, keep(taken.resid, part.number), rows)
                before_input(hooks, part.out, keep(taken.z, part.number), rows)
                if part.mlp is not None:
                    before_input(hooks, part.mid, keep(taken.mid, part.number), rows)
                    after_output(hooks, part.mlp, keep(taken.mlp, part.number), rows)
            before_input(hooks, self.edges.final, keep(ended, 0), rows)
            value = self.metric(answer_logits(self.model, self.batch, inputs), self.batch)
        taken.end, taken.z = ended[0], {n: z.unflatten(-1, (self.edges.heads[n][0], -1)) for n, z in taken.z.items()}
        return value.detach(), taken

    def __len__(self) -> int:
        return len(self.batch)

    def heads_of(self, part: Part) -> range:
        """Places of a block's heads in `sources`."""
        return range(part.heads.start + self.embeds - 1, part.heads.stop + self.embeds - 1)

    def mlp_of(self, part: Part) -> int:
        """Place of a block's MLP in `sources`."""
        return (part.mlp_at or 0) + self.embeds - 1

    def written(self, part: Part, change: Tensor) -> list[Tensor]:
        """[B, T, D] of each head of a block, from a change of what enters its output projection, [B, T, H, d]."""
        return [change[:, :, i].float() @ self.edges.weights.o(part.number, i) for i in range(change.shape[2])]

    @cached_property
    def change(self) -> Tensor:
        """[B, sources, T, D] what each source writes on the corrupt prompt, minus what it writes on the clean one."""
        return self.between(self.own, self.other)

    def between(self, one: Taken, other: Taken) -> Tensor:
        """[B, sources, T, D] what each source writes in the other run, minus what it writes in this one."""
        first = self.edges.parts[0].number
        moved = (other.resid[first] - one.resid[first]).float()
        found = moved.new_zeros(len(moved), len(self.sources), *moved.shape[1:])
        for i in range(self.embeds):
            columns = slice(None) if self.embeds == 1 else slice(i, i + 1)
            found[:, i, columns] = moved[:, columns]
        for part in self.edges.parts:
            n = part.number
            for u, value in zip(self.heads_of(part), self.written(part, other.z[n] - one.z[n]), strict=True):
                found[:, u] = value
            if part.mlp is not None:
                found[:, self.mlp_of(part)] = other.mlp[n] - one.mlp[n]
        return found

    def place(self, edge: Edge) -> tuple[int, int]:
        """Places of an edge's target and source. Raises ValueError when this model has no such edge."""
        if edge[0] in self.source_at and self.embeds > 1 and edge[0].startswith("embed"):
            return self.edges.place(("embed", edge[1]))[0], self.source_at[edge[0]]
        c, u = self.edges.place(edge)
        return c, self.source_at.get(self.edges.sources[u], -1)

    def patching(self, edges: Iterable[Edge]) -> Tensor:
        """[targets, sources] 1 for these edges, 0 for all others."""
        strengths = torch.zeros(self.exists.shape)
        for edge in edges:
            strengths[self.place(edge)] = 1.0
        return strengths

    def around(self, graph: Graph | Iterable[Edge]) -> Tensor:
        """[targets, sources] 1 for every edge that is not in the graph: what is left is the circuit."""
        kept = graph.edges if isinstance(graph, Graph) else graph
        return self.exists.float() - self.patching(kept)

    @torch.no_grad()
    def run(self, strengths: Tensor) -> Tensor:
        """The metric with edges patched.

        Args:
            strengths: [K, targets, sources] how far each variant patches each edge: 0 as in this run, 1 as corrupt.

        Returns:
            [K, B].
        """
        strengths = strengths.to(self.model.device)
        active = strengths.any(0).any(1).nonzero()[:, 0].tolist()
        if not active:
            return self.clean.expand(len(strengths), -1).clone()
        variants = _Variants(self, strengths, self._start(active[0]) if self.shared else 0)
        with variants.entered():
            value = self.metric(answer_logits(self.model, variants.rows, variants.rows.inputs), variants.rows)
        return value.view(len(strengths), -1)

    def run_around(self, circuits: "list[Graph | Iterable[Edge]]") -> Tensor:
        """[circuits, B] the metric of each circuit alone, every edge outside it patched; side by side."""
        return self.run(torch.stack([self.around(one) for one in circuits]))

    def all(self, senders: Iterable[str] = (), receivers: Iterable[str] = ()) -> list[Edge]:
        """Every edge, or those from and into the named places.

        Raises:
            ValueError: this model has no such place, or no edge between the two sides.
        """
        chosen = self.exists.clone()
        for names, known, axis in ((senders, self.sources, 1), (receivers, self.targets, 0)):
            names = list(names)
            for name in names:
                if name not in known:
                    near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
                    side = "writes to" if axis else "reads"
                    raise ValueError(f"No place {name!r} {side} an edge of this model. Did you mean {near!r}?")
            if names:
                keep = torch.tensor([one in names for one in known])
                chosen &= keep[None] if axis else keep[:, None]
        if not bool(chosen.any()):
            raise ValueError(f"No edge leads from {', '.join(senders)} to {', '.join(receivers)}, which read earlier.")
        return [(self.sources[u], self.targets[c]) for c, u in chosen.nonzero().tolist()]

    def single(self, edges: list[Edge], rows: int = 8, advance: Callable[[int], object] | None = None) -> Tensor:
        """[edges, B] the metric with each edge patched alone; `rows` of them with one start side by side."""
        places = [self.place(edge) for edge in edges]
        starts = [self._start(c) for c, _ in places]
        found = torch.zeros(len(edges), len(self.batch))
        order = sorted(range(len(edges)), key=lambda i: places[i][0])
        while order:
            group = [i for i in order[: max(1, rows)] if starts[i] == starts[order[0]]]
            order = order[len(group) :]
            strengths = torch.zeros(len(group), *self.exists.shape)
            for k, i in enumerate(group):
                strengths[k, places[i][0], places[i][1]] = 1.0
            found[group] = self.run(strengths).cpu().float()
            if advance is not None:
                advance(len(group))
        return found

    def _start(self, target: int) -> int:
        """Place of the block that a target belongs to; one beyond the last for the logits."""
        return bisect.bisect_right(self._begins, target) - 1 if target < len(self.targets) - 1 else len(self._begins)

    def _agrees(self) -> bool:
        """Whether a run started at the last block gives what the whole run gave."""
        nothing = torch.zeros(1, *self.exists.shape, device=self.model.device)
        tight = self.model.dtype in (torch.float32, torch.float64)
        with torch.no_grad(), _Variants(self, nothing, len(self.edges.parts) - 1).entered():
            try:
                again = self.metric(answer_logits(self.model, self.batch), self.batch)
            except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
                return False
        return torch.allclose(again, self.clean, rtol=1e-3, atol=1e-3 if tight else 5e-2)


class _Variants:
    """Rows of one run, variant by variant, and how what they write differs from what the corrupt prompt writes."""

    def __init__(self, paths: Paths, strengths: Tensor, start: int) -> None:
        self.paths, self.strengths, self.start = paths, strengths, start
        self.copies, batch = len(strengths), paths.batch
        self.rows = batch if self.copies == 1 else batch.take(torch.arange(len(batch)).repeat(self.copies))
        self.parts = paths.edges.parts[start:]
        self.exists = paths.exists.to(strengths.device)
        # Everything that writes before the first changed input writes what it wrote on the clean prompt.
        self.first = paths.heads_of(self.parts[0]).start if self.parts else len(paths.sources)
        self.coefficients: dict[str, tuple[bool, Tensor]] = {}
        self.needed: set[int] = set()
        for part in self.parts:
            for name, targets in self._groups(part):
                self._plan(f"{part.number} {name}", targets)
        self._plan("end", [len(paths.targets) - 1])
        self.slots = {u: i for i, u in enumerate(sorted(self.needed))}
        self.moved: Tensor | None = None
        self.added: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}

    def _groups(self, part: Part) -> Iterator[tuple[str, list[int]]]:
        inside = [c for side in SIDES for c in part.readers[side]]
        yield "in", [c for c in inside if bool(self.strengths[:, c].any())]
        yield "mlp", [c for c in part.readers.get("mlp", ()) if bool(self.strengths[:, c].any())]

    def _plan(self, name: str, targets: list[int]) -> None:
        """How to make the input of some targets: from this run's and patched edges, or the corrupt run's and others."""
        wanted = self.strengths[:, targets]
        if not targets or not bool(wanted.any()):
            return
        rest = wanted - self.exists[targets].to(wanted.dtype)
        corrupt = int((rest != 0).sum()) < int((wanted != 0).sum())
        coefficients = rest if corrupt else wanted
        self.coefficients[name] = corrupt, coefficients
        used = coefficients.any(0).any(0).nonzero()[:, 0].tolist()
        self.needed |= {u for u in used if u >= self.first}

    def _read(self, name: str, given: Tensor, other: Tensor) -> Tensor:
        """[A, K B, T, D] the inputs of the targets planned as `name`: given [K B, T, D] with some edges patched."""
        corrupt, coefficients = self.coefficients[name]
        copies, paths = self.copies, self.paths
        base = other.repeat(copies, 1, 1) if corrupt else given
        shape, many = base.shape, coefficients.shape[1]
        total = base.expand(many, *shape).float().clone()
        used = coefficients.any(0).any(0).nonzero()[:, 0].tolist()
        old = [u for u in used if u < self.first]
        if old:
            weights = coefficients[:, :, old].flatten(0, 1).expand(len(paths), -1, -1)
            sums = torch.bmm(weights, paths.change[:, old].flatten(2))
            total += sums.view(len(paths), copies, many, *shape[1:]).permute(2, 1, 0, 3, 4).flatten(1, 2)
        new = [u for u in used if u >= self.first]
        if new:
            places = [self.slots[u] for u in new]
            weights = coefficients[:, :, new].repeat_interleave(len(paths), 0)
            if 3 * len(new) > places[-1]:
                # Reading all that was written so far is less work than copying most of it.
                few, places = weights, list(range(places[-1] + 1))
                weights = few.new_zeros(*few.shape[:2], len(places))
                weights[:, :, [self.slots[u] for u in new]] = few
                moved = self.moved[:, : len(places)]
            else:
                moved = self.moved[:, places]
            total += torch.bmm(weights, moved).view(-1, many, *shape[1:]).transpose(0, 1)
        return total.to(given.dtype)

    def _write(self, source: int, moved: Tensor) -> None:
        """Keep what a source's corrupt value would change here, [K B, T, D]."""
        if self.moved is None:
            self.moved = torch.zeros(len(moved), len(self.slots), moved[0].numel(), device=moved.device)
        self.moved[:, self.slots[source]] = moved.flatten(1)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """While the block lasts, the model reads what the variants say."""
        paths, body, last = self.paths, self.paths.edges.body, not self.parts
        blocks = body.blocks[""]
        below = max(blocks) + 1 if last else self.parts[0].number
        start = None if self.start == 0 else below
        begin = [] if last or start is None else [(Site(below, "resid_pre"), self._begin(self.parts[0].number))]
        with skipping(body, start, paths.tuples), ExitStack() as hooks, fast_matmul(paths.model):
            # Entered before the norms are: what starts in the middle is what they see.
            hooks.enter_context(listen(paths.model, begin))
            for part in self.parts:
                self._enter(hooks, part)
            if last or "end" in self.coefficients:
                before_input(hooks, paths.edges.final, self._end, len(self.rows))
            yield

    def _begin(self, number: int) -> Callable:
        kept = self.paths.own.resid[number]
        return lambda value, _: kept.repeat(self.copies, 1, 1).to(value.dtype)

    def _end(self, value: Tensor) -> Tensor:
        given = value if self.parts else self.paths.own.end.repeat(self.copies, 1, 1)
        return self._read("end", given, self.paths.other.end)[0] if "end" in self.coefficients else given

    def _enter(self, hooks: ExitStack, part: Part) -> None:
        number, rows = part.number, len(self.rows)
        own, other = self.paths.heads_of(part), self.paths.other
        if f"{number} in" in self.coefficients:
            hooks.callback(part.before.register_forward_hook(self._normed(part), with_kwargs=True).remove)
            doors = [self.paths.edges.weights.door(side, number)[0] for side in SIDES]
            for module in dict.fromkeys(doors):
                hooks.callback(module.register_forward_hook(self._project).remove)
        if self.needed.intersection(own):

            def wrote(value: Tensor) -> None:
                z = value.unflatten(-1, (len(own), -1))
                moved = other.z[number].repeat(self.copies, 1, 1, 1) - z
                for i, u in enumerate(own):
                    if u in self.needed:
                        self._write(u, moved[:, :, i].float() @ self.paths.edges.weights.o(number, i))

            before_input(hooks, part.out, wrote, rows)
        if f"{number} mlp" in self.coefficients:

            def read(value: Tensor) -> Tensor:
                return self._read(f"{number} mlp", value, other.mid[number])[0]

            before_input(hooks, part.mid, read, rows)
        if part.mlp is not None and self.paths.mlp_of(part) in self.needed:

            def wrote_mlp(value: Tensor) -> None:
                self._write(self.paths.mlp_of(part), other.mlp[number].repeat(self.copies, 1, 1) - value)

            after_output(hooks, part.mlp, wrote_mlp, rows)

    def _normed(self, part: Part) -> Callable:
        """A hook on the norm of a block: what its heads would read, normed by that norm, through their own weights."""
        edges, number = self.paths.edges, part.number
        targets = next(targets for name, targets in self._groups(part) if name == "in")
        units = {c: (side, c - part.readers[side].start) for side in SIDES for c in part.readers[side]}

        def normed(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
            given = args[0] if args else next(iter(kwargs.values()))
            inputs = self._read(f"{number} in", given, self.paths.other.resid[number])
            # Not by calling it: this hook would be called again.
            differences = module.forward(inputs) - output
            for c, difference in zip(targets, differences, strict=True):
                side, unit = units[c]
                door, columns = edges.weights.door(side, number)
                value = difference.float() @ edges.maker(side, number, unit)
                self.added.setdefault(door, []).append((columns[unit].to(value.device), value))

        return normed

    def _project(self, module: nn.Module, _: tuple, output: Tensor) -> Tensor | None:
        added = self.added.pop(module, None)
        if added is None:
            return None
        output = output.clone()
        for columns, value in added:
            output[..., columns] += value.view(*output.shape[:-1], -1).to(output.dtype)
        return output


def prepare(
    model: PreTrainedModel, batch: Batch, metric: Metric, prompts: int = 8, tokens: bool = False
) -> list[Paths]:
    """The batch in parts of at most `prompts` prompts, each run clean and corrupt."""
    edges = Edges(model)
    return [Paths(model, edges, part, metric, tokens) for part in batch.chunks(prompts)]
