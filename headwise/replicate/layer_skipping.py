"""Accelerating Inference in Large Language Models with a Unified Layer Skipping Strategy. Liu et al., 2024.
arXiv:2404.06954

Row s130 of the mission. The default model predicts real text with blocks left out evenly, or as one run of blocks, as
dynamic methods in effect leave them out: late ones (early exit), middle or early ones. Nothing is fine-tuned, where the
paper tunes with skipping, and text is predicted, where the paper translates and summarises.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from headwise.data import HeldOut
from headwise.decode import UnifiedSkip
from headwise.models import open_model
from headwise.progress import hidden
from headwise.replicate import Outcome, Replication, settle
from headwise.replicate.runs import shares_of_time
from headwise.skipping import skipping, stack_blocks
from headwise.stats import sign_flip
from headwise.task import Batch, pad_left

SPEEDUPS = (30 / 28, 1.25, 1.5)


def losses(model: PreTrainedModel, batch: Batch, skip: list[int]) -> Tensor:
    """[B] nats a token."""
    rows = []
    with torch.no_grad(), skipping(model, skip):
        for part in batch.chunks(2):
            logits = model(**part.inputs, use_cache=False).logits[:, :-1].float()
            rows.append(torch.nn.functional.cross_entropy(logits.transpose(1, 2), part.ids[:, 1:], reduction="none"))
    return torch.cat(rows).mean(1)


@dataclass(frozen=True)
class LayerSkipping(Replication):
    """Nats a token with as many blocks left out evenly, late, in the middle and early; batches with a cache."""

    row: ClassVar[str] = "s130"
    claim: ClassVar[str] = "Blocks left out evenly lose less than neighbouring ones, and batches and KV caches work."
    paper: ClassVar[str] = "better translation and summaries than dynamic skipping at each target speed-up"

    changed: ClassVar[str] = (
        "the first run counted blocks and took no time; whether processor time falls as asked, within the mission's "
        "10 %, was added with the second. Nothing else was changed."
    )

    largest_p: ClassVar[float] = 0.05
    most_off: ClassVar[float] = 0.1

    def run(self, seed: int = 0) -> Outcome:
        """Windows of held-out text; the same windows for every way of leaving out."""
        model, tokenizer = open_model("default")
        batch = HeldOut(length=256).make(tokenizer, 16 if self.full else 8, seed)
        total = len(stack_blocks(model))
        lost: dict[str, dict[str, float]] = {}
        worst_p = 0.0
        with tqdm(total=1 + 4 * len(SPEEDUPS), desc="s130 windows", disable=hidden(), leave=False) as bar:
            whole = losses(model, batch, [])
            bar.update()
            for speedup in SPEEDUPS:
                skip = UnifiedSkip(speedup).skipped(model)
                middle = (total - len(skip)) // 2
                starts = {"late": total - 1 - len(skip), "middle": middle, "early": 1}
                found = {"even": losses(model, batch, skip)}
                bar.update()
                for name, start in starts.items():
                    found[name] = losses(model, batch, list(range(start, start + len(skip))))
                    bar.update()
                    p = sign_flip((found[name] - found["even"]).numpy(), seed=seed)
                    worst_p = max(worst_p, p)
                lost[f"{len(skip)} of {total}"] = {n: float((one - whole).mean()) for n, one in found.items()}
        same, told = self._agrees(model, tokenizer.eos_token_id, batch)
        faster = self._faster(model, batch.ids[:4, :40])
        return self._judge(lost, float(whole.mean()), worst_p, (same, told), faster, len(batch))

    def _faster(self, model: PreTrainedModel, ids: Tensor) -> dict[float, float]:
        """{speed-up asked for: processor time of generating with the whole model over that with blocks left out}."""
        how: dict[str, Any] = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
        how |= {"attention_mask": torch.ones_like(ids)}
        ways = {one: partial(UnifiedSkip(one).generate, model, ids, **how) for one in (1.0, *SPEEDUPS)}
        return {one: 1 / share for one, share in shares_of_time(ways, 1.0, rounds=5).items() if one != 1.0}

    def _agrees(self, model: PreTrainedModel, pad: int, batch: Batch) -> tuple[float, float]:
        """Percent of tokens that a padded batch with a cache says as single rows do without; blocks run over wanted."""
        method, new = UnifiedSkip(1.25), 16
        rows = [row[:n].tolist() for row, n in zip(batch.ids[:4], (40, 23, 31, 9), strict=True)]
        ids, mask = pad_left(rows, pad)
        right = 0
        with torch.no_grad(), method.use(model) as depths:
            said = model.generate(ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False)
            told = depths.mean / (depths.blocks / method.speedup)
            for row, text in zip(said[:, ids.shape[1] :].tolist(), rows, strict=True):
                for token in row:
                    logits = model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1]
                    logits[pad] = -torch.inf
                    right += int(logits.argmax()) == token
                    text = [*text, token]
        return 100 * right / said[:, ids.shape[1] :].numel(), told

    def _judge(
        self, lost: dict, whole: float, p: float, cache: tuple[float, float], faster: dict[float, float], n: int
    ) -> Outcome:
        same, told = cache
        least = min(min(v for name, v in one.items() if name != "even") - one["even"] for one in lost.values())
        checks = {
            "evenly left out blocks lose less than late, middle and early runs of as many, at every speed-up": least
            > 0,
            f"each of these differences has p below {self.largest_p}": p < self.largest_p,
            "a padded batch with a cache says what single rows say without one": same == 100,
            f"blocks run are within {self.most_off:.0%} of what the speed-up asks for": abs(told - 1) <= self.most_off,
            f"processor time falls as asked, within {self.most_off:.0%}, at every speed-up": all(
                abs(found / one - 1) <= self.most_off for one, found in faster.items()
            ),
        }

        def words(names: tuple[str, ...]) -> str:
            return "; ".join(
                f"{skip}: " + ", ".join(f"{name} +{one[name]:.2f}" for name in names) for skip, one in lost.items()
            )

        measured = (
            f"nats a token lost with blocks left out evenly, {words(('even',))} (the whole model {whole:.2f}); "
            f"{same:.0f} % of tokens the same in batches; processor time "
            + ", ".join(f"{found:.2f} times less where {one:.2f} was asked for" for one, found in faster.items())
            + f"; untuned, {n} windows"
        )
        numbers = {"lost": lost, "whole": whole, "p": p, "same": same, "blocks": told}
        numbers["faster"] = {f"{one:.2f}": found for one, found in faster.items()}
        return settle(measured, f"runs of neighbours, {words(('late', 'middle', 'early'))}", checks, numbers)
