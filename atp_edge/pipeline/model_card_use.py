"""How to load what a run ships, line by line, and what it is for."""

from __future__ import annotations

from typing import Literal

from atp_edge.config import Config

Layout = Literal["plain", "transformers.js", "openvino"]
"""Of an exported folder: what loads it by default."""

GOOD_FOR = "text like that it was tuned on; CPUs and little memory."
NOT_FOR = (
    "general use: what it forgets elsewhere was not measured, and rare words suffer most. It has "
    "the source model's biases."
)

GENERATOR = """\
from pathlib import Path
from atp_export.runtime import Generator

print(Generator(Path("FOLDER")).generate(["Text"], max_new_tokens=32)[0])"""
GENAI = """\
import onnxruntime_genai as og

model = og.Model("FOLDER")
tokenizer = og.Tokenizer(model)
tokenizer.update_options(add_special_tokens="true")  # not for a rendered chat
options = og.GeneratorParams(model)
options.set_search_options(max_length=64)
generator = og.Generator(model, options)
generator.append_tokens(tokenizer.encode("Text"))
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)))"""


OPENVINO = """\
import openvino_genai

pipeline = openvino_genai.LLMPipeline("FOLDER", "CPU")
print(pipeline.generate("Text", max_new_tokens=32, apply_chat_template=False))"""
TRANSFORMERS_JS = """\
import { AutoModelForCausalLM, AutoTokenizer } from "@huggingface/transformers";

const tokenizer = await AutoTokenizer.from_pretrained("FOLDER");
const model = await AutoModelForCausalLM.from_pretrained("FOLDER");
const tokens = await model.generate({ ...tokenizer("Text"), max_new_tokens: 32 });
console.log(tokenizer.batch_decode(tokens, { skip_special_tokens: true })[0]);"""
PLAIN_JS = '{ subfolder: "", dtype: "fp32" }'
"""Options of transformers.js in Node for a folder that is not laid out for it, of any precision."""
SERVERS = (
    "vLLM 0.32 or later serves these widths with `--trust-remote-code`; SGLang and llama.cpp's "
    "converter do not read them."
)
CHECKED = "`atp-edge verify --manifest FOLDER` checks the files."


def how_to_load(form: str, config: Config, base: str, layout: Layout = "plain") -> str:
    """Lines to copy, for every runtime that was tried (docs/runtimes.md)."""
    match form:
        case "slim":
            return _slim(config)
        case "adapter":
            return _python(
                "from peft import PeftModel\n"
                "from transformers import AutoModelForCausalLM\n\n"
                f'model = AutoModelForCausalLM.from_pretrained("{base}")\n'
                'model = PeftModel.from_pretrained(model, "FOLDER")'
            )
        case _:
            return _onnx(layout)


def how_to_use() -> list[tuple[str, str]]:
    """(runtime, lines to copy) for onnx/, of the runtimes that are proven."""
    return [
        ("atp-edge, shell", 'atp-edge generate "Text" --out FOLDER'),
        ("atp-edge, Python", GENERATOR),
        ("onnxruntime-genai", GENAI),
        ("ONNX Runtime alone, Python", "python examples/onnx/generate.py FOLDER 32 ID ID ID"),
        ("ONNX Runtime alone, Node", "node examples/onnx/generate.mjs FOLDER 32 ID ID ID"),
        (
            "transformers.js, Node",
            TRANSFORMERS_JS.replace(
                'LM.from_pretrained("FOLDER")', f'LM.from_pretrained("FOLDER", {PLAIN_JS})'
            ),
        ),
        ("check the files", "atp-edge verify --manifest FOLDER"),
    ]


def _slim(config: Config) -> str:
    stock = config.widths == "uniform" and config.decision.space == "groups"
    code = "" if stock else ", trust_remote_code=True"
    text = _python(
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")\n'
        f'model = AutoModelForCausalLM.from_pretrained("FOLDER"{code})'
    )
    if stock:
        return text
    text = f"{text}\n\ntransformers 5.20 or later; `import atp_edge` does in place of the flag."
    return text if config.decision.space != "groups" else f"{text} {SERVERS}"


def _onnx(layout: Layout) -> str:
    if layout == "openvino":
        return f"With openvino_genai:\n\n{_python(OPENVINO)}\n\n{CHECKED}"
    if layout == "transformers.js":
        return f"With transformers.js:\n\n```js\n{TRANSFORMERS_JS}\n```\n\n{CHECKED}"
    return (
        f"With atp-edge:\n\n{_python(GENERATOR)}\n\nWith onnxruntime-genai:\n\n{_python(GENAI)}"
        "\n\nONNX Runtime alone, in Python and Node: atp-edge's `examples/onnx/`. transformers.js, "
        f'Node: `AutoModelForCausalLM.from_pretrained("FOLDER", {PLAIN_JS})`.\n\n{CHECKED}'
    )


def _python(code: str) -> str:
    return f"```python\n{code}\n```"
