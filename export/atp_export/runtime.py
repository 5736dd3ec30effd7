"""Generation with an exported folder on ONNX Runtime.

The ort flavour keeps its KV cache in place: past and present are one buffer, bound once; rows of a
batch are padded on the right. The standard flavour's cache grows by a new tensor a step; rows are
padded on the left.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from transformers import AutoTokenizer

Floats = NDArray[np.float32]
Tokens = NDArray[np.int64]
_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is chosen; temperature 0 is greedy."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


class Session:
    """One exported model, loaded. `provider`: auto takes CUDA where there is one, else the CPU."""

    def __init__(self, folder: Path, *, provider: str = "auto", threads: int | None = None) -> None:
        path = folder / "model.onnx"
        if not path.is_file():
            raise ValueError(f"{folder} holds no model.onnx; write it with `atp-edge export`")
        options = ort.SessionOptions()
        # Generation is bound by memory: more threads than cores only wait for each other.
        options.intra_op_num_threads = threads or os.cpu_count() or 1
        options.inter_op_num_threads = 1
        self.provider = _provider(provider)
        try:
            self.session = ort.InferenceSession(str(path), options, providers=[self.provider])
        except Exception as error:
            raise ValueError(
                f"ONNX Runtime {ort.__version__} cannot load {path}: {error}"
            ) from error
        self.device: Literal["cuda", "cpu"] = "cuda" if "CUDA" in self.provider else "cpu"
        inputs = {i.name: i for i in self.session.get_inputs()}
        self.shared_cache = "position_ids" not in inputs
        self.past = {n: i for n, i in inputs.items() if n.startswith("past_key_values.")}
        self.cache_type = _TYPES[next(iter(self.past.values())).type]
        self.vocabulary = self.session.get_outputs()[0].shape[2]

    def value(self, array: Any) -> Any:
        return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), self.device, 0)

    def start(self, batch: int, capacity: int) -> Generation:
        """A fresh cache for `batch` rows of at most `capacity` tokens."""
        return Generation(self, batch, capacity)


def _provider(asked: str) -> str:
    available = ort.get_available_providers()
    if asked == "auto":
        # onnxruntime-gpu lists CUDA also where no device is; torch-free check by the driver.
        has_device = Path("/dev/nvidia0").exists()
        return (
            "CUDAExecutionProvider"
            if has_device and "CUDAExecutionProvider" in available
            else "CPUExecutionProvider"
        )
    if asked not in available:
        raise ValueError(f"provider {asked!r}: this ONNX Runtime has {', '.join(available)}")
    return asked


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
        self.mask = np.zeros((batch, 0), np.int64)
        self.lengths = np.zeros(batch, np.int64)

    def step(self, tokens: Tokens, mask: Tokens | None = None) -> Floats:
        """Feed tokens [B, S] (mask [B, S]: 1 where real); returns logits [B, S, V].

        The first call is the prefill; more than one token with a past needs a batch of one.
        Raises ValueError when the cache is full.
        """
        s = self.session
        real = np.ones_like(tokens) if mask is None else mask
        if self.mask.shape[1] + tokens.shape[1] > self.capacity:
            raise ValueError(
                f"{self.mask.shape[1] + tokens.shape[1]} tokens do not fit the cache of "
                f"{self.capacity}; start with a larger capacity"
            )
        after = self.lengths + real.sum(1)
        if s.shared_cache:
            # Right padding: a row's tokens are the first ones, whatever the batch was fed.
            self.mask = (np.arange(after.max()) < after[:, None]).astype(np.int64)
        else:
            self.mask = np.concatenate([self.mask, real], axis=1)
        binding = s.session.io_binding()
        feed = {"input_ids": tokens, "attention_mask": self.mask}
        if not s.shared_cache:
            counted = self.lengths[:, None] + np.cumsum(real, axis=1) - 1
            feed["position_ids"] = np.maximum(counted, 0)
        for name, array in feed.items():
            binding.bind_ortvalue_input(name, s.value(array))
        for name, buffer in self.cache.items():
            binding.bind_ortvalue_input(name, buffer)
            present = name.replace("past_key_values", "present")
            if s.shared_cache:
                binding.bind_ortvalue_output(present, buffer)
            else:
                binding.bind_output(present, s.device)
        binding.bind_output("logits", "cpu")
        s.session.run_with_iobinding(binding)
        # In the order of binding: every present, then the logits.
        *present_values, logits_value = binding.get_outputs()
        if not s.shared_cache:
            self.cache = dict(zip(self.cache, present_values, strict=True))
        self.lengths = after
        logits: Floats = logits_value.numpy()
        return logits


class Generator:
    """Text from an exported folder."""

    def __init__(self, folder: Path, *, provider: str = "auto", threads: int | None = None) -> None:
        self.session = Session(folder, provider=provider, threads=threads)
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
    logits = state.step(np.array([ids], np.int64))
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
    right = session.shared_cache
    tokens = np.zeros((len(rows), longest), np.int64)
    mask = np.zeros_like(tokens)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if right else slice(longest - len(row), longest)
        tokens[i, place], mask[i, place] = row, 1
    state = session.start(len(rows), longest + max_new_tokens)
    last = mask.sum(1) - 1 if right else np.full(len(rows), longest - 1)
    logits = state.step(tokens, mask)[np.arange(len(rows)), last]
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
