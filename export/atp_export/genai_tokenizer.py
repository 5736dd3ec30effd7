"""What onnxruntime-genai's own tokenizer makes of a tokenizer.json, without an error.

Read in onnxruntime-extensions (operators/tokenizer/bpe_kernels.cc, `SpmTokenize`), which genai 0.18
has inside, and held by tests. A SentencePiece tokenizer is BPE over a whole text; there it is BPE
over pieces that Llama 3's expression cuts, whose last space goes to the next word. One like
Gemma's, whose pre-tokenizer splits at a string, is cut between words, those of 10 characters and
more together, and after 100 in any case (a character without a piece counts its bytes); and a pair
is merged everywhere in a piece at once, so that long runs of spaces halve.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from atp_export.gguf.sentencepiece import is_sentencepiece
from atp_export.pre_tokenizers import name_of, steps_of

LIKE_GEMMA = "32 or more spaces in a row, and for more than 90 bytes without a space or a new line"
LIKE_LLAMA = (
    "two or more spaces in a row, and for a space at the beginning, or text after a special token"
)
OF_BYTES = "text that it splits or normalizes otherwise (a tokenizer like this was not compared)"


def other_ids_in_genai(folder: Path) -> str | None:
    """For what text it gives other ids than the tokenizer of an exported folder, as a sentence;
    None: for none that is known."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    if not is_sentencepiece(tokenizer):
        return None if _compared(tokenizer) else _sentence(OF_BYTES)
    at_a_string = any("String" in (step.get("pattern") or {}) for step in steps_of(tokenizer))
    return _sentence(LIKE_GEMMA if at_a_string else LIKE_LLAMA)


def _compared(tokenizer: dict[str, Any]) -> bool:
    """Whether a byte-level tokenizer has no more than those whose ids were compared: genai leaves
    normalizers, single digits, and what added tokens ask of the text beside them out."""
    steps, model = steps_of(tokenizer), tokenizer["model"]
    return (
        name_of(tokenizer) is not None
        and tokenizer.get("normalizer") is None
        and not model.get("end_of_word_suffix")
        and not any(step.get("type") == "Digits" for step in steps)
        and (len(steps) > 1 or steps[0].get("use_regex", True))
        and not any(
            token.get(asked)
            for token in tokenizer["added_tokens"]
            for asked in ("lstrip", "rstrip", "single_word")
        )
    )


def _sentence(text: str) -> str:
    return (
        f"onnxruntime-genai's own tokenizer gives other ids, and no error, for {text}: where that "
        "matters, give it the ids of tokenizers.Tokenizer.from_file('tokenizer.json'), with "
        "add_special_tokens=False for what a template has rendered"
    )
