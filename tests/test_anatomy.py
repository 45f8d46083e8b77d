"""What the probe finds in every family, and what it says of what it does not find."""

import pytest
import torch
from families import ALL, FAMILIES, SILENT
from torch import nn

from headwise.anatomy import Anatomy, anatomy, nearest_unit
from headwise.probe import evaluating, implementation, probe_inputs

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
SHAPES = {  # layers, heads, KV heads, head size, value size; where nothing is said: two layers, 4 heads of 8
    "gpt2": ([0, 1], 4, 4, 8, 8),
    "deepseek_v3": ([0, 1], 4, 4, 16, 12),
    "qwen3_next": ([1, 3], 4, 2, 8, 8),
    "qwen3_5": ([1, 3], 4, 2, 8, 8),
}
GROUPED = {"llama", "qwen2", "qwen3", "mistral", "mixtral", "gemma2", "gemma3", "phi3", "olmo2", "gpt_oss"}
FUSED = {"q_pre", "k_pre"}
LACKS = {
    **{name: set() for name in ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "opt", "olmo2", "qwen3_5")},
    **{name: set() for name in ("bert", "roberta", "vit", "t5", "bart")},
    "gpt2": FUSED,
    "phi3": FUSED,
    "modernbert": FUSED,
    "gpt_neox": FUSED | {"resid_mid"},
    "mixtral": {"neurons"},
    "gpt_oss": {"neurons"},
    "qwen3_next": {"neurons"},
    "deepseek_v3": FUSED | {"neurons"},
}
SILENT_LACKS = FUSED | {"q", "k", "v", "scores", "pattern"}


@pytest.mark.parametrize("name", ALL)
def test_layers_heads_and_sizes(name):
    body = anatomy(ALL[name].build())
    layers, heads, kv_heads, size, value = SHAPES.get(name, ([0, 1], 4, 2 if name in GROUPED else 4, 8, 8))
    assert body.layers == layers
    for n in layers:
        layer = body.layer(n)
        assert (layer.heads, layer.kv_heads, layer.head_dim, layer.value_dim) == (heads, kv_heads, size, value)
        assert body.heads(n) == heads and body.kv_heads(n) == kv_heads
        assert [body.group(n, h) for h in range(heads)] == [h // (heads // kv_heads) for h in range(heads)]
    assert body.units() == [f"L{n}.H{h}" for n in layers for h in range(heads)]


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_type_lacks(name):
    body = anatomy(FAMILIES[name].build())
    for stack in {stack for stack, _ in body.by_place}:
        assert {line.split(":")[0] for line in body.lacks(stack)} == LACKS[name]
        for line in body.lacks(stack):
            kind, reason = line.split(": ")
            assert reason and not body.offers(kind, stack)


@pytest.mark.parametrize("name", SILENT)
def test_what_a_silent_type_lacks(name):
    body = anatomy(SILENT[name].build())
    lacks = {line.split(":")[0] for line in body.lacks()}
    assert lacks - {"resid_mid"} == SILENT_LACKS
    assert ("resid_mid" in lacks) == (name in ("gptj", "codegen", "falcon"))  # attention and MLP in parallel
    assert body.offers("z") and body.offers("neurons")


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_encoder_decoders_have_three_stacks(name):
    body = anatomy(FAMILIES[name].build())
    assert {stack for stack, _ in body.by_place} == {"", "enc", "cross"}
    assert body.numbers("enc") == body.numbers("cross") == [0, 1]
    own, cross = body.layer(0), body.layer(0, "cross")
    assert own.attention is not cross.attention and own.mlp is cross.mlp and own.block is cross.block
    assert body.units("cross")[0] == "cross.L0.H0"


def test_hybrids_have_blocks_without_attention():
    body = anatomy(FAMILIES["qwen3_5"].build())
    assert sorted(body.blocks[""]) == [0, 1, 2, 3]
    assert [str(site) for site in body.resolve("resid_post")] == [f"L{n}.resid_post" for n in range(4)]
    assert [str(site) for site in body.resolve("z")] == ["L1.z", "L3.z"]
    with pytest.raises(ValueError, match=r"L2.z: this qwen3_5_text has the layers 1, 3, not 2. Did you mean L1.z\?"):
        body.resolve("L2.z")
    with pytest.raises(ValueError, match="no attention in layer 2; it has it in 1, 3"):
        body.layer(2)


def test_a_kind_that_is_lacking_is_named_with_its_reason():
    body = anatomy(FAMILIES["mixtral"].build())
    with pytest.raises(ValueError, match="this mixtral does not offer neurons: its MLP has no single down projection"):
        body.resolve("L0.neurons")


def test_only_transformers_models():
    with pytest.raises(ValueError, match="works on a transformers PreTrainedModel, not on Linear"):
        anatomy(nn.Linear(2, 2))


def test_the_probe_leaves_the_model_as_it_was():
    model = FAMILIES["llama"].build().train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    assert isinstance(anatomy(model), Anatomy) and anatomy(model) is anatomy(model)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert model.config._attn_implementation == "sdpa"
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_shared_layers_are_refused():
    import transformers

    config = transformers.AlbertConfig(
        vocab_size=64,
        embedding_size=16,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
    )
    with pytest.raises(
        ValueError, match=r"AlbertModel runs one attention module several times .* cannot tell them apart"
    ):
        anatomy(transformers.AlbertModel(config).eval())


def test_the_number_of_tokens_is_never_the_number_of_heads():
    family = FAMILIES["llama"]
    six = type(family)(family.model, family.config, {**family.fields, "hidden_size": 48, "num_attention_heads": 6})
    model = six.build()
    assert probe_inputs(model)["input_ids"].shape == (1, 7)
    assert anatomy(model).heads(0) == 6


def test_sub_configs_get_their_own_implementation_back():
    model = FAMILIES["bart"].build()
    model.config._attn_implementation = "sdpa"
    with implementation(model, lambda old: "eager"), evaluating(model):
        assert model.model.encoder.layers[0].self_attn.config._attn_implementation == "eager"
    assert model.model.encoder.layers[0].self_attn.config._attn_implementation == "sdpa"


def test_nearest_unit():
    assert nearest_unit("L5H1", ["L5.H1", "L9.H6"]) == " Did you mean L5.H1?"
    assert nearest_unit("xyzzy", ["L5.H1"]) == ""
