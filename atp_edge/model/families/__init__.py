"""The families that are supported, and what follows from a configuration of one of them."""

from atp_edge.model.families.record import (
    ATTENTION_PROJECTIONS,
    MLP_PROJECTIONS,
    PARTS,
    READER_OF,
    Family,
    HeadNorms,
    Layout,
    Norms,
    Part,
    Projection,
    Scales,
)
from atp_edge.model.families.registry import FAMILIES
from atp_edge.model.families.shape import (
    ACTIVATIONS,
    LayerShape,
    ModelShape,
    longest_text,
    model_shape,
    module_path,
    rope_settings,
    said_shape,
    scales_of,
    structured,
)

__all__ = [
    "ACTIVATIONS",
    "ATTENTION_PROJECTIONS",
    "FAMILIES",
    "MLP_PROJECTIONS",
    "PARTS",
    "READER_OF",
    "Family",
    "HeadNorms",
    "LayerShape",
    "Layout",
    "ModelShape",
    "Norms",
    "Part",
    "Projection",
    "Scales",
    "longest_text",
    "model_shape",
    "module_path",
    "rope_settings",
    "said_shape",
    "scales_of",
    "structured",
]
