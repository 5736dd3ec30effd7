"""Text that the untouched, the tuned dense and the slim model write, for a person to read.

Chosen by a rule, not by hand: the beginning of the first test blocks, spread over the test split. A
prompt ends where the first answer begins (chats, prompts with completions: what is not learned), or
after `PROMPT_TOKENS`; every model goes on greedily.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from atp_edge.config import Config
from atp_edge.data.blocks import Blocks
from atp_edge.model.checkpoint import load_narrow
from atp_edge.model.families import longest_text
from atp_edge.run.folder import RunFolder
from atp_edge.run.progress import Progress
from atp_edge.run.watched import counted
from atp_edge.training.setup import load_dense, splits_of, tokenizer_of

SAMPLES, PROMPT_TOKENS, NEW_TOKENS, LONGEST_PROMPT = 3, 32, 40, 256
RULE = (
    f"The first {SAMPLES} test blocks; the prompt is their beginning, up to the first answer, or "
    f"{PROMPT_TOKENS} tokens; every model goes on greedily."
)


def add_samples(config: Config, run: RunFolder, progress: Progress) -> None:
    """Write samples into metrics.json, unless those there are of the same slim model."""
    slim = run.records.get("shrink")
    files = slim.wrote if slim else {}
    made_of = files.get("slim/model.safetensors")
    if made_of is None or run.metrics().get("samples", {}).get("of") == made_of:
        return
    if run.records.trouble("shrink") or run.records.trouble_with("dense"):
        return
    try:
        blocks = splits_of(config).test
    except (OSError, ValueError) as error:
        progress.say(f"no samples: the text is not what it was ({error})")
        return
    progress.say("writing samples with the untouched, the tuned and the slim model")
    run.add_metrics("samples", {"of": made_of, "rule": RULE, "rows": _rows(config, run, blocks)})


def _rows(config: Config, run: RunFolder, blocks: Blocks) -> list[dict[str, str]]:
    tokenizer = tokenizer_of(config)
    prompts = [prompt_of(blocks, i) for i in range(min(SAMPLES, len(blocks.input_ids)))]
    rows = [{"prompt": tokenizer.decode(ids)} for ids in prompts]
    loads = {
        "untouched": lambda: load_dense(config),
        "tuned": lambda: load_narrow(run.dense),
        "slim": lambda: load_narrow(run.slim),
    }
    for name in counted(list(loads), "writing samples"):
        model: Any = loads[name]()
        for row, ids in zip(rows, prompts, strict=True):
            new = greedy(model, ids)
            row[name] = tokenizer.decode(new, skip_special_tokens=True)
        del model
    return rows


def prompt_of(blocks: Blocks, index: int) -> list[int]:
    """The beginning of a block, of 1 token or more."""
    labels = blocks.labels[index]
    learned = (labels != -100).nonzero().flatten()
    first = int(learned[0]) if len(learned) else PROMPT_TOKENS
    # A text is learned from its first or second token on: its prompt has a fixed length.
    count = first if 2 < first <= LONGEST_PROMPT else PROMPT_TOKENS
    ids: list[int] = blocks.input_ids[index, : max(1, min(count, len(labels) - 1))].tolist()
    return ids


@torch.no_grad()
def greedy(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """New tokens [N] after a prompt, the likeliest each, as many as the model reads."""
    new = min(NEW_TOKENS, longest_text(model.config) - len(ids))
    tokens = torch.tensor([ids], device=model.device)
    made = model.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=max(1, new),
        do_sample=False,
        num_beams=1,
        pad_token_id=0,
    )
    found: Tensor = made[0, len(ids) :]
    return found
