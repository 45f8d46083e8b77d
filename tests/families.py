"""Tiny models with random weights, one of each family that headwise must read, and inputs for them.

Weights are drawn wide enough that attention patterns are far from uniform: a wrong mask or scale shows.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

VOCAB = 64
_LLAMA: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_GPT2 = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "vocab_size": VOCAB,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_BERT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
_MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
_DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 3,
}
_MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}


@dataclass(frozen=True)
class Family:
    """How to build one tiny model: the class's name, the config's fields, and what is special about it."""

    model: str
    config: str
    fields: dict[str, Any] = field(default_factory=dict)
    kind: str = "decoder"
    attention: str | None = None  # what transformers chooses: SDPA where the type has it

    def build(self, attention: str | None = None, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        torch.manual_seed(seed)
        config = getattr(transformers, self.config)(**self.fields)
        config._attn_implementation = attention or self.attention
        model = getattr(transformers, self.model)(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim >= 2 and "embed" not in name and "wte" not in name:
                    parameter.normal_(0, 0.6 / parameter.shape[-1] ** 0.5 * 2)
                elif parameter.ndim == 1 and not torch.all(parameter == parameter[0]):
                    parameter.normal_(0, 0.3)
                elif parameter.ndim >= 2:
                    parameter.normal_(0, 1)
        model.tie_weights()
        return model.to(dtype)

    def inputs(self, rows: int = 3, length: int = 10, seed: int = 0, padded: bool = False) -> dict[str, Tensor]:
        """Inputs of the model; `padded` pads each row on the left by another amount (the first row by nothing)."""
        generator = torch.Generator().manual_seed(seed)
        if self.kind == "vision":
            return {"pixel_values": torch.randn(rows, 3, 16, 16, generator=generator)}
        ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
        if not padded:
            inputs = {"input_ids": ids}
        else:
            mask = (torch.arange(length) >= 2 * torch.arange(rows)[:, None]).long()
            inputs = {"input_ids": ids * mask, "attention_mask": mask}
        if self.kind == "both":
            inputs["decoder_input_ids"] = torch.randint(3, VOCAB, (rows, length - 3), generator=generator)
        return inputs


def _llama(name: str, **more: Any) -> Family:
    return Family(f"{name}ForCausalLM", f"{name}Config", {**_LLAMA, **more})


FAMILIES: dict[str, Family] = {
    "llama": _llama("Llama"),
    "qwen2": _llama("Qwen2"),
    "qwen3": _llama("Qwen3", head_dim=8),
    "mistral": _llama("Mistral", sliding_window=4),
    "mixtral": _llama("Mixtral", **_MOE),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {**_LLAMA, "head_dim": 8, "sliding_window": 4, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
        attention="eager",  # some versions have an SDPA that leaves the cap out
    ),
    "gemma3": Family(
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {**_LLAMA, "head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "gpt2": Family("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM", "GPTNeoXConfig", {k: v for k, v in _LLAMA.items() if "key_value" not in k}
    ),
    "phi3": _llama("Phi3"),
    "opt": Family(
        "OPTForCausalLM",
        "OPTConfig",
        {**_BERT, "ffn_dim": 48, "word_embed_proj_dim": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    ),
    "olmo2": _llama("Olmo2"),
    "gpt_oss": _llama("GptOss", head_dim=8, sliding_window=4, **_MOE),
    "deepseek_v3": _llama(
        "DeepseekV3",
        **{
            **_MLA,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
        },
        first_k_dense_replace=1,
        moe_intermediate_size=16,
    ),
    "qwen3_next": _llama(
        "Qwen3Next",
        **{**_DELTA, "head_dim": 8, "num_hidden_layers": 4, "num_experts": 4, "num_experts_per_tok": 2},
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        decoder_sparse_step=1,
        layer_types=["linear_attention", "full_attention"] * 2,
    ),
    "qwen3_5": Family(
        "Qwen3_5ForCausalLM",
        "Qwen3_5TextConfig",
        {
            **_LLAMA,
            **_DELTA,
            "head_dim": 8,
            "num_hidden_layers": 4,
            "layer_types": ["linear_attention", "full_attention"] * 2,
        },
    ),
    "bert": Family("BertForMaskedLM", "BertConfig", _BERT, "encoder"),
    "roberta": Family("RobertaForMaskedLM", "RobertaConfig", _BERT, "encoder"),
    "modernbert": Family(
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        {**_BERT, "global_attn_every_n_layers": 2, "local_attention": 4, "bos_token_id": 1, "eos_token_id": 2}
        | {"cls_token_id": 1, "sep_token_id": 2},
        "encoder",
    ),
    "t5": Family(
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "vocab_size": VOCAB,
            "dropout_rate": 0.0,
        }
        | {"decoder_start_token_id": 0, "pad_token_id": 0},
        "both",
    ),
    "bart": Family(
        "BartForConditionalGeneration",
        "BartConfig",
        {
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
        }
        | {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": VOCAB, "max_position_embeddings": 128}
        | {
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 2,
            "forced_eos_token_id": None,
        },
        "both",
    ),
    "vit": Family(
        "ViTForImageClassification",
        "ViTConfig",
        {k: v for k, v in _BERT.items() if "vocab" not in k and "pad" not in k and "position" not in k}
        | {"image_size": 16, "patch_size": 4},
        "vision",
    ),
}
# Types that compute attention by themselves: z comes from a hook on the output projection, nothing is known before it.
SILENT: dict[str, Family] = {
    "gptj": Family("GPTJForCausalLM", "GPTJConfig", {**_GPT2, "rotary_dim": 4}),
    "codegen": Family("CodeGenForCausalLM", "CodeGenConfig", {**_GPT2, "rotary_dim": 4}),
    "bloom": Family(
        "BloomForCausalLM", "BloomConfig", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB}
    ),
    "mpt": Family("MptForCausalLM", "MptConfig", {"d_model": 32, "n_layers": 2, "n_heads": 4, "vocab_size": VOCAB}),
    "falcon": Family(
        "FalconForCausalLM",
        "FalconConfig",
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCAB, "bos_token_id": 1}
        | {"eos_token_id": 2},
    ),
    "xglm": Family(
        "XGLMForCausalLM",
        "XGLMConfig",
        {
            "d_model": 32,
            "ffn_dim": 48,
            "num_layers": 2,
            "attention_heads": 4,
            "vocab_size": VOCAB,
            "max_position_embeddings": 64,
        },
    ),
}
ALL = {**FAMILIES, **SILENT}
