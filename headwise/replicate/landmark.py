"""Landmark Attention: Random-Access Infinite Context Length for Transformers. Mohtashami and Jaggi, 2023.
arXiv:2305.16300

Row s091 of the mission. A small model is trained here with landmarks, on text that asks back what it said, and then
looks into two blocks only. Blocks are of 8 tokens where the paper has 50, and the text is made, not natural.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import LlamaForCausalLM

from headwise.attention import Landmark as Method
from headwise.progress import hidden
from headwise.replicate import Outcome, Replication, settle
from headwise.replicate.recall import answers, is_asked, nats, recalling_text, trained

BLOCK, BLOCKS, TOP = 8, 16, 2
LENGTH = BLOCK * BLOCKS
METHOD = Method(block=BLOCK)
LOOKED_UP = Method(block=BLOCK, top=TOP)
FAR = replace(LOOKED_UP, reach=BLOCKS - 1)


def latest_only(model: LlamaForCausalLM, ids: Tensor, back: int) -> tuple[Tensor, Tensor]:
    """Logits and which values are asked, for blocks that see only themselves and `back` blocks before.

    Text is cut into pieces of `back + 1` blocks, and the last block of each is read; what is asked is judged by the
    whole text.
    """
    size = (back + 1) * BLOCK
    pieces = ids.unfold(1, size, BLOCK)
    logits = answers(model, pieces.flatten(0, 1), METHOD, BLOCK).unflatten(0, pieces.shape[:2])
    return logits[:, :, -BLOCK // 2 :].flatten(1, 2), is_asked(ids)[:, back * BLOCK // 2 :]


@dataclass(frozen=True)
class Landmark(Replication):
    """One model with all blocks, two looked-up blocks or the two latest, and needles in text four times as long."""

    row: ClassVar[str] = "s091"
    claim: ClassVar[str] = "Landmarks find the blocks that matter, so that a few looked-up blocks do for all of them."
    paper: ClassVar[str] = "as good as Transformer-XL with fewer tokens looked up; LLaMA 7B extended to 32k"
    changed: ClassVar[str] = (
        "steps and learning rate were raised after a trial that had not settled (0.71 nats a value with all blocks, "
        "now below 0.1). Training the last 60 % of steps with two blocks looked up was tried as well: looking up then "
        "lost less (0.85 nats, against 0.48 with all and 1.44 with the latest), but found no needles either; it is not "
        "in the paper and not used here."
    )

    most_lost: ClassVar[float] = 0.03
    least_won: ClassVar[float] = 0.05
    least_found: ClassVar[float] = 80.0

    def run(self, seed: int = 0) -> Outcome:
        """Nats a value that can be known, behind the first blocks; needles stand in the first half of long text."""
        steps, n = (2500, 256) if self.full else (1200, 64)
        model = trained(seed, METHOD, BLOCK, steps, LENGTH, rate=1e-2, name="s091")
        plain = trained(seed, None, None, steps, LENGTH, rate=1e-2, name="s091 plain")
        draw = torch.Generator().manual_seed(10_000 + seed)
        text = recalling_text(n, LENGTH, draw)
        long = recalling_text(n, 4 * LENGTH, draw, needle=(0, LENGTH))
        with torch.no_grad(), tqdm(total=5, desc="s091 reading", disable=hidden(), leave=False) as bar:
            logits, asked = latest_only(model, text, TOP)
            late = text[:, TOP * BLOCK :]
            found = {"latest": float(nats(logits, late, asked))}
            for name, one, method, block in (
                ("all", model, METHOD, BLOCK),
                ("looked up", model, LOOKED_UP, BLOCK),
                ("plain", plain, None, None),
            ):
                said = answers(one, text, method, block)[:, TOP * BLOCK // 2 :]
                found[name] = float(nats(said, late, asked))
                bar.update()
            needles = {}
            for name, method in (("near", FAR), ("as they stand", LOOKED_UP)):
                said = answers(model, long, method, BLOCK)[:, -1].argmax(-1)
                needles[name] = 100 * float((said == long[:, -1]).float().mean())
                bar.update()
            cut = answers(model, long[:, -LENGTH:], METHOD, BLOCK)[:, -1].argmax(-1)
            needles["cut"] = 100 * float((cut == long[:, -1]).float().mean())
        return self._judge(found, needles, n)

    def _judge(self, nats_of: dict[str, float], needles: dict[str, float], n: int) -> Outcome:
        lost, won = nats_of["looked up"] - nats_of["all"], nats_of["latest"] - nats_of["looked up"]
        checks = {
            f"looking into {TOP} of {BLOCKS} blocks loses at most {self.most_lost} nats": lost <= self.most_lost,
            f"it is at least {self.least_won} nats better than the {TOP} latest blocks": won >= self.least_won,
            f"at least {self.least_found:.0f} % of needles are found at four times the length": needles["near"]
            >= self.least_found,
        }
        measured = (
            f"{nats_of['looked up']:.3f} nats a value with {TOP} blocks looked up, {nats_of['all']:.3f} with all; "
            f"needles {needles['near']:.0f} % at four times the length ({needles['as they stand']:.0f} % with "
            f"positions as they stand); blocks of {BLOCK} tokens, {n} texts"
        )
        baseline = (
            f"the {TOP} latest blocks {nats_of['latest']:.3f} nats, needles {needles['cut']:.0f} % with the latest "
            f"{LENGTH} tokens; plain attention {nats_of['plain']:.3f} nats"
        )
        return settle(measured, baseline, checks, {"nats": nats_of, "needles": needles, "texts": n})
