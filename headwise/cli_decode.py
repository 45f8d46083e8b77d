"""The commands that generate: generate, and the decoding half of bench."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headwise.terminal import print_json, print_table, say, sentences, tell

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedModel

    from headwise.decoding import Speed
    from headwise.drafting import Stats
    from headwise.packing import Packed
    from headwise.plan import Plan

DRAFT_HELP = "A drafting method with its fields, such as copyspec:gamma=5, or none."
PACKED_HELP = "On a CPU with AVX-512: products by a second copy of the weights, laid out for a few tokens at a time."


def generate_command(
    model: Annotated[str, typer.Argument(help="'default', a hub id, a model folder, or a .gguf file.")] = "default",
    prompt: Annotated[str, typer.Option(help="What to go on from; - reads it from stdin.")] = "-",
    draft: Annotated[str, typer.Option(help=DRAFT_HELP)] = "copyspec",
    plan: Annotated[Path | None, typer.Option(help="A plan: its heads keep what it says.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens generated at most.")] = 128,
    chat: Annotated[bool, typer.Option("--chat/--raw", help="Ask in the model's own chat form, if it has one.")] = True,
    sample: Annotated[bool, typer.Option("--sample", help="Sample, rather than take the likeliest token.")] = False,
    temperature: Annotated[float, typer.Option(help="With --sample.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="With --sample.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Use a plan although a test rejected it.")] = False,
    dtype: Annotated[str, typer.Option(help="Type of the weights.")] = "float32",
    device: Annotated[str, typer.Option(help="Where the model runs, such as cpu or cuda.")] = "cpu",
    packed: Annotated[bool, typer.Option("--packed", help=PACKED_HELP)] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON when it is done, nothing before.")] = False,
) -> None:
    """Generate from a prompt, with drafts that the model checks: the same text, in fewer steps."""
    with sentences():
        import torch

        from headwise.decoding import named_draft
        from headwise.matmul import FEW, fast_matmul
        from headwise.models import open_model
        from headwise.packing import Packed
        from headwise.plan import Plan

        said = sys.stdin.read() if prompt == "-" else prompt
        if not said.strip():
            raise ValueError("The prompt is empty; give one with --prompt, or on stdin.")
        kept = None if plan is None else Plan.load(plan)
        tell(f"Opening {model} ...")
        opened, tokenizer = open_model(model, dtype=dtype, device=device)
        method = None if draft == "none" else named_draft(draft, opened, tokenizer)
        ids = _prompt_ids(tokenizer, said, chat).to(opened.device)
        _check_room(opened, ids.shape[1], tokens)
        torch.manual_seed(seed)
        how: dict[str, Any] = {"max_new_tokens": tokens, "attention_mask": torch.ones_like(ids), "do_sample": sample}
        how |= {"temperature": temperature, "top_p": top_p} if sample else {}
        with Packed(opened) if packed else fast_matmul(opened, few=FEW):
            text, stats = _generate(opened, tokenizer, (method, kept, force), ids, how, shown=not as_json)
        if as_json:
            print_json({"text": text, "draft": draft, **stats.data()})


def _prompt_ids(tokenizer: Any, said: str, chat: bool) -> Any:
    import torch

    from headwise.data.layout import encode, start_ids

    if chat and tokenizer.chat_template:
        turn = [{"role": "user", "content": said}]
        text = str(tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False))
        return torch.tensor([encode(tokenizer, text)])
    return torch.tensor([start_ids(tokenizer) + encode(tokenizer, said)])


def _check_room(model: "PreTrainedModel", prompt: int, tokens: int) -> None:
    from headwise.models import context_length

    room = context_length(model)
    # The last token that is written is not read.
    if room is not None and prompt + tokens - 1 > room:
        left = f"; ask for at most {room - prompt + 1} with --tokens" if prompt <= room else ""
        raise ValueError(f"The prompt is {prompt} tokens, and this model reads at most {room}{left}.")


def _generate(
    model: "PreTrainedModel", tokenizer: Any, what: tuple[Any, "Plan | None", bool], ids: Any, how: dict, shown: bool
) -> "tuple[str, Stats]":
    """The text and what became of the drafts; while it grows it is shown."""
    from headwise.verifying import Verifying, check_request, run

    method, plan, force = what
    check_request(ids, how)
    drafter = _no_drafter() if method is None else method.drafter(model)
    if plan is not None:
        plan.attach(model, force=force)
    try:
        with _screen(shown) as screen:
            words = _Words(tokenizer)
            loop = Verifying(drafter, words, lambda stats: screen(words.text, stats))
            found = run(loop, model, ids, how)
    finally:
        if plan is not None:
            plan.detach(model)
    return words.text if words.made else tokenizer.decode(found.ids[0, ids.shape[1] :]), found.stats


def _no_drafter() -> Any:
    """Proposes nothing: decoding token by token, counted in the same way."""
    from headwise.drafting import Drafter

    class Nothing(Drafter):
        def begin(self, model: Any, texts: Any, sampling: bool) -> None:
            """Nothing to begin."""

        def accept(self, news: Any, read: Any) -> None:
            """Nothing to learn."""

        def propose(self, rooms: Any) -> dict:
            """Nothing to propose."""
            return {}

    return Nothing()


class _Words:
    """A streamer that keeps the text generated so far."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.made: list[int] = []
        self.text = ""
        self.begun = False

    def put(self, value: Any) -> None:
        """The prompt first, then tokens."""
        if self.begun:
            self.made += value.flatten().tolist()
            self.text = self.tokenizer.decode(self.made, skip_special_tokens=True)
        self.begun = True

    def end(self) -> None:
        """Nothing is held back."""


class _screen:
    """Shows the text as it grows with a line of figures under it; on no terminal, each when all is done."""

    def __init__(self, shown: bool) -> None:
        self.shown = shown
        self.live: Any = None
        self.text, self.line = "", ""

    def __enter__(self) -> "Callable[[str, Stats], None]":
        if self.shown and sys.stdout.isatty():
            from rich.live import Live

            self.live = Live(refresh_per_second=8, vertical_overflow="visible")
            self.live.start()
        return self._see

    def _see(self, text: str, stats: "Stats") -> None:
        self.text, self.line = text, figures(stats)
        if self.live is not None:
            from rich.console import Group
            from rich.text import Text

            self.live.update(Group(Text(self.text), Text(self.line, style="dim")))

    def __exit__(self, kind: Any, *_: Any) -> None:
        if self.live is not None:
            self.live.stop()
        elif self.shown and kind is None:
            say(self.text)
            sys.stderr.write(self.line + "\n")


def figures(stats: "Stats") -> str:
    """One line: how fast, how many tokens a pass, how many of the drafted tokens the model agreed to."""
    return (
        f"{stats.tokens} tokens, {stats.tokens_per_second:.1f} a second; {stats.per_pass:.2f} a pass; "
        f"{stats.accepted} of {stats.drafted} drafted tokens accepted ({stats.acceptance:.0%})"
    )


def bench_drafts(
    model: "PreTrainedModel",
    tokenizer: Any,
    names: list[str],
    plans: "dict[str, Plan]",
    packed: "Packed | None",
    how: tuple[int, int, int],
    as_json: bool,
) -> None:
    """Measure drafting methods beside greedy generation and transformers' prompt lookup, and print what was found.

    Args:
        plans: for each, greedy generation and the first method under it are measured too.
        packed: with these weights everything is measured once more.
        how: tokens of an answer, rounds, seed.
    """
    from dataclasses import asdict, replace

    from headwise.data.requests import copying, open_ended
    from headwise.decoding import Way, compare, named_draft, usual

    tokens, rounds, seed = how
    methods = {name: named_draft(name, model, tokenizer) for name in names}
    ways: dict[str, Way] = usual() | {name: Way(method) for name, method in methods.items()}
    for name, plan in plans.items():
        ways[f"plan {name}"] = Way(treatments=plan.treatments())
        first = next(iter(methods), None)
        if first is not None:
            ways[f"plan {name} + {first}"] = Way(methods[first], treatments=plan.treatments())
    if packed is not None:
        ways |= {f"{name}, packed": replace(way, packed=packed) for name, way in ways.items()}
    found: dict[str, Sequence[Speed]] = {}
    for kind, make in (("repeats a text", copying), ("does not", open_ended)):
        found[kind] = compare(model, tokenizer, ways, make(tokenizer, 8, seed), tokens=tokens, rounds=rounds)
    if as_json:
        print_json({kind: [asdict(one) for one in rows] for kind, rows in found.items()})
        return
    columns = ("answer", "method", "tokens a second", "against greedy", "tokens a pass", "accepted", "same text")
    table = [(kind, *_cells(one)) for kind, rows in found.items() for one in rows]
    print_table(columns, table)


def _cells(one: "Speed") -> tuple[str, ...]:
    accepted = "-" if one.acceptance is None else f"{one.acceptance:.0%}"
    return (
        one.name,
        f"{one.tokens_per_second:.1f}",
        f"{one.faster:.2f}x",
        f"{one.per_pass:.2f}",
        accepted,
        f"{one.same:.0%}",
    )
