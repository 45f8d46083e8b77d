"""Text that asks back what it said, and small language models trained on it here, in minutes.

The models are plain Llamas of two layers. What they are given is each token with a turned copy of the token before it,
so that looking up needs one layer, not two, and is learned in a few hundred steps.
"""

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from headwise.attention.landmark import with_landmarks
from headwise.mixing import AttentionMethod, use
from headwise.progress import hidden

KEYS, VALUES, FILLER = 64, 32, 32
LANDMARK = KEYS + VALUES + FILLER


def recalling_text(
    rows: int,
    length: int,
    generator: torch.Generator,
    said: float = 0.2,
    asked: float = 0.3,
    needle: tuple[int, int] | None = None,
) -> Tensor:
    """Token ids [rows, length] of pairs: a key with a value that is new, the same pair said again, or filler.

    A key keeps its value through a row.

    Args:
        rows, length: shape of the text; length is even.
        generator: randomness of the text.
        said, asked: shares of pairs that are new, and that say one again.
        needle: pairs among which one more key stands, once; the last pair says it again.
    """
    pairs = length // 2
    value_of = torch.randint(KEYS, KEYS + VALUES, (rows, KEYS), generator=generator)
    order = torch.rand(rows, KEYS, generator=generator).argsort(1)
    kind = torch.rand(rows, pairs, generator=generator)
    count = (kind < said).cumsum(1).clamp(max=KEYS - 1)
    before = torch.cat([count.new_zeros(rows, 1), count[:, :-1]], 1)
    new = count > before
    again = (kind >= said) & (kind < said + asked) & (before > 0)
    pick = (torch.rand(rows, pairs, generator=generator) * before).long()
    shown = new | again
    rank = torch.where(new, before, pick)
    if needle is not None:
        at = torch.randint(*needle, (rows,), generator=generator)
        for place in (at, torch.full((rows,), pairs - 1)):
            shown[torch.arange(rows), place], rank[torch.arange(rows), place] = True, KEYS - 1
    key = order.gather(1, rank)
    filler = torch.randint(KEYS + VALUES, LANDMARK, (rows, pairs, 2), generator=generator)
    return torch.where(shown[..., None], torch.stack([key, value_of.gather(1, key)], -1), filler).flatten(1)


def is_asked(ids: Tensor) -> Tensor:
    """[rows, pairs] true where the key of a pair has stood in the row before, so that its value can be known."""
    keys = ids[:, 0::2]
    same = (keys[:, :, None] == keys[:, None]).tril(-1).any(-1)
    return same & (keys < KEYS)


def small_model(seed: int = 0, width: int = 64) -> LlamaForCausalLM:
    """An untrained Llama of two layers with two heads each."""
    torch.manual_seed(seed)
    size = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = LlamaConfig(vocab_size=LANDMARK + 1, **size, **ends, max_position_embeddings=4096, initializer_range=0.05)
    model = LlamaForCausalLM(config)
    nn.init.normal_(model.get_input_embeddings().weight)
    return model


def given(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """Embeddings [rows, T, D]: each token, and the one before it under a fixed rotation of all dimensions."""
    own = model.get_input_embeddings()(ids)
    turn = torch.linalg.qr(torch.randn(own.shape[-1], own.shape[-1], generator=torch.Generator().manual_seed(1)))[0]
    return own + nn.functional.pad(own, (0, 0, 1, 0))[:, :-1] @ turn


def answers(
    model: LlamaForCausalLM, ids: Tensor, method: AttentionMethod | None = None, block: int | None = None
) -> Tensor:
    """Logits [rows, pairs, V] for the value of each pair; `block`: put a landmark after every so many tokens."""
    text = ids if block is None else with_landmarks(ids, LANDMARK, block)
    with nullcontext() if method is None else use(model, method):
        logits = model(inputs_embeds=given(model, text), use_cache=False).logits
    return logits[:, text[0] != LANDMARK][:, 0::2]


def nats(logits: Tensor, ids: Tensor, where: Tensor | None = None) -> Tensor:
    """Mean negative log-probability of the values that are asked for, or of those at `where` [rows, pairs]."""
    where = is_asked(ids) if where is None else where
    return nn.functional.cross_entropy(logits[where], ids[:, 1::2][where])


def trained(
    seed: int = 0,
    method: AttentionMethod | None = None,
    block: int | None = None,
    steps: int = 500,
    length: int = 128,
    shares: tuple[float, float] = (0.2, 0.3),
    rate: float = 5e-3,
    name: str = "",
) -> LlamaForCausalLM:
    """A small model that attends by this method and has learned to say the values that are asked for.

    `shares`: how much of the text is new pairs, and asked-for ones; `rate`: the largest learning rate.
    """
    model, generator = small_model(seed), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1.0, (s + 1) / 20) * (1 - s / steps) + 0.02)
    model.train()
    for _ in tqdm(range(steps), desc=f"{name} training", disable=hidden(), leave=False):
        ids = recalling_text(16, length, generator, *shares)
        loss = nats(answers(model, ids, method, block), ids)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval().requires_grad_(False)
