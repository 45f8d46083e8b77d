"""How draft heads are trained: on texts that the model wrote itself, from its own states, the model untouched."""

import json
import math
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from headwise.draft_heads import DraftHeads
from headwise.drafting import last_states
from headwise.models import fingerprint
from headwise.progress import hidden
from headwise.resume import State, load, save
from headwise.tape import Tape
from headwise.writing import write_aside

STATE, TEXTS = "training.safetensors", "texts.safetensors"
LAST_RATE = 0.1


@torch.no_grad()
def self_written(
    model: PreTrainedModel,
    prompts: Tensor,
    new: int = 64,
    *,
    temperature: float = 1.0,
    seed: int = 0,
    rows: int = 16,
    first: int = 0,
) -> Tensor:
    """Prompts [N, P] without padding, and what the model writes after them, [N, P + new].

    Args:
        temperature: at which the model is sampled; 0 takes the likeliest token.
        rows: prompts at a time. What a batch writes hangs on the seed and its number alone; the first is `first`.
    """
    kept, state = [], torch.get_rng_state()
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    try:
        for number, part in enumerate(prompts.split(rows), start=first):
            torch.manual_seed(seed * 100_003 + number)
            options = sampling or {"do_sample": False}
            kept.append(
                model.generate(
                    part.to(model.device),
                    attention_mask=torch.ones_like(part).to(model.device),
                    max_new_tokens=new,
                    min_new_tokens=new,
                    **options,
                ).cpu()
            )
    finally:
        torch.set_rng_state(state)
    return torch.cat(kept)


def texts_in(
    folder: Path,
    model: PreTrainedModel,
    prompts: Tensor,
    new: int = 64,
    *,
    temperature: float = 0.7,
    seed: int = 0,
    rows: int = 16,
    name: str = "writing",
) -> Tensor:
    """What `self_written` gives, kept in a folder batch by batch, so that it goes on where it was stopped.

    Raises:
        ValueError: the folder holds texts of another run.
    """
    path = folder / TEXTS
    asked = {"fingerprint": fingerprint(model), "prompts": [*prompts.shape, int(prompts.sum())], "new": new}
    text = json.dumps(asked | {"temperature": temperature, "seed": seed, "rows": rows})
    kept = prompts.new_empty(0, prompts.shape[1] + new)
    if path.is_file():
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("asked") != text:
                raise ValueError(f"{folder} holds texts of another run; use another folder, or ask for the same.")
            kept = file.get_tensor("ids")
    parts = prompts.split(rows)
    done = len(kept) // rows + bool(len(kept) % rows)
    bar = tqdm(parts[done:], initial=done, total=len(parts), desc=name, disable=hidden(), leave=False)
    for number, part in enumerate(bar, start=done):
        fresh = self_written(model, part, new, temperature=temperature, seed=seed, rows=rows, first=number)
        kept = torch.cat([kept, fresh])
        ids = kept.contiguous()
        write_aside(path, lambda p, ids=ids: save_file({"ids": ids}, p, metadata={"asked": text}))
    return kept


@torch.no_grad()
def states_after(model: PreTrainedModel, ids: Tensor, rows: int = 16) -> Tensor:
    """The last hidden states [N, T, D] that the model has at texts [N, T] without padding."""
    found = []
    for part in ids.split(rows):
        with last_states(model, True) as seen:
            model(input_ids=part.to(model.device), use_cache=False, **_short(model))
        found.append(seen[0].cpu())
    return torch.cat(found)


def _short(model: PreTrainedModel) -> dict[str, int]:
    """No logits but the last, where the model can leave them out."""
    import inspect

    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(type(model).forward).parameters else {}


def train(
    heads: DraftHeads,
    states: Tensor,
    ids: Tensor,
    steps: int = 200,
    *,
    rate: float = 1e-3,
    rows: int = 8,
    seed: int = 0,
    folder: "Path | None" = None,
    every: int = 50,
    name: str = "draft heads",
) -> list[float]:
    """Train heads in place; the model's embedding and unembedding stay.

    Args:
        states: [N, T, D] the model's last hidden states at the texts ids [N, T].
        rate: the largest learning rate, after a tenth of the steps; it falls along a cosine to a tenth.
        rows: texts of one step.
        folder: where the state is kept after every `every` steps; a run that finds one there goes on from it.

    Returns:
        The loss of each step.

    Raises:
        ValueError: no steps or no texts, or a state in the folder that belongs to another run.
    """
    if steps < 1 or rows < 1 or not len(ids):
        raise ValueError(f"{steps} steps of {rows} of {len(ids)} texts were asked for; allowed is 1 or more of each.")
    trained = [p for p in heads.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    asked = {"method": heads.method.identity(), **heads.made_for, "steps": steps, "rate": rate, "rows": rows}
    asked |= {"seed": seed, "texts": list(ids.shape), "text": int(ids.sum())}
    path = None if folder is None else folder / STATE
    state = State(0, [], Tape(), {})
    if path is not None and path.is_file():
        state = load(path, heads, optimiser, asked)
    heads.train()
    device = next(heads.parameters()).device
    bar = tqdm(range(state.step, steps), initial=state.step, total=steps, desc=name, disable=hidden(), leave=False)
    for step in bar:
        for group in optimiser.param_groups:
            group["lr"] = rate * _share(step, steps)
        chosen = _chosen(len(ids), rows, step, seed)
        loss = heads.loss(states[chosen].to(device), ids[chosen].to(device))
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        state.losses.append(float(loss.detach()))
        state.step = step + 1
        bar.set_postfix(loss=f"{state.losses[-1]:.3f}")
        if path is not None and state.step % every == 0:
            save(path, heads, optimiser, state, asked)
    heads.eval()
    if path is not None:
        save(path, heads, optimiser, state, asked)
    return state.losses


def _share(step: int, steps: int) -> float:
    warm = max(1, steps // 10)
    if step < warm:
        return (step + 1) / warm
    return LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))) / 2


def _chosen(count: int, rows: int, step: int, seed: int) -> Tensor:
    """Which texts a step takes: all of them in turn, in an order that is new each time round."""
    places = torch.arange(step * rows, step * rows + rows)
    orders = {
        turn: torch.randperm(count, generator=torch.Generator().manual_seed(seed * 7919 + turn))
        for turn in (places // count).unique().tolist()
    }
    return torch.stack([orders[int(place) // count][int(place) % count] for place in places])
