"""An exported folder as a `LanguageModel` to be scored (`atp_edge.evaluation.scoring`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from atp_export.runtime import Generation, Session, generate_tokens
from torch import Tensor

from atp_edge.evaluation.scoring import Tokens


@dataclass(frozen=True)
class OnnxModel:
    """A session of ONNX Runtime, of either flavour and any precision."""

    session: Session

    @property
    def window(self) -> int | None:
        """Tokens that it reads at once: the exported context."""
        return self.session.context

    def logits(self, tokens: Tensor, mask: Tensor, *, last: int) -> Tensor:
        """Next-token logits [B, last, V] of the last positions of tokens [B, S], padded on the
        right (mask 0)."""
        batch, length = tokens.shape
        state = Generation(self.session, batch, length)
        logits = state.step(tokens.numpy(), mask.numpy(), first=length - last)
        return torch.from_numpy(np.ascontiguousarray(logits))

    def logits_after(self, prompt: Tokens, rows: Sequence[Tokens]) -> list[Tensor]:
        """Next-token logits [S, V] of every row of S tokens. Each follows the prompt, which is read
        once."""
        state = Generation(self.session, 1, len(prompt) + max(map(len, rows)))
        state.step(np.array([prompt], np.int64), last_only=True)
        return [torch.from_numpy(state.fork().step(np.array([row], np.int64))[0]) for row in rows]

    def generate(self, prompts: Sequence[Tokens], *, new_tokens: int, end: int) -> list[list[int]]:
        """Greedy new tokens of every prompt; a row stops before `end`."""
        return generate_tokens(self.session, prompts, max_new_tokens=new_tokens, ends={end})
