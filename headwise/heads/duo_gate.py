"""DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads.
Xiao et al., 2024. arXiv:2410.10819

Row s104 of the mission. On SmolLM2-135M-Instruct, 16 prompts of 500 tokens with two passkeys and default fields take
a minute and a half of one core; 45 of 90 gates end below 0.5, and 27 at 0. On other prompts (6 needles, 6 passkeys of
two, 6 keys of four; 500 tokens, window 16 + 64, the question read apart) the 45 KV heads with the largest gates find as
many as all do, and so do the first 30; 45 random ones find 6 and 0 needles (two draws) and no passkey. Rank correlation
is 0.7 with attention to earlier copies (`echo`, `razor_induction`), and 0.3 with measured need.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from headwise.anatomy import anatomy
from headwise.direct import predicts
from headwise.matmul import fast_matmul
from headwise.method import HeadMethod
from headwise.narrow import Window, alone, narrowed
from headwise.probe import evaluating
from headwise.progress import hidden
from headwise.score import Score
from headwise.shares import Opened, opened
from headwise.task import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class DuoGate(HeadMethod):
    """How much full attention each KV head keeps when as many as possible are to see only sinks and recent tokens.

    A gate from 0 to 1 per KV head mixes full and streaming attention. Gates start at 1 and are trained so that the last
    hidden states at the answers stay those of the unchanged model, with a price on every gate that is open.

    Fields:
        steps: prompts gone through, one a step, those of the batch in turn.
        sink, recent: how many first tokens, and how many latest ones (its own included), a streaming head sees.
        lr: learning rate of Adam; it rises over the first fifth of the steps and falls over the last.
        penalty: price of the mean gate, in units of the squared change of a hidden value.
        whole: True reads the context with everything in sight and trains on what follows: many times faster. False is
            the paper's training, in which gates act from the first token on. Models with linear layers know only that.
        seed: of the order of the prompts.
    """

    steps: int = 100
    sink: int = 16
    recent: int = 64
    lr: float = 0.05
    penalty: float = 0.05
    whole: bool = True
    seed: int = 0

    row: ClassVar[str] = "s104"
    needs: ClassVar[str] = "passkeys"

    def score(self, model: "PreTrainedModel", batch: Batch) -> Score:
        """One gate per KV head, 0 to 1. Only gates are trained: the model is left as it was, also after an error.

        Raises:
            ValueError: steps below 1, a window of nothing, or a model that predicts no next token.
        """
        if self.steps < 1:
            raise ValueError(f"steps = {self.steps} trains nothing; allowed are 1 and more.")
        predicts(model, "heads.duo_gate")
        body, window = anatomy(model), Window(self.sink, self.recent)
        gates = {n: torch.ones(body.kv_heads(n), device=model.device, requires_grad=True) for n in body.layers}
        groups = {n: body.heads(n) // body.kv_heads(n) for n in body.layers}

        def mix(layer: int, z: Tensor, near: Callable[[], Tensor]) -> Tensor:
            gate = gates[layer].to(z.dtype).repeat_interleave(groups[layer])[:, None]
            other = near()
            return other + gate * (z - other)

        adam = torch.optim.Adam(gates.values(), lr=self.lr)
        prompts: dict[int, tuple[Opened, Tensor]] = {}
        with still(model), tqdm(total=self.steps, desc="duo gate", disable=hidden(), leave=False) as bar:
            for step, row in enumerate(self._order(len(batch))):
                if row not in prompts:
                    with fast_matmul(model):
                        prompt = self._open(model, alone(batch, row).to(model.device))
                        prompts[row] = prompt, _hidden(model, prompt)
                prompt, wanted = prompts[row]
                with torch.enable_grad(), narrowed(model, window, mix):
                    apart = (_hidden(model, prompt) - wanted).float().square().mean()
                    price = self.penalty * torch.cat(list(gates.values())).mean()
                    slopes = torch.autograd.grad(apart + price, list(gates.values()))
                for gate, slope in zip(gates.values(), slopes, strict=True):
                    gate.grad = slope
                adam.param_groups[0]["lr"] = self.lr * self._rate(step)
                adam.step()
                for gate in gates.values():
                    gate.clamp_(0, 1)
                bar.set_postfix(apart=f"{float(apart):.3f}", mean=f"{float(price) / max(self.penalty, 1e-12):.2f}")
                bar.update()
        return Score.of_heads(self, model, batch, {n: gate.detach() for n, gate in gates.items()}, kind="kv")

    def _open(self, model: "PreTrainedModel", one: Batch) -> Opened:
        """The prompt as it is read. Linear-attention states are changed in place, so gates cannot start from them."""
        prompt = opened(model, one, self.whole)
        return prompt if prompt.repeats else opened(model, one, False)

    def _order(self, rows: int) -> list[int]:
        """The prompt of each step: all of them in a random order, and again in another."""
        draw, order = random.Random(f"duo gate {self.seed}"), []
        while len(order) < self.steps:
            order += draw.sample(range(rows), rows)
        return order[: self.steps]

    def _rate(self, step: int) -> float:
        """Share of the learning rate at a step: up over the first fifth, down over the last, never below a tenth."""
        fifth = max(1.0, self.steps / 5)
        return max(0.1, min(1.0, (step + 1) / fifth, (self.steps - step) / fifth))


def _hidden(model: "PreTrainedModel", prompt: Opened) -> Tensor:
    """[1, P, D] what the last norm gives at the columns that predict the answer."""
    return model.base_model(**prompt.inputs(), use_cache=False).last_hidden_state[:, prompt.one.at[0]]


@contextmanager
def still(model: "PreTrainedModel") -> Iterator[None]:
    """The model in evaluation mode, without gradients of its own weights; afterwards everything is as it was."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    try:
        for weight in trained:
            weight.requires_grad_(False)
        with evaluating(model):
            yield
    finally:
        for weight in trained:
            weight.requires_grad_(True)
