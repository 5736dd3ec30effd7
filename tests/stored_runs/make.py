"""How the stored runs of this folder were made: with the code from before the modules moved.

It was run once, from a folder that held this file alone, with the source folders of that code in
PYTHONPATH (see README.md). It refuses to write over what is there.
"""

from __future__ import annotations

import json
import lzma
import os
import random
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

HERE = Path(__file__).parent
END = "<|end|>"
TOKENS = 64
DOCUMENTS = 64
LEARNING_STEPS = 400
NEW_TOKENS = 12
LEAST_LEAD = 0.02  # of a greedy token over the next best: no rounding turns them round
PROMPT = "The old baker carried a"

SETTINGS = [
    "--model", "model", "--data", "data.jsonl", "--budget", "params=0.7", "--steps", "10",
    "--lora-rank", "2", "--lora-alpha", "4", "--dataset-block-tokens", "16",
    "--dataset-decision-share", "0.2", "--dataset-test-share", "0.2", "--dataset-test-blocks", "2",
    "--train-save-every", "2", "--train-precision", "no", "--decision-width-multiple", "4",
    "--decision-importance-blocks", "2", "--decision-lr", "0.1",
    "--recovery-reconstruct-blocks", "2", "--recovery-approach-blocks", "2",
    "--bench-rounds", "1", "--bench-prompt-tokens", "8", "--bench-new-tokens", "4",
    "--bench-threads", "1",
]  # fmt: skip

COMMAND = "from atp_edge.cli import main; main()"

# Step 2 of the joint phase is made, and not saved yet: the last checkpoint is that after step 1.
INTERRUPTED = """
from atp_edge.progress import Terminal

def record(self, record):
    if record.phase == "control" and record.step == 2:
        raise KeyboardInterrupt

Terminal.record = record
from atp_edge.cli import main
main()
"""

WORDS = {
    "person": ["baker", "sailor", "teacher", "gardener", "miller", "painter", "weaver", "doctor"],
    "kind": ["old", "young", "quiet", "careful", "tired", "cheerful", "patient", "clever"],
    "thing": ["basket", "lantern", "ladder", "letter", "kettle", "mirror", "blanket", "hammer"],
    "place": ["harbour", "village", "market", "bridge", "garden", "station", "valley", "orchard"],
    "time": ["before sunrise", "at noon", "in early spring", "after the rain", "every evening"],
    "weather": ["windy", "foggy", "warm", "frosty", "bright", "stormy"],
    "deed": ["carried", "repaired", "found", "borrowed", "sold", "painted", "lost", "cleaned"],
}

SENTENCES = [
    "The {kind} {person} {deed} a {thing} near the {place} {time}.",
    "{time} it was {weather}, and nobody came to the {place} but a {kind} {person}.",
    "Behind the {place} stood a {thing} that the {person} had {deed} long ago.",
    "A {person} told the {kind} {person} how the {thing} was {deed}.",
    "When the {weather} days began, the {place} smelled of bread and a {thing} hung by the door.",
    "Nobody knew why the {person} {deed} the {thing} and left the {place} {time}.",
]


def documents() -> list[str]:
    """Short plain texts; the seed is fixed, so that they are always the same."""
    draw = random.Random(0)
    texts = []
    for _ in range(DOCUMENTS):
        sentences = []
        for sentence in draw.sample(SENTENCES, 3):
            while "{" in sentence:
                slot = sentence[sentence.index("{") + 1 : sentence.index("}")]
                sentence = sentence.replace(f"{{{slot}}}", draw.choice(WORDS[slot]), 1)
            sentences.append(sentence[0].upper() + sentence[1:])
        texts.append(" ".join(sentences))
    return texts


def make_model(folder: Path, texts: list[str]) -> None:
    """A tiny Llama that has learned a little of the texts, and a byte-level tokenizer."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=TOKENS, special_tokens=[END], show_progress=False)
    raw.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=END)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = "norm" in name
            parameter.copy_(torch.randn_like(parameter) * (0.1 if norm else 0.2) + norm)
    ids = torch.tensor(tokenizer(" ".join(texts))["input_ids"])
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(LEARNING_STEPS):
        places = torch.randint(len(ids) - 32, (16, 1)) + torch.arange(32)
        model(input_ids=ids[places], labels=ids[places]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def python(code: str, *arguments: str, folder: Path, exit_code: int = 0) -> None:
    """Run the code with a command line, in a folder, on one thread."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != exit_code:
        sys.exit(f"exit code {done.returncode}, not {exit_code}:\n{done.stdout}{done.stderr}")


def figures(run: Path) -> dict[str, Any]:
    """What a run came to."""
    from atp_export.runtime import Generator, generate_tokens

    import atp_edge  # noqa: F401  (its import lets transformers load per-layer widths)

    torch.set_num_threads(1)
    generator = Generator(run / "onnx", threads=1)
    ids = generator.tokenizer(PROMPT)["input_ids"]
    slim = AutoModelForCausalLM.from_pretrained(run / "slim", dtype=torch.float32).eval()
    with torch.no_grad():
        greedy = generate_tokens(generator.session, [ids], max_new_tokens=NEW_TOKENS)[0]
        logits = slim(torch.tensor([ids + greedy])).logits[0, len(ids) - 1 : -1]
    best = logits.topk(2)
    assert best.indices[:, 0].tolist() == greedy
    assert (best.values[:, 0] - best.values[:, 1]).min() > LEAST_LEAD
    metrics = json.loads((run / "metrics.json").read_text())
    parts = json.loads((run / "checkpoint" / "parts.json").read_text())
    return {
        "plan_sha256": metrics["train"]["plan_sha256"],
        "perplexities": {name: part["perplexity"] for name, part in parts.items()},
        "slim_perplexity": metrics["shrink"]["perplexity"],
        "ids": ids,
        "logits": logits[0].tolist(),
        "greedy": greedy,
    }


def trim(run: str, *left_out: str) -> None:
    """Remove of a run what no later stage reads, and the locks."""
    patterns = [*(f"{run}/{name}" for name in left_out), "**/.*.lock"]
    for path in [path for pattern in patterns for path in HERE.glob(pattern)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def main() -> None:
    if find_spec("atp_edge.progress") is None:
        sys.exit("atp_edge is not the code from before the move: set PYTHONPATH")
    if any((HERE / name).exists() for name in ("finished", "begun")):
        sys.exit("the stored runs are there, and are never written again")
    texts = documents()
    (HERE / "data.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    make_model(HERE / "model", texts)
    python(COMMAND, "run", *SETTINGS, "--out", "finished", folder=HERE)
    python(INTERRUPTED, "run", *SETTINGS, "--out", "begun", folder=HERE, exit_code=130)
    expected = figures(HERE / "finished")
    with tempfile.TemporaryDirectory() as temporary:
        copied = Path(temporary) / "copied"
        shutil.copytree(HERE, copied)
        python(COMMAND, "run", "--config", "begun/config.toml", folder=copied)
        assert figures(copied / "begun") == expected
    # The numbers of another kind of CPU differ in their last digits.
    expected["cpu"] = torch.backends.cpu.get_cpu_capability()
    (HERE / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    # Most of it is the decision generator: its moments, next to all of them zero, take no room.
    state = HERE / "begun" / "checkpoint" / "state.pt"
    fours = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 1, "lp": 2}]
    state.with_name("state.pt.xz").write_bytes(lzma.compress(state.read_bytes(), filters=fours))
    trim("finished", "report.html", "onnx-dense", "checkpoint/*.pt", "adapter/README.md")
    trim("begun", "checkpoint/*.pt")


if __name__ == "__main__":
    main()
