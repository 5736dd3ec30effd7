"""The families by their `model_type`."""

from atp_edge.model.families import (
    ernie4_5,
    exaone4,
    gemma2,
    gemma3,
    glm4,
    granite,
    hunyuan,
    llama,
    ministral,
    ministral3,
    mistral,
    olmo2,
    olmo3,
    phi3,
    qwen2,
    qwen3,
    seed_oss,
    smollm3,
)
from atp_edge.model.families.record import Family

FAMILIES: dict[str, Family] = {
    module.FAMILY.model_type: module.FAMILY
    for module in (
        ernie4_5,
        exaone4,
        gemma2,
        gemma3,
        glm4,
        granite,
        hunyuan,
        llama,
        ministral,
        ministral3,
        mistral,
        olmo2,
        olmo3,
        phi3,
        qwen2,
        qwen3,
        seed_oss,
        smollm3,
    )
}
