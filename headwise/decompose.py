"""Contextual decomposition: how much of every later value, and of the metric, is there because of one place.

Every value is the sum of a relevant part and the rest. A run carries the rest through the model's own modules, one row
a source; the relevant part is what is missing to the clean run. A norm divides both parts by what it divides the whole
by, so that it is linear; of an MLP, and of attention, the relevant part is what its output loses without the relevant
part of its input. That is the rule of Hsu et al. (2024, arXiv:2407.00886) for activations, here for whole MLPs; their
attention patterns stay those of the clean prompt (`held`).
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from headwise.edges import Part, after_output, before_input
from headwise.listen import Handler, listen
from headwise.matmul import fast_matmul
from headwise.paths import SIDES, Paths
from headwise.scan import skipping
from headwise.site import Site
from headwise.tap import tap
from headwise.task import answer_logits
from headwise.weights import Norm

# A place that writes, and the columns at which it is a source; None for all columns.
Source = tuple[str, tuple[int, ...] | None]


@dataclass(frozen=True)
class _Linear:
    """A norm with its scale held at what it is in the clean run."""

    norm: Norm
    given: Tensor
    output: Tensor
    scale: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, norm: Norm, given: Tensor) -> "_Linear":
        return cls(norm, given, norm.module(given), norm.scale(given))

    def part(self, change: Tensor) -> Tensor:
        """What a part of the input, [..., B, T, D], is after the norm; the parts add up to the whole without shift."""
        return self.norm.centre(change.float()) * self.norm.gain / self.scale

    def without(self, change: Tensor) -> Tensor:
        """The norm's output without a part of its input."""
        return (self.output.float() - self.part(change)).to(self.output.dtype)


class Decomposition:
    """Relevant parts on prompts that are prepared already.

    Args:
        held: attention patterns stay those of the clean prompt, as in the paper: then queries and keys carry nothing.
    """

    def __init__(self, paths: Paths, held: bool = False) -> None:
        self.paths, self.held = paths, held
        edges, own = paths.edges, paths.own
        self.norms: dict[nn.Module, _Linear] = {}
        for part in edges.parts:
            self.norms[part.before] = _Linear.of(edges.weights.pre_norm(part.number), own.resid[part.number])
            if part.mid is not None:
                given = own.mid[part.number]
                self.norms[part.mid] = _Linear.of(Norm.of(part.mid, given.shape[-1], given), given)
        self.norms[edges.final] = _Linear.of(edges.weights.final, own.end)
        self.at = {part.number: i for i, part in enumerate(edges.parts)}
        self._attended = self._queries_and_keys() if held else {}

    def _queries_and_keys(self) -> dict[Site, Tensor]:
        with torch.no_grad(), tap(self.paths.model, "q", "k") as t:
            self.paths.model.base_model(**self.paths.batch.inputs)
        found = {Site(n, kind): t[f"L{n}.{kind}"] for n in self.at for kind in ("q", "k")}
        return {site: value.clone() for site, value in found.items()}

    def _start(self, source: str) -> int:
        return 0 if source.startswith("embed") else self.at[int(source.split(".")[0][1:])]

    def change(self, source: Source) -> Tensor:
        """[B, T, D] the relevant part of what a source writes: clean minus corrupt, at its columns only."""
        name, columns = source
        found = -self.paths.change[:, self.paths.source_at[name]]
        return found if columns is None else _at(found, columns)

    @torch.no_grad()
    def lost(self, sources: list[Source], rows: int = 8, advance: Callable[[int], object] | None = None) -> Tensor:
        """[sources, B] what the metric loses without each source's relevant part, along all paths from there."""
        found = torch.zeros(len(sources), len(self.paths))
        order = sorted(range(len(sources)), key=lambda i: self._start(sources[i][0]))
        while order:
            start = self._start(sources[order[0]][0])
            group = [i for i in order[: max(1, rows)] if self._start(sources[i][0]) == start]
            order = order[len(group) :]
            with _Run(self, [sources[i] for i in group], start).entered() as batch:
                value = self.paths.metric(answer_logits(self.paths.model, batch), batch)
            found[group] = (self.paths.clean - value.view(len(group), -1)).cpu().float()
            if advance is not None:
                advance(len(group))
        return found

    @torch.no_grad()
    def lost_at_the_end(self, sources: list[Source], rows: int = 64) -> Tensor:
        """[sources, B] what the metric loses without what each source writes straight to the logits."""
        found = []
        for first in range(0, len(sources), rows):
            group = sources[first : first + rows]
            with _Run(self, group, len(self.at)).entered() as batch:
                value = self.paths.metric(answer_logits(self.paths.model, batch), batch)
            found.append((self.paths.clean - value.view(len(group), -1)).cpu().float())
        return torch.cat(found)

    @torch.no_grad()
    def shares(self, part: Part, side: str, sources: list[str], rows: int = 8) -> Tensor:
        """How much of what a block's places write is there because of one edge into them.

        Args:
            side: "q", "k" or "v" of every head, or "mlp".

        Returns:
            [sources, B, T, H], for "mlp" [sources, B, T]: the change made by that edge alone, projected on the whole
            difference between clean and corrupt; 1 where it makes all of it.
        """
        paths, n = self.paths, part.number
        own, other = (run.mlp[n] if side == "mlp" else run.z[n] for run in (paths.own, paths.other))
        whole = (own - other).float()
        size = whole.square().sum(-1)
        found = []
        for first in range(0, len(sources), rows):
            change = torch.stack([self.change((name, None)) for name in sources[first : first + rows]])
            moved = (own - self._through(part, side, change)).float()
            ratio = (moved * whole).sum(-1) / size.clamp_min(1e-30)
            found.append(torch.where(size > 1e-12, ratio, torch.zeros_like(ratio)).cpu())
        return torch.cat(found)

    def _through(self, part: Part, side: str, change: Tensor) -> Tensor:
        """[K, B, T, ...] what a block writes when each variant's change [K, B, T, D] is missing in an input."""
        paths, n, copies = self.paths, part.number, len(change)
        rows, edges, seen = copies * len(paths), paths.edges, []
        batch = paths.batch.take(torch.arange(len(paths)).repeat(copies))
        kept = paths.own.resid[n].repeat(copies, 1, 1)
        body = edges.body
        below = n if paths.shared else None
        with skipping(body, below, paths.tuples, n), ExitStack() as hooks, fast_matmul(paths.model):
            begin = [(Site(n, "resid_pre"), lambda value, _: kept.to(value.dtype))]
            hooks.enter_context(listen(paths.model, begin))
            if side == "mlp":
                replaced = self.norms[part.mid].without(change).flatten(0, 1)
                _after(hooks, part.mid, lambda _: replaced)
                after_output(hooks, part.mlp, lambda value: seen.append(value.clone()), rows)
            else:
                door, columns = edges.weights.door(side, n)
                makers = torch.cat([edges.maker(side, n, unit) for unit in range(len(columns))], 1)
                gone = (self.norms[part.before].part(change) @ makers).flatten(0, 1)
                where = columns.flatten().to(gone.device)

                def less(output: Tensor) -> Tensor:
                    new = output.clone()
                    new[..., where] -= gone.view(*output.shape[:-1], -1).to(output.dtype)
                    return new

                _after(hooks, door, less)
                before_input(hooks, part.out, lambda value: seen.append(value.clone()), rows)
            paths.model.base_model(**batch.inputs, use_cache=False)
        value = seen[0].view(copies, len(paths), *seen[0].shape[1:])
        return value if side == "mlp" else value.unflatten(-1, (len(part.heads), -1))

    @torch.no_grad()
    def apart(self, source: Source) -> dict[str, float]:
        """How far the two parts, carried side by side, are from the clean value: by place, relative to its largest.

        The relevant part goes through the model's own projections and residual sums in rows of its own, so that nothing
        but the rules above lets the two add up.
        """
        run = _Run(self, [source], self._start(source[0]), both=True)
        with run.entered() as batch:
            answer_logits(self.paths.model, batch)
        return run.apart


class _Run:
    """Rows that carry what is left without each source's relevant part; with `both`, as many that carry the part."""

    def __init__(self, whole: Decomposition, sources: list[Source], start: int, both: bool = False) -> None:
        self.whole, self.sources, self.start, self.both = whole, sources, start, both
        self.paths = whole.paths
        self.copies = len(sources) * (1 + both)
        self.rows = self.copies * len(self.paths)
        self.half = len(sources) * len(self.paths)
        self.parts = self.paths.edges.parts[start:]
        self.apart: dict[str, float] = {}

    def _repeated(self, value: Tensor) -> Tensor:
        return value.repeat(self.copies, *[1] * (value.ndim - 1))

    def _check(self, name: str, value: Tensor, own: Tensor) -> None:
        if self.both and name not in self.apart:
            total = value[: self.half].float() + value[self.half :].float()
            size = own.float().abs().max().clamp_min(1e-30)
            self.apart[name] = float((total.view(own.shape) - own.float()).abs().max() / size)

    @contextmanager
    def entered(self) -> Iterator:
        """While the block lasts, the model carries the parts; gives the prompts to run."""
        paths = self.paths
        body, model = paths.edges.body, paths.model
        batch = paths.batch.take(torch.arange(len(paths)).repeat(self.copies))
        blocks = body.blocks[""]
        last = not self.parts
        below = max(blocks) + 1 if last else self.parts[0].number
        listened: list[tuple[Site, Handler]] = []
        if not last:
            listened.append((Site(below, "resid_pre"), self._begin))
            listened += [(site, self._as_clean(kept)) for site, kept in self.whole._attended.items()]
        with skipping(body, below if paths.shared else None, paths.tuples), ExitStack() as hooks, fast_matmul(model):
            hooks.enter_context(listen(model, listened))
            for part in self.parts:
                self._enter(hooks, part)
            before_input(hooks, paths.edges.final, self._end, self.rows)
            self._hold(hooks, paths.edges.final)
            yield batch

    def _begin(self, value: Tensor, _: object) -> Tensor:
        kept = self.paths.own.resid[self.parts[0].number]
        given = self._repeated(kept).float()
        given[self.half :] = 0
        return self._taken(given, lambda name: name.startswith("embed"), self.whole.change).to(value.dtype)

    def _taken(self, given: Tensor, mine: Callable[[str], bool], change: Callable[[Source], Tensor]) -> Tensor:
        """Without the relevant part of those sources that are written here; with it, in the rows that carry it."""
        count, out = len(self.paths), given
        for i, source in enumerate(self.sources):
            if mine(source[0]):
                part = change(source)
                out = out.clone() if out is given else out
                out[i * count : (i + 1) * count] -= part.to(out.dtype)
                if self.both:
                    out[self.half + i * count : self.half + (i + 1) * count] += part.to(out.dtype)
        return out

    def _as_clean(self, kept: Tensor) -> Handler:
        return lambda value, _: self._repeated(kept).to(value.dtype)

    def _end(self, value: Tensor) -> Tensor | None:
        own = self.paths.own.end
        if self.parts:
            self._check("end", value, own)
            return None
        return self._taken(self._repeated(own).float(), lambda _: True, self.whole.change).to(own.dtype)

    def _enter(self, hooks: ExitStack, part: Part) -> None:
        n, own, other = part.number, self.paths.own, self.paths.other
        before_input(hooks, part.before, lambda value: self._check(f"L{n}.resid_pre", value, own.resid[n]), self.rows)
        self._hold(hooks, part.before)
        if self.both:
            doors = [self.paths.edges.weights.door(side, n)[0] for side in SIDES]
            for module in dict.fromkeys([*doors, part.out]):
                if getattr(module, "bias", None) is not None:
                    _after(hooks, module, self._unbiased(module.bias))

        def heads(value: Tensor) -> Tensor | None:
            new = value
            if self.both:
                if not self.whole.held:
                    new = value.clone()
                    new[self.half :] = own.z[n].flatten(-2).repeat(len(self.sources), 1, 1) - value[: self.half]
                self._check(f"L{n}.z", new, own.z[n].flatten(-2))
            return self._taken(new, lambda name: name.startswith(f"L{n}.H"), self._of_head(n, own.z[n] - other.z[n]))

        before_input(hooks, part.out, heads, self.rows)
        if part.mlp is None:
            return
        before_input(hooks, part.mid, lambda value: self._check(f"L{n}.resid_mid", value, own.mid[n]), self.rows)
        self._hold(hooks, part.mid)

        def mlp(value: Tensor) -> Tensor | None:
            new = value
            if self.both:
                new = value.clone()
                new[self.half :] = own.mlp[n].repeat(len(self.sources), 1, 1) - value[: self.half]
            return self._taken(new, lambda name: name == f"L{n}.mlp", self.whole.change)

        after_output(hooks, part.mlp, mlp, self.rows)

    def _of_head(self, layer: int, moved: Tensor) -> Callable[[Source], Tensor]:
        """From a head as a source to the change [B, T, H d] of what enters its output projection."""

        def change(source: Source) -> Tensor:
            index, part = int(source[0].split(".H")[1]), torch.zeros_like(moved)
            part[:, :, index] = moved[:, :, index]
            part = part.flatten(-2)
            return part if source[1] is None else _at(part, source[1])

        return change

    def _unbiased(self, bias: Tensor) -> Callable[[Tensor], Tensor]:
        def take(output: Tensor) -> Tensor:
            new = output.clone()
            new.view(self.rows, -1, output.shape[-1])[self.half :] -= bias
            return new

        return take

    def _hold(self, hooks: ExitStack, module: nn.Module) -> None:
        """Let a norm divide by what it divides the clean value by."""
        linear = self.whole.norms[module]
        count = len(self.paths)

        def hook(_: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
            given = args[0] if args else next(iter(kwargs.values()))
            rows = given.view(self.copies, count, *linear.given.shape[1:])
            few = len(self.sources)
            new = linear.without(linear.given - rows[:few])
            if self.both:
                new = torch.cat([new, linear.part(rows[few:]).to(new.dtype)])
            return new.view(output.shape).to(output.dtype)

        hooks.callback(module.register_forward_hook(hook, with_kwargs=True).remove)


def _at(value: Tensor, columns: tuple[int, ...]) -> Tensor:
    """[B, T, D] with all columns but some set to zero."""
    found, chosen = torch.zeros_like(value), list(columns)
    found[:, chosen] = value[:, chosen]
    return found


def _after(hooks: ExitStack, module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Exchange what a module gives."""

    def hook(_: nn.Module, __: tuple, output: Tensor) -> Tensor:
        return change(output).view(output.shape)

    hooks.callback(module.register_forward_hook(hook).remove)
