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

from atp_export.gguf.sentencepiece import is_sentencepiece
from atp_export.pre_tokenizers import name_of, steps_of

LIKE_GEMMA = "32 or more spaces in a row, and for more than 90 bytes without a space or a new line"
LIKE_LLAMA = "two or more spaces in a row, and for a space at the beginning"
OF_BYTES = "text that its expression splits otherwise (this pre-tokenizer was not compared)"


def other_ids_in_genai(folder: Path) -> str | None:
    """For what text it gives other ids than the tokenizer of an exported folder, as a sentence;
    None: for none that is known."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    if not is_sentencepiece(tokenizer):
        return None if name_of(tokenizer) else _sentence(OF_BYTES)
    at_a_string = any("String" in (step.get("pattern") or {}) for step in steps_of(tokenizer))
    return _sentence(LIKE_GEMMA if at_a_string else LIKE_LLAMA)


def _sentence(text: str) -> str:
    return (
        f"onnxruntime-genai's own tokenizer gives other ids, and no error, for {text}: where that "
        "matters, give it the ids of tokenizers.Tokenizer.from_file('tokenizer.json')"
    )
