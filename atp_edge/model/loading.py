"""Hugging Face folders opened with care: every tensor accounted for, no foreign code unasked.

What transformers raises for a folder that is not in order has many types and rarely a file's name:
here it is one ValueError that names the folder or the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from atp_edge.model.families import ModelShape, model_shape

CONFIG, ADAPTER = "config.json", "adapter_config.json"
GENERATION, INDEX = "generation_config.json", "model.safetensors.index.json"
STORED_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""Types of tensors in a safetensors header that are plain numbers; all others are quantized."""
_MOST_QUOTED = 300
_EMBEDDINGS, _HEAD = "embed_tokens.weight", "lm_head.weight"


def load_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The configuration in a folder. Raises ValueError when there is none that can be read."""
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} holds no {CONFIG}: expected a Hugging Face checkpoint")
    with _named(folder / CONFIG):
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)


def shape_in(folder: Path, config: Any) -> ModelShape:
    """The sizes of the decoder that a folder's configuration describes. Raises ValueError, naming
    the file, for one that is not supported."""
    try:
        return model_shape(config)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from error


def read_generation(folder: Path) -> dict[str, Any]:
    """generation_config.json of a folder, empty where there is none.

    Raises ValueError when it is no object, or its end tokens are no tokens.
    """
    path = folder / GENERATION
    if not path.exists():
        return {}
    with _named(path):
        found = json.loads(path.read_text(encoding="utf-8"))
        ends = found.get("eos_token_id")
        if any(type(end) is not int for end in (ends if isinstance(ends, list) else [ends or 0])):
            raise ValueError(f"eos_token_id {ends!r}: expected a token's id, or a list of them")
    settings: dict[str, Any] = found
    return settings


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder, which reads texts whole: a length to cut or pad to that its
    tokenizer.json states is not passed on. Raises ValueError when there is none that can be read.
    """
    with _named(f"the tokenizer of {folder}"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code
        )
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def load_model(
    folder: Path, *, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A causal language model of either widths policy, to evaluate.

    Raises ValueError naming tensor and file for one that is missing, not asked for, of another
    shape, quantized, or not finite.
    """
    model = _accounted(folder, trust_remote_code, dtype=dtype)
    _check_finite(folder, model.named_parameters())
    return model.eval()


def check_model(folder: Path, *, trust_remote_code: bool = False, values: bool = True) -> None:
    """Raise what `load_model` would, with one tensor in memory at a time; without `values` only
    what the files' headers tell."""
    _accounted(folder, trust_remote_code, device_map="meta")
    if not values:
        return
    files = tensor_files(folder)
    _check_finite(folder, ((name, read_tensor(name, files[name])) for name in files))


def tensor_files(folder: Path) -> dict[str, Path]:
    """The file of every tensor of a checkpoint, by its name.

    Raises ValueError for a file that is missing or cut, and OSError for one that cannot be read.
    """
    index = folder / INDEX
    paths = _shards(index) if index.exists() else [folder / "model.safetensors"]
    files: dict[str, Path] = {}
    for path in paths:
        if not path.is_file():
            whole = f"{index} lists it" if index.exists() else "a checkpoint is safetensors here"
            raise ValueError(
                f"{path} is missing; {whole}: download the folder again, or write a checkpoint of "
                f"another format anew with transformers' save_pretrained"
            )
        with _opened(path) as file:
            files |= dict.fromkeys(file.keys(), path)
    return files


def read_tensor(name: str, path: Path) -> Tensor:
    """One tensor of a safetensors file. Raises ValueError for a file that is cut."""
    with _opened(path) as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor


def tensors_of(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a safetensors file. Raises ValueError for a file that is cut."""
    with _opened(path) as file:
        names = list(file.keys())
        return {name: tuple(file.get_slice(name).get_shape()) for name in names}


def stored_type(folder: Path) -> torch.dtype:
    """The type of a checkpoint's weights: that of its largest matrix, the embedding (or the head).

    Of one in float64: float32, which is the widest that training and export compute in.
    """
    files = tensor_files(folder)
    name = next((n for n in files if n.endswith((_EMBEDDINGS, _HEAD))), None)
    if name is None:
        raise ValueError(f"{folder} holds no embedding: expected the checkpoint of a decoder")
    with _opened(files[name]) as file:
        kind = STORED_TYPES.get(file.get_slice(name).get_dtype(), torch.float32)
    return torch.float32 if kind == torch.float64 else kind


def _accounted(folder: Path, trust_remote_code: bool, **options: Any) -> PreTrainedModel:
    """The model as transformers loads it, when it found each tensor that it wanted and no other."""
    config = load_config(folder, trust_remote_code=trust_remote_code)
    _check_plain(folder, config)
    shape_in(folder, config)
    files = tensor_files(folder)
    _check_types(files)
    tied = config.tie_word_embeddings
    if tied:
        _check_tied(folder, files)
    with _named(folder):
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
    if faults := _faults(info, tied):
        said, name = min(faults.items())
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise ValueError(
            f"{_place(folder, files, name)}, {said}{more}; download the folder again, or correct "
            f"its {CONFIG}: layers, widths, biases, tied embeddings"
        )
    return model


def _faults(info: dict[str, Any], tied: bool) -> dict[str, str]:
    """What is wrong with tensors, in words -> the tensor's name."""
    found = {
        f"{name}: it is {list(held)} there, and {CONFIG} asks for {list(wanted)}": name
        for name, held, wanted in info["mismatched_keys"]
    }
    missing = info["missing_keys"] - ({_HEAD} if tied else set())
    found |= {f"{n}: it is missing, and {CONFIG} asks for it": n for n in missing}
    return found | {f"{n}: {CONFIG} has no place for it": n for n in info["unexpected_keys"]}


def _check_plain(folder: Path, config: Any) -> None:
    """Neither quantized nor an adapter's folder: no weights that could be trained and cut."""
    for key in ("quantization_config", "compression_config"):
        found = getattr(config, key, None)
        if found is not None:
            method = found.get("quant_method") if isinstance(found, dict) else found
            raise ValueError(
                f"{folder / CONFIG} has a {key} ({method}): take the model's unquantized "
                f"checkpoint, or, if its weights are plain numbers, remove {key}"
            )
    if (folder / ADAPTER).exists():
        raise ValueError(
            f"{folder / ADAPTER}: transformers would put this adapter on the model; merge it first "
            "(peft's merge_and_unload, then save_pretrained to another folder), or remove the file"
        )


def _place(folder: Path, files: dict[str, Path], name: str) -> Path:
    """The file that holds a tensor of the loaded model, or that would."""
    ending = name.removeprefix("model.")
    found = (path for stored, path in files.items() if stored.removeprefix("model.") == ending)
    return next(found, folder / (INDEX if (folder / INDEX).exists() else "model.safetensors"))


def _check_types(files: dict[str, Path]) -> None:
    for path in sorted(set(files.values())):
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118 (no dict: it is the file's own method)
                kind = file.get_slice(name).get_dtype()
                if kind not in STORED_TYPES:
                    raise ValueError(
                        f"{path}: {name} is stored as {kind}, expected one of "
                        f"{', '.join(STORED_TYPES)}: take the model's unquantized checkpoint"
                    )


def _check_finite(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    for name, tensor in tensors:
        if not torch.isfinite(tensor).all():
            wrong = int((~torch.isfinite(tensor)).sum())
            raise ValueError(
                f"{_place(folder, tensor_files(folder), name)}: {name} has {wrong} values that are "
                "nan or infinite: the checkpoint is damaged; download or train it again"
            )


def _check_tied(folder: Path, files: dict[str, Path]) -> None:
    """A head of its own beside tied embeddings: transformers would use it, the export would not."""
    names = [n for end in (_EMBEDDINGS, _HEAD) for n in files if n.endswith(end)]
    if len(names) == 2 and not torch.equal(*(read_tensor(n, files[n]) for n in names)):
        raise ValueError(
            f"{files[names[1]]}: {names[1]} differs from {names[0]}, and {folder / CONFIG} says "
            'that they are tied; set "tie_word_embeddings": false there, or remove the head'
        )


def _shards(index: Path) -> list[Path]:
    with _named(index):
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if any(Path(name).name != name for name in names):
            raise ValueError("a file's name leads out of the folder")
        return [index.parent / name for name in sorted(names)]


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    with _named(path):
        try:
            with safe_open(path, framework="pt") as file:
                yield file
        except SafetensorError as error:
            raise ValueError(f"{path} is truncated or no safetensors file ({error})") from error


@contextmanager
def _named(what: Path | str) -> Iterator[None]:
    """Let what a library raises about a folder or file be one ValueError that names it."""
    try:
        yield
    except MemoryError:
        raise
    # transformers raises whatever a foreign file leads it to: AttributeError, KeyError, its own.
    except Exception as error:
        said = " ".join(str(error).split())
        if str(what) in said and isinstance(error, ValueError) and "remote_code" not in said:
            raise
        hint = (
            ": it brings code of its own, which runs only with --trust-remote-code"
            if "trust_remote_code" in said
            else f" is not in order ({type(error).__name__}: {said[:_MOST_QUOTED]})"
        )
        raise ValueError(f"{what}{hint}") from error
