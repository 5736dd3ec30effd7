"""Tiny models that are taught a few texts in seconds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from atp_edge.data.documents import Document, Segment
from atp_edge.data.encoding import Encoder
from tests.tiny import tiny_model
from tests.tiny_tokenizers import tokenizer_of


def tokenizer() -> Any:
    return tokenizer_of("byte-level", bos=False)


def document(text: str, kind: str = "all") -> Document:
    return Document((Segment(text),), kind)


def taught(texts: Sequence[str], steps: int, *, lr: float = 3e-3, seed: int = 0) -> PreTrainedModel:
    """A tiny Llama that has learned these texts, drawn anew at every step."""
    tokens = tokenizer()
    model = tiny_model("llama", tied=True, seed=seed, vocab_size=len(tokens), intermediate_size=96)
    return taught_on(model, texts, steps, lr=lr)


def taught_on(
    model: PreTrainedModel, texts: Sequence[str], steps: int, *, lr: float = 3e-3
) -> PreTrainedModel:
    """The model, taught further."""
    encoder = Encoder(tokenizer())
    rows = [torch.tensor(encoder.context(text)) for text in texts]
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    draw = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(steps):
        chosen = [rows[i] for i in torch.randint(len(rows), (16,), generator=draw)]
        ids = torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True)
        labels = torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True, padding_value=-100)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()
