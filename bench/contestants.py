"""The contestants. Each takes (job, model folder, tensors), opens the model, and serves orders until told to end.

Jobs: "reads" (z and resid_post of all layers), "patterns", "scan_last" (zero one head, log-probability of the answer in
the last column), "scan_all" (the same, mean over all columns). tensors: ids [B, T]. "answers" goes on from prompts.
"""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from worker import answer, await_order

HEAD_DIM = 64


def _open(folder: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention).eval()


def _inputs(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"input_ids": tensors["ids"], "attention_mask": torch.ones_like(tensors["ids"])}


def _place(unit: str) -> tuple[int, int]:
    layer, index = unit.split(".")
    return int(layer[1:]), int(index[1:])


def _metric(logits: Tensor, ids: Tensor, answer_ids: Tensor, job: str) -> Tensor:
    """[B] log-probability of the answer: of the last column's, or the mean over all columns that have a next token."""
    if job == "scan_last":
        return logits[:, -1].float().log_softmax(-1).gather(-1, answer_ids).squeeze(-1)
    return -F.cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none").mean(-1)


def _sums(*groups: list[Tensor]) -> list[float]:
    return [float(sum(value.double().sum() for value in group)) for group in groups]


def _serve(run: Callable[[str], object], tell: Callable[[object], object] = lambda value: None) -> None:
    """Run once per order. What the first run read is summed and told, so that the contestants can be compared."""
    first = True
    while True:
        value = run(await_order())
        told = tell(value) if first else None
        first = False
        answer(told)


def _serve_scan(run: Callable[[str | None], Tensor]) -> None:
    """Zero the ordered head and tell the metric; the order "base" changes nothing."""
    while True:
        order = await_order()
        answer(run(None if order == "base" else order).tolist())


def bare(job: str, folder: str, tensors: dict[str, Tensor]) -> None:
    """The forward pass alone: SDPA, or eager where patterns are the job."""
    model, inputs = _open(folder, "eager" if job == "patterns" else "sdpa"), _inputs(tensors)

    def run(_: str) -> None:
        with torch.no_grad():
            model(**inputs, use_cache=False)

    _serve(run)


def hooks(job: str, folder: str, tensors: dict[str, Tensor]) -> None:
    """Plain transformers: forward hooks, output_attentions, or the naive ablation loop with full logits."""
    model, inputs = _open(folder, "eager" if job == "patterns" else "sdpa"), _inputs(tensors)
    layers = model.model.layers
    if job.startswith("scan"):
        _serve_scan(_hook_loop(model, inputs, tensors, job, restrict=False))

    def read(_: str) -> tuple[list[Tensor], list[Tensor]]:
        z: list[Tensor] = []
        residual: list[Tensor] = []
        handles = [m.self_attn.o_proj.register_forward_pre_hook(lambda _, a: z.append(a[0])) for m in layers]
        handles += [m.register_forward_hook(lambda _, a, out: residual.append(out)) for m in layers]
        with torch.no_grad():
            model(**inputs, use_cache=False)
        for handle in handles:
            handle.remove()
        return z, residual

    def patterns(_: str) -> tuple[list[Tensor]]:
        with torch.no_grad():
            return (list(model(**inputs, use_cache=False, output_attentions=True).attentions),)

    _serve(patterns if job == "patterns" else read, lambda groups: _sums(*groups))


def hooks_restricted(job: str, folder: str, tensors: dict[str, Tensor]) -> None:
    """The naive ablation loop, told to compute only the logits that the metric reads."""
    _serve_scan(_hook_loop(_open(folder), _inputs(tensors), tensors, job, restrict=job == "scan_last"))


def _hook_loop(model, inputs: dict[str, Tensor], tensors: dict[str, Tensor], job: str, restrict: bool):
    layers = model.model.layers

    def run(unit: str | None) -> Tensor:
        handle = None
        if unit is not None:
            layer, index = _place(unit)

            def zero(_: torch.nn.Module, args: tuple) -> tuple:
                z = args[0].clone()
                z[..., index * HEAD_DIM : (index + 1) * HEAD_DIM] = 0
                return (z, *args[1:])

            handle = layers[layer].self_attn.o_proj.register_forward_pre_hook(zero)
        with torch.no_grad():
            logits = model(**inputs, use_cache=False, **({"logits_to_keep": 1} if restrict else {})).logits
            if handle is not None:
                handle.remove()
            return _metric(logits, tensors["ids"], tensors["answer"], job)

    return run


def headwise(job: str, folder: str, tensors: dict[str, Tensor]) -> None:
    """headwise as it comes."""
    from headwise.models import open_model
    from headwise.tap import tap

    model = open_model(folder)[0]
    inputs = _inputs(tensors)
    if job.startswith("scan"):
        _scan(model, inputs, tensors, job)

    def read(_: str):
        with torch.no_grad(), tap(model, *(("pattern",) if job == "patterns" else ("z", "resid_post"))) as t:
            model(**inputs, use_cache=False)
        return t

    def tell(t) -> list[float]:
        kinds = ("pattern",) if job == "patterns" else ("z", "resid_post")
        return _sums(*(list(t.by_layer(kind).values()) for kind in kinds))

    _serve(read, tell)


def headwise_blas(job: str, folder: str, tensors: dict[str, Tensor]) -> None:
    """headwise with PyTorch's own matrix products: what sharing the prefix gives by itself."""
    from headwise import matmul

    matmul.offered = lambda *_: False
    headwise(job, folder, tensors)


def headwise_bf16(job: str, folder: str, tensors: dict[str, Tensor]) -> None:
    """headwise with bfloat16 rows."""
    from headwise.models import open_model

    _scan(open_model(folder)[0], _inputs(tensors), tensors, job, dtype="bfloat16")


def _scan(model, inputs: dict[str, Tensor], tensors: dict[str, Tensor], job: str, **options: str) -> None:
    """One call of `effects`. The metric, which it calls after every forward pass, waits for the next order.

    The first orders are answered by what the scan needs once: its base run, and its test that starting from the deepest
    layer gives the same.
    """
    import sys

    from headwise.scan import effects
    from headwise.task import Batch, logprob

    ids = tensors["ids"]
    last = ids.shape[1] - 1
    if job == "scan_last":
        batch = Batch(inputs, at=torch.full((len(ids), 1), last), answer=tensors["answer"])
    else:
        batch = Batch(inputs, at=torch.arange(last).expand(len(ids), -1), answer=ids[:, 1:])

    def metric(logits: Tensor, part: Batch) -> Tensor:
        value = logprob(logits, part)
        answer(value.tolist())
        await_order()
        return value

    units = await_order().split()
    effects(model, batch, units, "zero", metric, **options)
    sys.exit(0)


def transformer_lens(job: str, folder: str, tensors: dict[str, Tensor]) -> None:
    """TransformerLens: run_with_cache filtered to the same sites, run_with_hooks for the loop."""
    from transformer_lens.model_bridge import TransformerBridge

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = TransformerBridge.boot_transformers(folder, hf_model=_open(folder, "eager"), tokenizer=tokenizer)
    ids, layers = tensors["ids"], range(model.cfg.n_layers)
    if job == "patterns":
        groups = [[f"blocks.{n}.attn.hook_pattern" for n in layers]]
    else:
        groups = [[f"blocks.{n}.attn.hook_z" for n in layers], [f"blocks.{n}.hook_resid_post" for n in layers]]
    names = {name for group in groups for name in group}

    def read(_: str):
        with torch.no_grad():
            return model.run_with_cache(ids, names_filter=lambda name: name in names)[1]

    def run(unit: str | None) -> Tensor:
        wanted = []
        if unit is not None:
            layer, index = _place(unit)

            def zero(z: Tensor, hook: object) -> Tensor:
                if z.ndim == 4:
                    z[:, :, index] = 0
                else:
                    z[..., index * HEAD_DIM : (index + 1) * HEAD_DIM] = 0
                return z

            wanted = [(f"blocks.{layer}.attn.hook_z", zero)]
        with torch.no_grad():
            return _metric(model.run_with_hooks(ids, fwd_hooks=wanted), ids, tensors["answer"], job)

    if job.startswith("scan"):
        _serve_scan(run)
    _serve(read, lambda cache: _sums(*([cache[name] for name in group] for group in groups)))


def nnsight(job: str, folder: str, tensors: dict[str, Tensor]) -> None:
    """nnsight: one trace with saves; in the loop one trace a head, with restricted logits, which it allows."""
    from nnsight import LanguageModel, save

    tokenizer = AutoTokenizer.from_pretrained(folder)
    lm = LanguageModel(_open(folder, "eager" if job == "patterns" else "sdpa"), tokenizer=tokenizer)
    inputs = _inputs(tensors)
    ids = tensors["ids"]

    def read(_: str):
        with torch.no_grad(), lm.trace(inputs, use_cache=False):
            z = save([])
            residual = save([])
            for layer in lm.model.layers:
                z.append(layer.self_attn.o_proj.input)
                residual.append(layer.output)
        return z, residual

    def patterns(_: str):
        with torch.no_grad(), lm.trace(inputs, use_cache=False):
            found = save([])
            for layer in lm.model.layers:
                found.append(layer.self_attn.output[1])
        return (found,)

    keep = {"logits_to_keep": 1} if job == "scan_last" else {}

    def run(unit: str | None) -> Tensor:
        if unit is None:
            with torch.no_grad(), lm.trace(inputs, use_cache=False, **keep):
                logits = save(lm.lm_head.output)
        else:
            number, index = _place(unit)
            with torch.no_grad(), lm.trace(inputs, use_cache=False, **keep):
                lm.model.layers[number].self_attn.o_proj.input[..., index * HEAD_DIM : (index + 1) * HEAD_DIM] = 0
                logits = save(lm.lm_head.output)
        return _metric(logits, ids, tensors["answer"], job)

    if job.startswith("scan"):
        _serve_scan(run)
    _serve(patterns if job == "patterns" else read, lambda groups: _sums(*groups))


def _serve_answers(tensors: dict[str, Tensor], ways: dict[str, Callable[[Tensor, Tensor], list[Tensor]]]) -> None:
    """Answer the rows that an order names in the way that it names: {"way", "rows"}; told are the new tokens.

    tensors: ids [N, T], padded on the left, and their mask.
    """
    while True:
        order = json.loads(await_order())
        ids, mask = (tensors[name][slice(*order["rows"])] for name in ("ids", "mask"))
        widest = int(mask.sum(1).max())
        said = ways[order["way"]](ids[:, -widest:], mask[:, -widest:])
        answer([one.tolist() for one in said])


def _rows(ids: Tensor, mask: Tensor) -> list[Tensor]:
    """Prompts without their padding."""
    return [row[real.bool()] for row, real in zip(ids, mask, strict=True)]


def headwise_drafts(job: str, folder: str, tensors: dict[str, Tensor]) -> None:
    """Plain greedy generation and CopySpec of a padded batch; and plain generation of each row by itself."""
    from headwise.decode import CopySpec
    from headwise.models import open_model
    from headwise.packing import Packed

    model, how = open_model(folder)[0], {"max_new_tokens": int(tensors["most"]), "do_sample": False}
    try:
        packed = Packed(model)
    except ValueError:  # a processor for which there is nothing to pack
        packed = nullcontext()

    def plain(ids: Tensor, mask: Tensor) -> list[Tensor]:
        return list(model.generate(ids, attention_mask=mask, **how)[:, ids.shape[1] :])

    def alone(ids: Tensor, mask: Tensor) -> list[Tensor]:
        return [plain(row[None], torch.ones_like(row)[None])[0] for row in _rows(ids, mask)]

    def drafted(method: CopySpec, weights: AbstractContextManager, ids: Tensor, mask: Tensor) -> list[Tensor]:
        with weights:
            return list(method.generate(model, ids, attention_mask=mask, **how).ids[:, ids.shape[1] :])

    ways = {"greedy": plain, "greedy, row by row": alone}
    for name, weights in (("", nullcontext()), (", packed", packed)):
        ways[f"CopySpec{name}"] = partial(drafted, CopySpec(), weights)
        ways[f"CopySpec, 6 tokens{name}"] = partial(drafted, CopySpec(tokens=6), weights)
    _serve_answers(tensors, ways)


def economize(job: str, folder: str, tensors: dict[str, Tensor]) -> None:
    """Its batches without drafts, and with prompt lookup: as it comes, with longer drafts, and after runs of three."""
    import economize as peer
    from economize.techniques.lookup import LookupConfig

    base, most = _open(folder), int(tensors["most"])
    ends = base.generation_config.eos_token_id
    usual, runs = (peer.apply(base, LookupConfig(min_ngram=least)) for least in (1, 3))

    def way(model, cycle: int) -> Callable[[Tensor, Tensor], list[Tensor]]:
        how = {"decoding": peer.DecodeConfig(cycle_length=cycle), "stop": ends}
        return lambda ids, mask: [one.tokens for one in model.decode_batch(_rows(ids, mask), most, **how)]

    _serve_answers(
        tensors,
        {
            "greedy": way(usual, 1),
            "lookup, 3 tokens": way(usual, 4),
            "lookup, 10 tokens": way(usual, 11),
            "lookup, 24 tokens after runs of 3": way(runs, 25),
        },
    )


def dejavuu(job: str, folder: str, tensors: dict[str, Tensor]) -> None:
    """Its CopySpec as it comes, on transformers; row by row, as it knows no batches."""
    from dejavuu.core.engine import generate
    from dejavuu.decoders.hf import HFBackend
    from dejavuu.drafters import make_drafter

    model = HFBackend(folder, device="cpu", dtype="float32", attn_implementation="sdpa", emit_hidden=False)
    ends, most = model._model.generation_config.eos_token_id, int(tensors["most"])

    def run(ids: Tensor, mask: Tensor) -> list[Tensor]:
        rows = [row.tolist() for row in _rows(ids, mask)]
        return [torch.tensor(generate(model, row, most, make_drafter("copyspec"), eos=ends).tokens) for row in rows]

    _serve_answers(tensors, {"copyspec": run})


dejavuu_older = dejavuu
