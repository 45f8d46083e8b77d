"""Interventions under `generate` equal whole passes over prompt and answer so far."""

import pytest
import torch
from doing import close, run, values
from families import FAMILIES

from headwise.anatomy import anatomy
from headwise.do import Add, Cut, Freeze, Scale, Zero, do

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")


def without_cache(model, inputs, steps, *interventions):
    """Greedy tokens, each from a whole pass over prompt and answer so far. The caller gives absolute positions."""
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    logits = []
    for _ in range(steps):
        more = {} if mask is None else {"attention_mask": mask}
        if mask is not None:
            more["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
        with torch.no_grad(), do(model, *interventions):
            out = model(input_ids=ids, **more).logits[:, -1]
        logits.append(out)
        ids = torch.cat([ids, out.argmax(-1, keepdim=True)], 1)
        mask = None if mask is None else torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return ids, torch.stack(logits, 1)


def generated(model, inputs, steps, *interventions, **options):
    with torch.no_grad(), do(model, *interventions):
        out = model.generate(
            **inputs, max_new_tokens=steps, do_sample=False, output_logits=True, return_dict_in_generate=True,
            eos_token_id=None, pad_token_id=0, **options,
        )  # fmt: skip
    return out.sequences, torch.stack(out.logits, 1)


DONE = {
    "zero": lambda s: [Zero(f"L{s}.H1")],
    "prompt": lambda s: [Zero(f"L{s}.H1", positions=[0, 9]), Scale("L1.resid_post", 1.5, positions=[4])],
    "generated": lambda s: [Zero(f"L{s}.H2", positions=[11, 12])],
    "inside": lambda s: [
        Scale(f"L{s}.q", 2.0),
        Scale(f"L{s}.G0.k", 0.5),
        Add(f"L{s}.G1.v", torch.ones(1), positions=[2, 11]),
    ],
    "cut": lambda s: [Cut(f"L{s}", keys=[8, 9, 11], rows=[0, 2])],
    "stream": lambda s: [Add(f"L{s}.resid_mid", torch.linspace(-1, 1, 32)), Zero(f"L{s}.mlp", rows=[1])],
    "before": lambda s: [Scale(f"L{s}.q_pre", 0.5), Scale(f"L{s}.k_pre", 2.0, positions=[3, 10])],
}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("what", DONE)
@pytest.mark.parametrize(
    "name", ["llama", "mistral", "gemma2", "qwen3", "gpt2", "gpt_oss", "qwen3_5", "opt", "deepseek_v3"]
)
def test_generation_equals_recomputing_everything(name, what, padded):
    family = FAMILIES[name]
    model, inputs = family.build(), family.inputs(padded=padded)
    body = anatomy(model)
    layer = body.layers[-1]
    if what == "before" and not body.offers("k_pre"):
        return
    interventions = DONE[what](layer)
    ids, logits = generated(model, inputs, 4, *interventions)
    slow, twin = without_cache(model, inputs, 4, *interventions)
    close(logits, twin, 1e-3)
    assert torch.equal(ids, slow)
    with torch.no_grad():
        assert not torch.allclose(logits, generated(model, inputs, 4)[1], atol=1e-3)


def test_generation_with_a_static_cache_and_negative_positions(llama, inputs):
    asked = [Zero("L1.H1", positions=[-1]), Cut("L1.H2", keys=[-3, 11]), Scale("L0.G1.v", 2.0, positions=[-2, 11])]
    absolute = [Zero("L1.H1", positions=[9]), Cut("L1.H2", keys=[7, 11]), Scale("L0.G1.v", 2.0, positions=[8, 11])]
    ids, twin = without_cache(llama, inputs, 4, *absolute)
    for options in ({}, {"cache_implementation": "static", "disable_compile": True}):
        close(generated(llama, inputs, 4, *asked, **options)[1], twin, 1e-3)


def test_a_past_made_before_the_block(llama, inputs):
    ids = inputs["input_ids"]
    with torch.no_grad():
        past = llama(input_ids=ids[:, :6], use_cache=True).past_key_values
        with do(llama, Zero("L1.H1", positions=[-1, 7])):
            ours = llama(input_ids=ids[:, 6:], past_key_values=past).logits
    close(ours, run(llama, inputs, Zero("L1.H1", positions=[9, 7]))[:, 6:])


@pytest.mark.parametrize("name", ["llama", "t5", "bart", "mistral"])
def test_beam_search_runs(name):
    family = FAMILIES[name]
    model, inputs = family.build(), family.inputs(padded=True)
    inputs.pop("decoder_input_ids", None)
    with torch.no_grad(), do(model, Zero("L1.H1"), Scale("L0.mlp", 0.5, positions=[-1]), Cut("L1", keys=[0])):
        out = model.generate(**inputs, max_new_tokens=4, num_beams=2, do_sample=False, pad_token_id=0)
    assert len(out) == 3


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_generation_of_encoder_decoders(name):
    family = FAMILIES[name]
    model, inputs = family.build(), family.inputs()
    start = inputs.pop("decoder_input_ids")[:, :2]
    start[:, 0] = model.config.decoder_start_token_id
    one = [Zero("L1.H1", positions=[1, 3]), Scale("enc.L0.H2", 2.0, positions=[-1]), Cut("cross.L1.H0", keys=[2, -1])]
    with torch.no_grad(), do(model, *one):
        ids = model.generate(**inputs, decoder_input_ids=start, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        again = model(**inputs, decoder_input_ids=ids[:, :-1]).logits
    # Forced and forbidden tokens aside, every step must choose what the whole pass chooses.
    chosen = again.clone()
    chosen[..., 2 if name == "bart" else 1] = -torch.inf
    assert torch.equal(chosen.argmax(-1)[:, start.shape[1] - 1 : ids.shape[1] - 1], ids[:, start.shape[1] :])


def test_freeze_under_generation(llama, inputs):
    clean = values(llama, FAMILIES["llama"].inputs(seed=1), "L1.pattern")
    _, twin = without_cache(llama, inputs, 4, Freeze("L1.H1", clean))
    close(generated(llama, inputs, 4, Freeze("L1.H1", clean))[1], twin, 1e-3)
