"""Making the Most of your Model: Methods for Finetuning and Applying Pretrained Transformers. Yoshida, 2024.
arXiv:2408.16241

The second half of the replication of row s067, whose first is in hidden_states.py. The default model goes on with real
text by beams. A classifier learns from its beams and samples after other texts what beginnings become degenerate; the
search is then conditioned on it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headwise.data import HeldOut
from headwise.decode import ConditionalBeams
from headwise.progress import hidden
from headwise.replicate.runs import continued

PROMPT, ROWS = 32, 8
Found = tuple[list[int], float]  # a text without its end, and its mean log-probability in nats a token
Part = tuple[str, str, dict[str, bool], dict[str, Any]]


@dataclass(frozen=True)
class ConditionedBeams:
    """Degenerate texts and their likelihood, by beams, by beams of which the best good one is kept, and conditioned.

    Fields:
        n: prompts to learn from, and as many to search after.
        least_before: percent of ordinary beams that must be degenerate for there to be something to mend.
    """

    n: int = 16
    least_before: float = 20.0

    def run(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> Part:
        """Learn from texts after some prompts, search after others."""
        method, n = ConditionalBeams(most=32), self.n
        task = HeldOut(length=PROMPT)
        dev, test = (task.make(tokenizer, n, at).ids for at in (seed + 1000, seed))
        plain, every = {"num_beams": method.beams}, {"num_return_sequences": method.beams}
        torch.manual_seed(seed)
        with tqdm(total=4 * n, desc="s067 texts", disable=hidden(), leave=False) as bar:
            known = [
                one[0]
                for options in ({"do_sample": True, "top_k": 0}, {**plain, **every})
                for texts in self._all(model, dev, method, options, bar)
                for one in texts
            ]
            judge = method.learn(known)
            beams = self._all(model, test, method, {**plain, **every}, bar)
            ours = self._all(model, test, method, {"judge": judge}, bar)
        return self.judged(method, beams, [texts[0] for texts in ours])

    def _all(
        self, model: PreTrainedModel, prompts: Tensor, method: ConditionalBeams, options: dict[str, Any], bar: tqdm
    ) -> list[list[Found]]:
        """For each prompt the texts that are returned, the best first."""
        found: list[list[Found]] = []
        for part in prompts.split(ROWS):
            how: dict[str, Any] = {"attention_mask": torch.ones_like(part), "max_new_tokens": method.most}
            if "judge" in options:
                out = method.generate(model, part, **how, **options).ids
            else:
                out = model.generate(part, **{"do_sample": False, **how, **options})
            texts = self._told(model, out)
            size = len(texts) // len(part)
            found += [texts[start : start + size] for start in range(0, len(texts), size)]
            bar.update(len(part))
        return found

    def _told(self, model: PreTrainedModel, out: Tensor) -> list[Found]:
        logs = torch.cat([continued(model, part, PROMPT) for part in out.split(ROWS)]).tolist()
        end, found = model.generation_config.eos_token_id, []
        for text, said in zip(out[:, PROMPT:].tolist(), logs, strict=True):
            stop = text.index(end) if end in text else len(text)
            told = said[: stop + 1]
            found.append((text[:stop], sum(told) / len(told)))
        return found

    def judged(self, method: ConditionalBeams, beams: list[list[Found]], ours: list[Found]) -> Part:
        """Of what every search found after each prompt: the words, the baseline's words, the checks, the numbers."""
        n = len(ours)
        bad = 100 * sum(method.degenerate(texts[0][0]) for texts in beams) / n
        left = sum(method.degenerate(text) for text, _ in ours)
        good = [max((log for text, log in texts if not method.degenerate(text)), default=None) for texts in beams]
        pairs = [(log, kept) for (_, log), kept in zip(ours, good, strict=True) if kept is not None]
        mean, kept = ([sum(one) / len(pairs) for one in zip(*pairs, strict=True)]) if pairs else (0.0, 0.0)
        checks = {
            "no text of the conditioned search is degenerate": left == 0,
            "where ordinary beams hold a good text, ours are as likely as the best of those": bool(pairs)
            and mean >= kept,
            f"at least {self.least_before:.0f} % of ordinary beams are degenerate": bad >= self.least_before,
        }
        every = sum(log for _, log in ours) / n
        measured = (
            f"{left} of {n} texts degenerate at {every:.3f} nats a token; where ordinary beams hold a good text "
            f"({len(pairs)} prompts) {mean:.3f} nats a token"
        )
        top = sum(texts[0][1] for texts in beams) / n
        baseline = (
            f"ordinary beams: {bad:.0f} % degenerate at {top:.3f} nats a token; the best good one of "
            f"{method.beams}: none for {n - len(pairs)} prompts, else {kept:.3f}"
        )
        numbers = {"ours": [log for _, log in ours], "beams": [texts[0][1] for texts in beams], "filtered": good}
        return measured, baseline, checks, {**numbers, "degenerate": {"ours": left, "beams %": bad}}
