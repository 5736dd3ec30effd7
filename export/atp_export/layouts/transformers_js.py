"""The layout that transformers.js loads by default."""

from __future__ import annotations

from pathlib import Path

import onnx

from atp_edge.run.files import read_json, write_json

# transformers.js's name of a precision, and what it adds to the file's name (4.3, utils/dtypes.js).
DTYPES = {"fp32": ("fp32", ""), "fp16": ("fp16", "_fp16"), "int8": ("int8", "_int8"),
          "int4": ("q4", "_q4")}  # fmt: skip


def check_transformers_js(precision: str) -> None:
    """Raise ValueError for a precision that transformers.js has no name for."""
    if precision not in DTYPES:
        raise ValueError(
            f"--layout transformers.js with {precision}: expected one of {', '.join(DTYPES)}"
        )


def to_transformers_js(folder: Path, precision: str) -> Path:
    """An exported folder as transformers.js loads it without options: onnx/model_q4.onnx and
    onnx/model_q4.onnx_data, named in config.json. Returns the path of the former.

    genai_config.json goes: it names model.onnx. The manifest is the caller's to write again.
    """
    dtype, suffix = DTYPES[precision]
    path = folder / "onnx" / f"model{suffix}.onnx"
    data = path.with_name(f"{path.name}_data")
    path.parent.mkdir()
    (folder / "model.onnx.data").rename(data)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = data.name
    path.write_bytes(model.SerializeToString())
    (folder / "model.onnx").unlink()
    (folder / "genai_config.json").unlink()
    config = read_json(folder / "config.json")
    named = {"dtype": dtype, "use_external_data_format": True}
    write_json(folder / "config.json", config | {"transformers.js_config": named})
    return path
