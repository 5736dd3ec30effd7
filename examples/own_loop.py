"""The decision learned in a loop of one's own: transformers, peft and accelerate, no run.

python examples/own_loop.py MODEL TEXT_FILE OUT
"""

import sys
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from atp_edge import DecisionLearner, save

STEPS, FREEZE, BLOCK = 60, 30, 128
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main(source: str, text: str, out: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(source)
    ids = tokenizer(Path(text).read_text(), return_tensors="pt")["input_ids"][0]
    blocks = ids[: len(ids) // BLOCK * BLOCK].view(-1, BLOCK)
    held_out = max(2, len(blocks) // 10)
    accelerator = Accelerator(mixed_precision="no")
    dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=LAYERS, task_type="CAUSAL_LM")
    model = get_peft_model(dense, lora).to(accelerator.device)
    train, decision = blocks[:-held_out], blocks[-held_out:]

    def loss(of: torch.nn.Module, rows: torch.Tensor, index: int) -> torch.Tensor:
        row = rows[index % len(rows)][None].to(accelerator.device)
        return of(input_ids=row, labels=row).loss

    scoring = [partial(loss, model, train, i) for i in range(4)]
    learner = DecisionLearner(model, scoring, accelerator, budget="params=0.6")
    for phase, last in (("joint", FREEZE), ("recovery", STEPS - FREEZE)):
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = accelerator.prepare(torch.optim.AdamW(trained, lr=1e-3))
        for step in range(last):
            if phase == "joint" and step % 2 == 0:
                learner.step(partial(loss, model, decision, step // 2))
            optimizer.zero_grad()
            accelerator.backward(loss(model, train, step))
            optimizer.step()
            if phase == "joint":
                learner.regularize(1e-3, (step + 1) / last)
        if phase == "joint":
            sys.stdout.write(f"frozen: {learner.kept_share:.3f} of the decoder stays\n")
            model = learner.narrow().train()
    save(model.merge_and_unload(), tokenizer, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
