"""Generation with an exported folder on ONNX Runtime.

Callers may pad rows of a batch on either side. The ort flavour keeps its KV cache in place: past
and present are one buffer, bound once (rows are moved to its left, as its operators want). The
other flavours' cache grows by a new tensor a step.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime as ort
import psutil
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Tokens = NDArray[np.int64]
_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
_ERRORS_ONLY = 3


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is chosen; temperature 0 is greedy."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


class Session:
    """One exported model, loaded.

    provider: auto takes CUDA where there is one, else the CPU. adapter: a .onnx_adapter file, for
    folders exported with adapters. Raises ValueError for what cannot be loaded.
    """

    def __init__(
        self,
        folder: Path,
        *,
        provider: str = "auto",
        threads: int | None = None,
        adapter: Path | None = None,
    ) -> None:
        path = folder / "model.onnx"
        if not path.is_file():
            raise ValueError(f"{folder} holds no model.onnx; write it with `atp-edge export`")
        self.provider = _provider(provider)
        self.session = load(path, self.provider, threads)
        self.device: Literal["cuda", "cpu"] = "cuda" if "CUDA" in self.provider else "cpu"
        inputs = {i.name: i for i in self.session.get_inputs()}
        self.shared_cache = "position_ids" not in inputs
        self.past = {n: i for n, i in inputs.items() if n.startswith("past_key_values.")}
        self.optional = {i.name for i in self.session.get_overridable_initializers()}
        self.cache_type = _cache_type(path, [i.type for i in self.past.values()])
        self.vocabulary = self.session.get_outputs()[0].shape[2]
        self.adapter = read_adapter(adapter, self.optional) if adapter else {}

    def value(self, array: Any) -> Any:
        return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), self.device, 0)

    def start(self, batch: int, capacity: int) -> Generation:
        """A fresh cache for `batch` rows of at most `capacity` tokens."""
        return Generation(self, batch, capacity)


def load(path: Path, provider: str, threads: int | None = None, model: bytes | None = None) -> Any:
    """An InferenceSession. model: a graph to load instead of the file's, over the same weights."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or usable_cores()
    options.inter_op_num_threads = 1
    # A memory pattern is one block for all activations of a shape seen before, beside the memory
    # that the first run took. Prompts differ in length, and widths that differ by layer pack badly:
    # 512 tokens through a slim SmolLM2-135M of per-layer widths took 70 MB in the second prefill.
    # Without it 13 MB, the peak is 637 MB instead of 699, and no later prefill takes any.
    options.enable_mem_pattern = False
    # Optional inputs make ONNX Runtime warn that they cannot be folded: that is their point.
    options.log_severity_level = _ERRORS_ONLY
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(path.parent.resolve())
    )
    try:
        return ort.InferenceSession(model or str(path), options, providers=[provider])
    except Exception as error:
        hint = ""
        if "CPU" in provider and _stated_precision(path.parent) == "bf16":
            hint = " (bf16 exports run on GPUs: the CPU provider has no bf16 MatMul)"
        raise ValueError(
            f"ONNX Runtime {ort.__version__} cannot load {path}{hint}: {error}"
        ) from error


def _stated_precision(folder: Path) -> str | None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text()) if path.exists() else {}
    precision: str | None = manifest.get("provenance", {}).get("precision")
    return precision


def usable_cores() -> int:
    """Physical cores this process may use: generation is bound by memory, so that more threads
    than cores only wait for each other."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(allowed or 1, psutil.cpu_count(logical=False) or allowed or 1)


def read_adapter(path: Path, known: set[str]) -> dict[str, Any]:
    """LoRA factors of a .onnx_adapter file by input name."""
    if not path.is_file():
        raise ValueError(f"{path}: no such adapter; write it with atp_export.adapter")
    values: dict[str, Any] = ort.AdapterFormat.read_adapter(str(path)).get_parameters()
    foreign = sorted(set(values) - known)
    if foreign:
        raise ValueError(
            f"{path} holds {foreign[0]}, which the model does not take: it belongs to another "
            "model, or this one was exported without adapters"
        )
    return values


def _cache_type(path: Path, types: list[str]) -> Any:
    if not types:
        return np.float32
    if types[0] not in _TYPES:
        raise ValueError(
            f"{path} keeps its cache as {types[0]}; this runtime feeds {', '.join(_TYPES)}: export "
            "it in another precision"
        )
    return _TYPES[types[0]]


def usable_providers() -> list[str]:
    """Execution providers that can run here, the fastest first."""
    # onnxruntime-gpu lists CUDA also where no device is; torch-free check by the driver.
    has_device = Path("/dev/nvidia0").exists()
    cuda = has_device and "CUDAExecutionProvider" in ort.get_available_providers()
    return ["CUDAExecutionProvider"] * cuda + ["CPUExecutionProvider"]


def _provider(asked: str) -> str:
    available = ort.get_available_providers()
    if asked == "auto":
        return usable_providers()[0]
    if asked not in available:
        raise ValueError(f"provider {asked!r}: this ONNX Runtime has {', '.join(available)}")
    return asked


@dataclass(frozen=True, kw_only=True)
class _Buffers:
    """What one further token a row reads and writes, each at its place and of its size.

    On the CPU the values are the arrays' own memory; elsewhere they are copied there.
    """

    binding: Any
    tokens: Tokens
    mask: Tokens
    logits: Floats
    copies: tuple[tuple[Any, Tokens], ...]


class Generation:
    """The state of one batch: its cache, and how many tokens each row holds."""

    def __init__(self, session: Session, batch: int, capacity: int) -> None:
        self.session, self.batch, self.capacity = session, batch, capacity
        length = capacity if session.shared_cache else 0
        self.cache = {
            name: session.value(
                np.zeros((batch, i.shape[1], length, i.shape[3]), session.cache_type)
            )
            for name, i in session.past.items()
        }
        self.lengths = np.zeros(batch, np.int64)
        # Which slots of a growing cache are real; a cache in place has no holes.
        self._slots = np.zeros((batch, 0), np.int64)
        self._binding = self._bind_cache()
        self._buffers: _Buffers | None = None

    def step(
        self, tokens: Tokens, mask: Tokens | None = None, *, last_only: bool = False
    ) -> Floats:
        """Feed tokens [B, S] (mask [B, S]: 1 where real); returns logits [B, S, V], or [B, 1, V]
        at each row's last real token with last_only (the others are then not computed).

        The first call is the prefill; more than one token with a past needs a batch of one.
        Raises ValueError when the cache is full.
        """
        shared = self.session.shared_cache
        held = int(self.lengths.max()) if shared else self._slots.shape[1]
        if held + tokens.shape[1] > self.capacity:
            raise ValueError(
                f"{held + tokens.shape[1]} tokens do not fit the cache of {self.capacity}; start "
                "with a larger capacity"
            )
        real = np.ones_like(tokens) if mask is None else mask
        if shared and held and tokens.shape[1] == 1 and real.all():
            return self._next(tokens)
        order = None
        if shared and not real.all():
            # Real tokens first: where a row's padding was is no matter to its positions.
            order = np.argsort(1 - real, axis=1, kind="stable")
            tokens, real = (np.take_along_axis(x, order, axis=1) for x in (tokens, real))
        last = tokens.shape[1] - 1 - np.argmax(real[:, ::-1], axis=1)
        start = int(last.min()) if last_only and "logits_start" in self.session.optional else 0
        logits = self._run(tokens, real, start)
        if last_only:
            return logits[np.arange(self.batch), last - start][:, None]
        if order is not None:
            logits = np.take_along_axis(logits, np.argsort(order, axis=1)[:, :, None], axis=1)
        return logits

    def _bind_cache(self) -> Any:
        binding = self.session.session.io_binding()
        for name, value in self.session.adapter.items():
            binding.bind_ortvalue_input(name, value)
        for name, buffer in self.cache.items():
            binding.bind_ortvalue_input(name, buffer)
            if self.session.shared_cache:
                binding.bind_ortvalue_output(_present(name), buffer)
            else:
                binding.bind_output(_present(name), self.session.device)
        return binding

    def _run(self, tokens: Tokens, real: Tokens, start: int) -> Floats:
        s, binding = self.session, self._binding
        # Its mask would lack what is fed here.
        self._buffers = None
        counted = self.lengths[:, None] + np.cumsum(real, axis=1)
        self.lengths = counted[:, -1]
        feed = {"input_ids": tokens}
        if s.shared_cache:
            slots = np.arange(self.lengths.max()) < self.lengths[:, None]
            feed["attention_mask"] = slots.astype(np.int64)
        else:
            self._slots = np.concatenate([self._slots, real], axis=1)
            feed["attention_mask"] = self._slots
            feed["position_ids"] = np.maximum(counted - 1, 0)
        if "logits_start" in s.optional:
            feed["logits_start"] = np.array([start], np.int64)
        for name, array in feed.items():
            binding.bind_ortvalue_input(name, s.value(array))
        binding.bind_output("logits", "cpu")
        s.session.run_with_iobinding(binding)
        # In the order of binding: every present, then the logits.
        *present_values, logits_value = binding.get_outputs()
        if not s.shared_cache:
            for name, value in zip(self.cache, present_values, strict=True):
                self.cache[name] = value
                binding.bind_ortvalue_input(name, value)
                binding.bind_output(_present(name), s.device)
        logits: Floats = logits_value.numpy()
        return logits

    def _next(self, tokens: Tokens) -> Floats:
        """One further token a row, cache in place: nothing is bound anew, and the mask has the
        cache's size, its 1s count. Saves 0.3 ms a step, 5 % at int4 (135M parameters, 2 cores)."""
        buffers = self._buffers = self._buffers or self._fixed_buffers()
        buffers.tokens[:] = tokens
        buffers.mask[np.arange(self.batch), self.lengths] = 1
        self.lengths = self.lengths + 1
        for value, array in buffers.copies:
            value.update_inplace(array)
        self.session.session.run_with_iobinding(buffers.binding)
        return buffers.logits.copy()

    def _fixed_buffers(self) -> _Buffers:
        s, binding = self.session, self._bind_cache()
        tokens = np.zeros((self.batch, 1), np.int64)
        mask = (np.arange(self.capacity) < self.lengths[:, None]).astype(np.int64)
        logits = np.empty((self.batch, 1, s.vocabulary), np.float32)
        feed = {"input_ids": tokens, "attention_mask": mask}
        values = {name: s.value(array) for name, array in feed.items()}
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        output = ort.OrtValue.ortvalue_from_numpy(logits, "cpu", 0)
        binding.bind_ortvalue_output("logits", output)
        copied = s.device != "cpu"
        return _Buffers(
            binding=binding,
            tokens=tokens,
            mask=mask,
            logits=logits,
            copies=tuple((values[name], feed[name]) for name in feed if copied),
        )


def _present(past: str) -> str:
    return past.replace("past_key_values", "present")


class Generator:
    """Text from an exported folder."""

    def __init__(
        self,
        folder: Path,
        *,
        provider: str = "auto",
        threads: int | None = None,
        adapter: Path | None = None,
    ) -> None:
        # Only text needs transformers, which takes seconds and 300 MB to import.
        from transformers import AutoTokenizer

        self.session = Session(folder, provider=provider, threads=threads, adapter=adapter)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
    ) -> list[str]:
        """Completions of a batch of prompts, without the prompts."""
        rows = [self.tokenizer(p, add_special_tokens=False)["input_ids"] for p in prompts]
        ends = {self.tokenizer.eos_token_id}
        new = generate_tokens(
            self.session, rows, max_new_tokens=max_new_tokens, sampling=sampling, ends=ends
        )
        texts = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return [_cut(text, stop) for text in texts]

    def stream(
        self,
        prompt: str,
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
    ) -> Iterator[str]:
        """Pieces of one completion as they come; a stop string and all after it is never shown."""
        ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        held, shown = max((len(s) for s in stop), default=1) - 1, 0
        tokens: list[int] = []
        text = ""
        for token in stream_tokens(self.session, ids, max_new_tokens, sampling or Sampling()):
            if token == self.tokenizer.eos_token_id:
                break
            tokens.append(token)
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            if len(_cut(text, stop)) < len(text):
                text, held = _cut(text, stop), 0
                break
            # Half a character decodes to U+FFFD: wait for its other bytes.
            until = max(shown, len(text.rstrip("\ufffd")) - held)
            if until > shown:
                yield text[shown:until]
                shown = until
        yield text[shown:]


def _cut(text: str, stop: Sequence[str]) -> str:
    places = [text.find(s) for s in stop if s in text]
    return text[: min(places)] if places else text


def stream_tokens(
    session: Session, ids: Sequence[int], max_new_tokens: int, sampling: Sampling
) -> Iterator[int]:
    """New tokens of one row, one at a time."""
    state = session.start(1, len(ids) + max_new_tokens)
    draw = np.random.default_rng(sampling.seed)
    logits = state.step(np.array([ids], np.int64), last_only=True)
    for count in range(max_new_tokens):
        token = choose(logits[0, -1], sampling, draw)
        yield token
        if count + 1 < max_new_tokens:
            logits = state.step(np.array([[token]], np.int64))


def generate_tokens(
    session: Session,
    rows: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    ends: set[int] | None = None,
) -> list[list[int]]:
    """New tokens of every row of a ragged batch; a row ends before a token of `ends`."""
    sampling, ends = sampling or Sampling(), ends or set()
    if any(not row for row in rows):
        raise ValueError("a prompt is empty: every prompt needs one token or more")
    longest = max(map(len, rows))
    tokens = np.zeros((len(rows), longest), np.int64)
    mask = np.zeros_like(tokens)
    for i, row in enumerate(rows):
        tokens[i, longest - len(row) :], mask[i, longest - len(row) :] = row, 1
    state = session.start(len(rows), longest + max_new_tokens)
    logits = state.step(tokens, mask, last_only=True)[:, 0]
    draw = np.random.default_rng(sampling.seed)
    new: list[list[int]] = [[] for _ in rows]
    done = np.zeros(len(rows), bool)
    for count in range(max_new_tokens):
        chosen = np.array([choose(row, sampling, draw) for row in logits], np.int64)
        done |= np.isin(chosen, list(ends))
        for i, token in enumerate(chosen.tolist()):
            if not done[i]:
                new[i].append(token)
        if done.all() or count + 1 == max_new_tokens:
            break
        logits = state.step(chosen[:, None])[:, -1]
    return new


def perplexity(session: Session, ids: Tokens, labels: Tokens) -> float:
    """exp of the mean negative log-likelihood of the labelled tokens of blocks [N, T], as
    atp_edge.evaluate.perplexity computes it (labels -100 are not counted)."""
    total, count = 0.0, 0
    for row, wanted in zip(ids, labels[:, 1:], strict=True):
        logits = session.start(1, len(row)).step(row[None])[0, :-1].astype(np.float64)
        peak = logits.max(-1, keepdims=True)
        log_sum = np.log(np.exp(logits - peak).sum(-1)) + peak[:, 0]
        counted = wanted != -100
        chosen = np.take_along_axis(logits, np.where(counted, wanted, 0)[:, None], 1)[:, 0]
        total += float((log_sum - chosen)[counted].sum())
        count += int(counted.sum())
    return float(np.exp(total / count))


def choose(logits: Floats, sampling: Sampling, draw: np.random.Generator) -> int:
    """The next token from logits [V]: greedy, or by temperature, top-k and top-p (nucleus)."""
    if sampling.temperature <= 0:
        return int(logits.argmax())
    scaled = logits.astype(np.float64) / sampling.temperature
    order = np.argsort(-scaled, kind="stable")[: sampling.top_k or None]
    weights = np.exp(scaled[order] - scaled[order[0]])
    weights /= weights.sum()
    nucleus = int(np.searchsorted(np.cumsum(weights), sampling.top_p)) + 1
    weights = weights[:nucleus] / weights[:nucleus].sum()
    return int(draw.choice(order[:nucleus], p=weights))
