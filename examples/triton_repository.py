"""A model repository of NVIDIA's Triton Inference Server, of an exported folder.

    python triton_repository.py FOLDER REPOSITORY [NAME]

Writes REPOSITORY/NAME/config.pbtxt and REPOSITORY/NAME/1/ with the model's files (names and layout:
Triton's user guide, model_repository.md and model_configuration.md; backend onnxruntime). No server
was at hand: what is checked is that the configuration agrees with the model's inputs and outputs
(tests/atp_export/test_triton_repository.py). Token ids go in and logits come out; the KV cache is
an input and an output of every call, which the client feeds back, as onnx/generate.py does.

Needs onnx alone.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import onnx

_TYPES = {
    onnx.TensorProto.FLOAT: "TYPE_FP32",
    onnx.TensorProto.FLOAT16: "TYPE_FP16",
    onnx.TensorProto.BFLOAT16: "TYPE_BF16",
    onnx.TensorProto.INT64: "TYPE_INT64",
}


def configuration(model: Any, name: str) -> str:
    """config.pbtxt of an ONNX model; a dimension without a fixed size is -1, the batch's too."""
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    sections = [("input", inputs), ("output", model.graph.output)]
    lines = [f'name: "{name}"', 'backend: "onnxruntime"', "max_batch_size: 0"]
    for kind, values in sections:
        lines += [f"{kind} [", ",\n".join(_tensor(value) for value in values), "]"]
    return "\n".join([*lines, ""])


def _tensor(value: Any) -> str:
    kind = value.type.tensor_type
    dims = ", ".join(str(d.dim_value or -1) for d in kind.shape.dim)
    return f'  {{ name: "{value.name}" data_type: {_TYPES[kind.elem_type]} dims: [ {dims} ] }}'


def write_repository(folder: Path, repository: Path, name: str) -> Path:
    """The model's folder in the repository. Raises FileExistsError when it is there."""
    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    written = repository / name
    version = written / "1"
    version.mkdir(parents=True)
    for file in folder.glob("model.onnx*"):
        shutil.copy(file, version)
    (written / "config.pbtxt").write_text(configuration(model, name))
    return written


if __name__ == "__main__":
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    written = write_repository(source, target, *(sys.argv[3:] or [source.resolve().name]))
    sys.stdout.write(f"{written}\n")
