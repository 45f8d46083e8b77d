"""Opening a model: the default one, a hub id, a folder, or a GGUF file (dequantised once into a safetensors folder)."""

import contextlib
import difflib
import gc
import hashlib
import json
import logging
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from headwise.convert import ALLOWED, auto_class, default_model_path, first_line, from_gguf, quiet

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_HUB_ID = r"(?:[\w][\w.-]*/)?[\w][\w.-]*"
_DTYPES = ("float32", "bfloat16", "float16", "float64")


def open_model(
    name: str | Path = "default", dtype: str = "float32", device: str = "cpu"
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase | Any]":
    """A model in evaluation mode and its tokenizer (an image processor for vision models; None where it has neither).

    Args:
        name: "default", a hub id, a folder written by `save_pretrained`, or a GGUF file.
        dtype: "float32", "bfloat16", "float16" or "float64".
        device: where torch puts the model, such as "cpu" or "cuda".

    Raises:
        ValueError: the model cannot be opened; the sentence says why and what is allowed.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"There is no dtype {dtype!r} here. Allowed: {', '.join(_DTYPES)}.{_nearest(dtype, _DTYPES)}")
    source = _source(str(name))
    import torch
    from transformers import AutoConfig

    import headwise.tiny  # noqa: F401 (importing it lets transformers open small models of the lab)

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"Device {device!r} cannot be used: {first_line(error)} 'cpu' always can.") from error
    with _collector_paused():
        with _sentences(str(name)), quiet():
            if not Path(source).is_dir():
                _check_reachable(source)
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
            model = auto_class(config).from_pretrained(source, config=config, dtype=getattr(torch, dtype))
        companion = _companion(source, config)
    return model.to(device).eval(), companion


def context_length(model: "PreTrainedModel") -> int | None:
    """How many tokens a model reads at most; None where its configuration does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def name_of(model: "PreTrainedModel") -> str:
    """A short name that can be a folder: the last part of the hub id or path, else the model type."""
    path = str(getattr(model.config, "_name_or_path", "") or "").rstrip("/\\")
    name = re.sub(r"[^\w.+-]+", "-", re.split(r"[/\\]", path)[-1]).strip("-.")
    return name or str(getattr(model.config, "model_type", "") or type(model).__name__.lower())


def folder_of(opened_as: str, model: "PreTrainedModel") -> str:
    """The folder of a model's atlas: its short name, after its organisation where it was opened by a hub id."""
    if opened_as.count("/") == 1 and re.fullmatch(_HUB_ID, opened_as) and not Path(opened_as).exists():
        return opened_as.replace("/", "--")
    return name_of(model)


def fingerprint(model: "PreTrainedModel") -> str:
    """16 hex digits that stand for the weights: names and shapes of all parameters, and 257 spread-out values of each.

    Scaling, zeroing or swapping a tensor changes it; an edit of a few single numbers may be missed.
    """
    import torch

    digest = hashlib.sha256(str(getattr(model.config, "model_type", "")).encode())
    # Multiples of the golden ratio are spread evenly over any row length; a fixed stride would keep to one column.
    spread = torch.arange(1, 258, dtype=torch.float64) * 0.6180339887498949
    spread -= spread.floor()
    with torch.no_grad():
        for name, value in sorted(model.named_parameters()):
            digest.update(f"{name}{tuple(value.shape)}".encode())
            if value.numel() and value.device.type != "meta":
                places = (spread * value.numel()).long().to(value.device)
                digest.update(value.detach().reshape(-1)[places].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _source(name: str) -> str:
    """What `from_pretrained` is given for a name: a folder or a hub id."""
    if name == "default":
        return str(default_model_path())
    path = Path(name).expanduser()
    try:
        if path.is_dir():
            return str(_checked_folder(path))
        if path.is_file():
            return str(from_gguf(path))
    except PermissionError as error:
        raise ValueError(f"{name} cannot be read: permission denied. {ALLOWED}") from error
    if path.suffix == ".gguf" or name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise ValueError(f"There is no file or folder {name}. {ALLOWED}{_nearest(path.name, _beside(path))}")
    if not re.fullmatch(_HUB_ID, name):
        raise ValueError(f"{name!r} is neither a path that exists nor a hub id. {ALLOWED}")
    return name


def _beside(path: Path) -> list[str]:
    try:
        return [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return []


def _checked_folder(path: Path) -> Path:
    names = {entry.name for entry in path.iterdir()}
    if "config.json" not in names:
        files = [n for n in sorted(names) if n.endswith(".gguf")]
        hint = f" It holds {files[0]}: name that file." if files else ""
        raise ValueError(f"Folder {path} holds no config.json, so it is not a model that save_pretrained wrote.{hint}")
    try:
        json.loads((path / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path / 'config.json'} is not valid JSON: {error}.") from error
    return path


def _companion(source: str, config: "PreTrainedConfig") -> Any:
    """The tokenizer, or the image processor of a vision model, or None where there is neither."""
    from transformers import AutoImageProcessor, AutoTokenizer

    sees = not hasattr(config, "vocab_size") and hasattr(config, "image_size")
    needed = "preprocessor_config.json" if sees else "tokenizer_config.json"
    if Path(source).is_dir() and not any((Path(source) / f).is_file() for f in (needed, "tokenizer.json", "vocab.txt")):
        return None
    try:
        return (AutoImageProcessor if sees else AutoTokenizer).from_pretrained(source, trust_remote_code=False)
    except Exception as error:
        what = "image processor" if sees else "tokenizer"
        if Path(source).is_dir():
            raise ValueError(f"{source} has a {what} that cannot be opened: {first_line(error)}") from error
        log.warning("%s has no %s that opens: %s", source, what, first_line(error))
        return None


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """No search for cyclic garbage: the first opening imports a thousand modules, and searching takes a third of it."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


@contextlib.contextmanager
def _sentences(name: str) -> Iterator[None]:
    """Turn what transformers and the hub client raise while opening `name` into one sentence."""
    try:
        yield
    except MemoryError as error:
        raise ValueError(f"There is not enough memory to open {name}.") from error
    except Exception as error:
        reason = first_line(error)
        if Path(name).exists() or name == "default":
            raise ValueError(f"{name} cannot be opened as a model: {reason}") from error
        near = _nearest(name, _known())
        raise ValueError(
            f"Model {name!r} is neither in the local cache nor to be had from the hub. {ALLOWED}{near} ({reason})"
        ) from error


def _known() -> list[str]:
    """Names that open without a network: the default, and what the hub cache holds."""
    from huggingface_hub.constants import HF_HUB_CACHE

    cached = [p.name[8:].replace("--", "/") for p in Path(HF_HUB_CACHE).glob("models--*")]
    return ["default", *cached]


def _check_reachable(hub_id: str) -> None:
    """Fail at once where a model is not cached and the hub has no address; its client would retry for half a minute."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.constants import ENDPOINT, is_offline_mode

    if isinstance(try_to_load_from_cache(hub_id, "config.json"), str) or is_offline_mode() or getproxies():
        return
    host = urlsplit(ENDPOINT).hostname
    try:
        socket.getaddrinfo(host, 443)
    except OSError as error:
        raise OSError(f"no network: {host} has no address here") from error


def _nearest(name: str, names: "list[str] | tuple[str, ...]") -> str:
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""
