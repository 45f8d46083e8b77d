"""Leading a model's attention to its KV cache, for a block of code or until further notice.

Two of transformers' public doors are used: a `Cache` layer takes the new keys and values; the attention function, which
runs right after it, finds that layer and lets it answer. All other calls of attention go to the model's own
implementation unchanged, and masks are made as that implementation wants them.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from headwise.kv_cache import CacheMethod, KVCache, handed, kv_units
from headwise.listen import own_eager
from headwise.matmul import quick
from headwise.probe import enter, evaluating, implementation, probe_inputs

KV = "headwise_kv_"
# What a model may pass to attention that the stores follow, or that has no say in where queries look.
_KNOWN = {"position_ids", "use_cache", "cache_position", "output_attentions", "is_causal", "sliding_window", "dropout"}
_KNOWN |= {"softcap", "s_aux", "logits_to_keep", "output_hidden_states", "return_dict", "position_embeddings"}


def _attend(original: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any):
    """The registered attention function; past `original`, the signature is transformers' own."""
    reference = getattr(handed, "layer", None)
    layer = reference() if reference is not None else None
    if layer is None or not layer.holds(key):
        own = own_eager(module) if original == "eager" else None
        return ALL_ATTENTION_FUNCTIONS.get_interface(original, own)(module, query, key, value, *args, **kwargs)
    handed.layer = None
    mask = args[0] if args else kwargs.pop("attention_mask", None)
    scale = kwargs.pop("scaling", None)
    strange = sorted(name for name, one in kwargs.items() if name not in _KNOWN and isinstance(one, Tensor))
    if strange or (module.training and kwargs.get("dropout")):
        what = f"passes {', '.join(strange)} to attention" if strange else "trains with dropout"
        raise ValueError(f"A headwise cache cannot serve this {type(module).__name__}: it {what}.")
    return layer.attend(module, query, mask, scale, kwargs), None


def _renamed(name: str) -> str:
    """The name under which a model of this implementation is entered, registered on first use."""
    original = name.removeprefix(KV)
    if KV + original not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        masks = ALL_MASK_ATTENTION_FUNCTIONS
        mask = eager_mask if original == "eager" or original not in masks.valid_keys() else masks[original]
        AttentionInterface.register(KV + original, partial(_attend, original))
        AttentionMaskInterface.register(KV + original, mask)
    return KV + original


@contextmanager
def caching(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Let every `KVCache` work with the model inside the block; anything else runs as before.

    Raises:
        ValueError: the model cannot be served: on a few tokens, with everything kept, it does not equal itself.
    """
    with implementation(model, _renamed):
        _check(model)
        yield model


_checked: "weakref.WeakKeyDictionary[PreTrainedModel, float]" = weakref.WeakKeyDictionary()


def _check(model: PreTrainedModel) -> None:
    """Once a model: two turns through a cache that keeps everything must equal two turns through the model's own."""
    if model not in _checked:
        ids = probe_inputs(model)["input_ids"]
        ids = torch.cat([ids, ids], 1)

        def two_turns(cache: Cache) -> Tensor:
            model(input_ids=ids[:, :-2], past_key_values=cache, use_cache=True)
            return model(input_ids=ids[:, -2:], past_key_values=cache, use_cache=True).logits.float()

        with evaluating(model):
            own = two_turns(DynamicCache(config=model.config.get_text_config(decoder=True)))
            ours = two_turns(KVCache(model, {}))
        _checked[model] = float((own - ours).abs().max() / own.abs().max().clamp_min(1e-6))
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.1
    if not _checked[model] < tolerance:
        raise ValueError(
            f"A headwise cache does not serve this {model.config.model_type}: with everything kept its logits differ "
            f"from the model's own by {_checked[model]:.1e} of their largest; allowed is {tolerance:.0e}."
        )


# How a model is left again, while a plan is attached to it.
_attached: "weakref.WeakKeyDictionary[PreTrainedModel, tuple[Callable[[], None], ...]]" = weakref.WeakKeyDictionary()


def attach(model: PreTrainedModel, treatments: "CacheMethod | Mapping[str, CacheMethod]") -> None:
    """From now on `model.generate` makes its cache by these treatments; `detach(model)` gives the model back.

    On processors where that is faster, linear layers multiply by other kernels meanwhile (see headwise/matmul.py).

    Args:
        treatments: one cache method for all KV heads, or {"L5.G0": cache method}; heads that are not named keep all.

    Raises:
        ValueError: a head that does not exist, a model that cannot be served, or one that has a plan already.
    """
    if model in _attached:
        raise ValueError("This model has a cache plan attached already; headwise.detach(model) takes it off.")
    if isinstance(treatments, CacheMethod):
        treatments = dict.fromkeys(kv_units(model), treatments)
    mine = dict(treatments)
    KVCache(model, mine)
    # The function lives on the model, so it may hold the model only weakly.
    about, prepare = weakref.ref(model), type(model)._prepare_cache_for_generation

    def prepare_ours(generation_config: Any, model_kwargs: dict, mode: Any, batch: int, most: int, *args: Any) -> Any:
        owner = about()
        if owner is None:
            raise RuntimeError("The model of this cache plan is gone.")
        before = model_kwargs.get("past_key_values")
        result = prepare(owner, generation_config, model_kwargs, mode, batch, most, *args)
        if before is None and type(model_kwargs.get("past_key_values")) is DynamicCache:
            cache = KVCache(owner, mine, reserve=most)
            if generation_config.is_assistant:
                cache.activate_past_recording()
            model_kwargs["past_key_values"] = cache
        return result

    leave = enter(model, _renamed)
    try:
        _check(model)
    except BaseException:
        leave()
        raise
    vars(model)["_prepare_cache_for_generation"] = prepare_ours
    _attached[model] = leave, quick(model)


def detach(model: PreTrainedModel) -> None:
    """Give a model back as it was before `attach`. Raises ValueError when nothing is attached."""
    if model not in _attached:
        raise ValueError("No cache plan is attached to this model.")
    vars(model).pop("_prepare_cache_for_generation", None)
    for leave in _attached.pop(model):
        leave()


@contextmanager
def treated(model: PreTrainedModel, treatments: "CacheMethod | Mapping[str, CacheMethod] | None") -> Iterator[None]:
    """Inside the block `model.generate` makes its cache by these treatments; None leaves it as it is.

    Raises:
        ValueError: as `attach`.
    """
    if treatments is None:
        yield
        return
    attach(model, treatments)
    try:
        yield
    finally:
        detach(model)


def attached(model: PreTrainedModel) -> bool:
    """Whether a cache plan is attached to the model."""
    return model in _attached
