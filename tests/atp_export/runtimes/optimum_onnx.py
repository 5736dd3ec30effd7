"""ORTModelForCausalLM on exported folders, in an environment of optimum-onnx's own.

A line of JSON in, {folder, texts, new, by}, a line out: {ids, tokens}, or {error}. by: the path of
examples/onnx/optimum_any_widths.py, for its class in place of ORTModelForCausalLM.
"""

import json
import runpy
import sys

import torch
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer


def answers(folder, texts, new, by=None):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    kind = runpy.run_path(by)["AnyWidths"] if by else ORTModelForCausalLM
    model = kind.from_pretrained(folder, use_io_binding=False)
    ids = [tokenizer(text)["input_ids"] for text in texts]
    return {"ids": ids, "tokens": [greedy(model, torch.tensor([row]), new) for row in ids]}


def greedy(model, row, new):
    made = model.generate(
        row, attention_mask=torch.ones_like(row), max_new_tokens=new, min_new_tokens=new,
        do_sample=False, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return made[0, row.shape[1] :].tolist()


for line in sys.stdin:
    try:
        said = answers(**json.loads(line))
    except Exception as error:
        said = {"error": str(error)}
    print(json.dumps(said), flush=True)  # noqa: T201
