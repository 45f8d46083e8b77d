"""One contestant of the circuit race, in its own environment: circuits_worker.py NAME JOB FOLDER BATCH OUT ROUNDS.

JOB is eap, eap_ig (five gradients) or mask_gradient (five points, the last of which adds nothing). Writes seconds by
round, and the score of every edge under headwise's name.
"""

import json
import os
import sys
import time
from collections import defaultdict

import torch

STEPS = 5


def hooked(folder: str, length: int):
    """The model in TransformerLens 3.8, whose registry does not know it: converted by its own Llama converter."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions.llama import convert_llama_weights
    from transformers import AutoModelForCausalLM

    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    c = hf.config
    rope = getattr(c, "rope_theta", None) or c.rope_parameters["rope_theta"]
    size = c.hidden_size // c.num_attention_heads
    cfg = HookedTransformerConfig(
        d_model=c.hidden_size, d_head=size, n_heads=c.num_attention_heads, n_key_value_heads=c.num_key_value_heads,
        d_mlp=c.intermediate_size, n_layers=c.num_hidden_layers, n_ctx=length, eps=c.rms_norm_eps,
        d_vocab=c.vocab_size, act_fn=c.hidden_act, normalization_type="RMS", positional_embedding_type="rotary",
        rotary_dim=size, rotary_adjacent_pairs=False, rotary_base=int(rope), final_rms=True, gated_mlp=True,
        device="cpu", dtype=torch.float32,
    )  # fmt: skip
    model = HookedTransformer(cfg)
    model.load_state_dict(convert_llama_weights(hf, cfg), strict=False)
    model.set_ungroup_grouped_query_attention(True)
    model.set_use_attn_result(True)
    model.set_use_split_qkv_input(True)
    model.set_use_hook_mlp_in(True)
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad = False
    return hf, model


def place(text: str) -> str:
    """circuitkit's and AutoCircuit's names of places as headwise's, without the side of a head."""
    if text in ("input", "Resid Start"):
        return "embed"
    if text in ("logits", "Resid End"):
        return "logits"
    if text.startswith("MLP "):
        return f"L{text[4:]}.mlp"
    if text[0] == "m":
        return f"L{text[1:]}.mlp"
    layer, head = text[1:].replace(".h", ".").split(".")[:2]
    return f"L{layer}.H{head}"


def reader(name: str, side: str, share: int) -> str:
    """A head's input; keys and values belong to the KV head that `share` heads read."""
    if not side:
        return name
    layer, head = name.split(".H")
    return f"{name}.q" if side == "q" else f"{layer}.G{int(head) // share}.{side}"


class CircuitKit:
    def __init__(self, folder: str, batch: dict) -> None:
        import circuitkit  # noqa: F401 before transformer_lens, as it asks
        from circuitkit.backends.eap import attribute as module
        from circuitkit.backends.eap.graph import Graph

        self.hf, self.model = hooked(folder, batch["clean"].shape[1])
        self.module, self.graph, self.batch = module, Graph, batch
        mask = torch.ones_like(batch["clean"])
        length = batch["clean"].shape[1]
        lengths = torch.full((len(mask),), length)
        # Prompts are given as tokens, so that all contestants read the same ones.
        module.tokenize_batch_pair = lambda *_, **__: (batch["clean"], batch["corrupt"], mask, mask, lengths, length)

    def run(self, job: str) -> dict:
        batch, rows = self.batch, torch.arange(len(self.batch["clean"]))
        # EAP goes back to the embedding, so that must ask for a gradient; EAP-IG puts in one that does.
        self.model.W_E.requires_grad_(job == "eap")

        def metric(logits, clean_logits, lengths, label):
            last = logits[:, -1]
            return (last[rows, batch["answer"]] - last[rows, batch["foil"]]).mean()

        graph = self.graph.from_model(self.model)
        loader = [(["?"] * len(rows), ["?"] * len(rows), rows)]
        how = {"eap": ("EAP", None), "eap_ig": ("EAP-IG-inputs", STEPS)}[job]
        self.module.attribute(self.model, graph, loader, metric, how[0], ig_steps=how[1], quiet=True)
        share = self.hf.config.num_attention_heads // self.hf.config.num_key_value_heads
        found = defaultdict(float)
        for edge in graph.edges.values():
            target = reader(place(edge.child.name), edge.qkv or "", share)
            found[f"{place(edge.parent.name)} {target}"] += float(edge.score)
        return found


def as_it_was() -> None:
    """TransformerLens 3.8 holds keys and values under another name and module than the one that AutoCircuit imports."""
    import transformer_lens
    from transformer_lens.cache import key_value_cache

    known = transformer_lens.TransformerLensKeyValueCache
    for module in (transformer_lens, key_value_cache):
        module.HookedTransformerKeyValueCache = known
    sys.modules["transformer_lens.past_key_value_caching"] = key_value_cache


class AutoCircuit:
    def __init__(self, folder: str, batch: dict) -> None:
        as_it_was()
        from auto_circuit.data import PromptDataLoader, PromptDataset
        from auto_circuit.utils.graph_utils import patchable_model

        self.hf, inner = hooked(folder, batch["clean"].shape[1])
        self.plain = inner
        rows = PromptDataset(
            list(batch["clean"]), list(batch["corrupt"]), list(batch["answer"][:, None]), list(batch["foil"][:, None])
        )
        self.loader = PromptDataLoader(rows, seq_len=None, diverge_idx=0, batch_size=len(batch["clean"]))
        self.model = patchable_model(inner, factorized=True, slice_output="last_seq", separate_qkv=True)

    def run(self, job: str) -> dict:
        from auto_circuit.prune_algos.mask_gradient import mask_gradient_prune_scores

        steps = {"eap": {"mask_val": 0.0}, "mask_gradient": {"integrated_grad_samples": STEPS - 1}}[job]
        for wrapper in self.model.dest_wrappers:
            if wrapper.patch_mask.grad is not None:
                wrapper.patch_mask.grad = None
        scores = mask_gradient_prune_scores(
            self.model, self.loader, None, grad_function="logit", answer_function="avg_diff", **steps
        )
        share = self.hf.config.num_attention_heads // self.hf.config.num_key_value_heads
        found = defaultdict(float)
        for edge in self.model.edges:
            parts = edge.dest.name.rsplit(".", 1)
            side = parts[1].lower() if edge.dest.name[0] == "A" else ""
            target = reader(place(parts[0] if side else edge.dest.name), side, share)
            found[f"{place(edge.src.name)} {target}"] += float(scores[edge.dest.module_name][edge.patch_idx])
        return found


class Headwise:
    def __init__(self, folder: str, batch: dict) -> None:
        import headwise as hw
        from headwise.task import Batch

        self.model, _ = hw.open_model(folder)
        mask = torch.ones_like(batch["clean"])
        at = torch.full((len(mask), 1), mask.shape[1] - 1)
        self.batch = Batch(
            {"input_ids": batch["clean"], "attention_mask": mask}, at=at, answer=batch["answer"][:, None],
            foil=batch["foil"][:, None], corrupt={"input_ids": batch["corrupt"], "attention_mask": mask},
        )  # fmt: skip

    def run(self, job: str) -> dict:
        from headwise.circuits import Eap, EapIg, MaskGradient

        # Where all masks are on, every source writes what the corrupt prompt has it write: that gradient is 0.
        methods = {"eap": Eap(), "eap_ig": EapIg(steps=STEPS), "mask_gradient": MaskGradient(steps=STEPS - 1)}
        graph = methods[job].find(self.model, self.batch)
        return {f"{s} {t}": w for (s, t), w in zip(graph.edges, graph.table["weight"].to_list(), strict=True)}


def main() -> None:
    name, job, folder, file, out, rounds = sys.argv[1:]
    from safetensors.torch import load_file

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    batch = load_file(file)
    one = {"circuitkit": CircuitKit, "auto_circuit": AutoCircuit, "headwise": Headwise}[name](folder, batch)
    apart = None
    if hasattr(one, "hf"):
        with torch.no_grad():
            plain = one.hf(batch["clean"]).logits[:, -1]
            theirs = (getattr(one, "plain", one.model))(batch["clean"])[:, -1]
            apart = float((plain - theirs).abs().max())
    clocks = []
    for _ in range(int(rounds)):
        began, worked = time.perf_counter(), time.process_time()
        scores = one.run(job)
        clocks.append({"wall": time.perf_counter() - began, "cpu": time.process_time() - worked})
    with open(out, "w") as file:
        json.dump({"clocks": clocks, "logits_apart": apart, "scores": scores}, file)


if __name__ == "__main__":
    main()
