"""Block-wise int8 and int4 weights, by onnxruntime's own quantizer."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnxruntime.quantization.matmul_nbits_quantizer import (
    DefaultWeightOnlyQuantConfig,
    MatMulNBitsQuantizer,
)

BLOCK = 32


def quantize(path: Path, *, bits: int) -> None:
    """Replace every MatMul's weight in model.onnx by blocks of 32 at 8 or 4 bits, symmetric.

    accuracy_level 4 (int8 activations inside the kernel): without it CPUs take a slow path.
    """
    config = DefaultWeightOnlyQuantConfig(
        block_size=BLOCK, is_symmetric=True, accuracy_level=4, bits=bits
    )
    quantizer = MatMulNBitsQuantizer(onnx.load(path), algo_config=config)
    quantizer.process()
    data = path.with_name(path.name + ".data")
    data.unlink()
    quantizer.model.save_model_to_file(str(path), use_external_data_format=True)
