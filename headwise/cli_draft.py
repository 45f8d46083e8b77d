"""The command that trains draft heads: draft train."""

from pathlib import Path
from typing import Annotated

import typer

from headwise.terminal import print_json, print_table, say, sentences, tell

draft_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Heads that guess the next tokens.")
DATA_HELP = "A UTF-8 text file that prompts are cut from. [default: the reference of the Python language]"


@draft_app.callback()
def about() -> None:
    """Heads that guess the next tokens."""


@draft_app.command("train")
def train_command(
    model: Annotated[str, typer.Argument(help="'default', a hub id, a model folder, or a .gguf file.")] = "default",
    method: Annotated[str, typer.Option(help="medusa, hydra, hydra_plus, clover or chimera.")] = "hydra",
    data: Annotated[str, typer.Option(help=DATA_HELP)] = "",
    texts: Annotated[int, typer.Option(help="Texts that the model writes to learn from.", min=2)] = 128,
    prompt: Annotated[int, typer.Option(help="Tokens of a prompt.", min=4)] = 32,
    tokens: Annotated[int, typer.Option(help="Tokens that the model writes after a prompt.", min=8)] = 64,
    temperature: Annotated[float, typer.Option(help="At which it writes; 0 takes the likeliest token.", min=0)] = 0.7,
    steps: Annotated[int, typer.Option(help="Steps of training.", min=1)] = 150,
    rows: Annotated[int, typer.Option(help="Texts of one step.", min=1)] = 4,
    rate: Annotated[float, typer.Option(help="The largest learning rate.")] = 1e-3,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder. [default: drafts/<model>-<method>]")] = None,
    seed: Annotated[int, typer.Option(help="Seed of prompts, texts and training.")] = 0,
    dtype: Annotated[str, typer.Option(help="Type of the weights.")] = "float32",
    device: Annotated[str, typer.Option(help="Where the model runs, such as cpu or cuda.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Train draft heads on what the model itself writes. The same command goes on where it was stopped."""
    with sentences():
        import torch

        from headwise.data import HeldOut
        from headwise.draft_heads import HeadsMethod
        from headwise.draft_training import states_after, texts_in, train
        from headwise.method import load
        from headwise.models import folder_of, open_model

        kind = load(method if "." in method else f"decode.{method}")
        if not issubclass(kind, HeadsMethod):
            raise ValueError(f"{method} has no draft heads; allowed are medusa, hydra, hydra_plus, clover and chimera.")
        tell(f"Opening {model} ...")
        opened, tokenizer = open_model(model, dtype=dtype, device=device)
        folder = out or Path("drafts") / f"{folder_of(model, opened)}-{method.split('.')[-1]}"
        folder.mkdir(parents=True, exist_ok=True)
        prompts = HeldOut(length=prompt, path=data).make(tokenizer, texts, seed).ids
        tell(f"Letting it write {texts} texts of {tokens} tokens ...")
        ids = texts_in(folder, opened, prompts, tokens, temperature=temperature, seed=seed)
        tell(f"Training {steps} steps ...")
        states = states_after(opened, ids)
        cut = max(1, len(ids) * 7 // 8)
        torch.manual_seed(seed)
        heads = kind().untrained(opened).to(opened.device)
        losses = train(
            heads, states[:cut], ids[:cut], steps, rate=rate, rows=rows, seed=seed, folder=folder, name=method
        )
        heads.save_pretrained(folder)
        held = (states[cut:].to(opened.device), ids[cut:].to(opened.device))
        right = [round(share, 4) for share in heads.accuracy(*held)]
        facts = {"folder": str(folder), "method": method, "loss": losses[-1], "losses": losses, "right": right}
        if as_json:
            print_json(facts)
            return
        rows_of = [(str(i + 2), f"{100 * share:.1f} %") for i, share in enumerate(right)]
        print_table(("tokens ahead", "right, of held-out texts"), rows_of)
        say(f"Loss {losses[0]:.3f} -> {losses[-1]:.3f}. Heads: {folder}")
        say(f"Use them: headwise generate {model} --draft {method.split('.')[-1]}:path={folder} --prompt ...")
