"""optimum-onnx with an exported folder of any widths: its ORTModelForCausalLM sizes every layer's
cache by one number of KV heads and by hidden_size / num_attention_heads; here the file says.

    pip install 'optimum-onnx[onnxruntime]==0.1.0'   (its own environment: it wants transformers 4)
    python optimum_any_widths.py FOLDER NEW_TOKENS TEXT
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer


class AnyWidths(ORTModelForCausalLM):
    """Load with use_io_binding=False: there it would allocate outputs of one size again."""

    # generate() reads from these names what it may give.
    def forward(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        past_key_values: Any = None,
        position_ids: Any = None,
        use_cache: bool | None = None,
        **others: Any,
    ) -> Any:
        if past_key_values is None:
            empty = [self._empty(name, len(input_ids)) for name in self.key_value_input_names]
            past_key_values = tuple(zip(empty[::2], empty[1::2], strict=True))
        return super().forward(
            input_ids, attention_mask, past_key_values, position_ids, use_cache, **others
        )

    def _empty(self, name: str, rows: int) -> torch.Tensor:
        _, heads, _, width = self.input_shapes[name]
        return torch.zeros(rows, heads, 0, width, dtype=self.dtype)


if __name__ == "__main__":
    folder, new_tokens, text = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AnyWidths.from_pretrained(folder, use_io_binding=False)
    made = model.generate(
        **tokenizer(text, return_tensors="pt"), max_new_tokens=int(new_tokens), do_sample=False
    )
    sys.stdout.write(tokenizer.decode(made[0], skip_special_tokens=True) + "\n")
