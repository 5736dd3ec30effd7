"""Random models, decisions and text of the sections, made on the device."""

from __future__ import annotations

import torch
from peft import PeftModel
from transformers import LlamaConfig, PreTrainedModel

from atp_bench.acceptance.sizes import Sizes
from atp_edge.data.blocks import Blocks
from atp_edge.decision.budget import FeasibleDecisions, feasible_decisions, parse_budget
from atp_edge.decision.projection import project
from atp_edge.masking.lora import add_lora
from atp_edge.model.families import model_shape
from atp_edge.model.narrow import build_model
from atp_edge.model.stream import fill, without_weights
from atp_edge.model.structures import Masks
from atp_edge.training.cpu import attention_implementation

_MULTIPLE = {True: 8, False: 32}
"""Of channels, that MLP widths are multiples of: a toy's, and a real one's."""


def random_llama(config: LlamaConfig, device: str, dtype: torch.dtype) -> PreTrainedModel:
    """A frozen model on the device, projections and head in `dtype`, all else in fp32, as training
    keeps a base; weights of deviation 0.02, norms of 1."""
    with without_weights():
        model = build_model(config, torch.float32)
    model.tie_weights()
    draw = torch.Generator(device=device).manual_seed(0)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}

    def drawn(name: str) -> torch.Tensor:
        if "norm" in name:
            return torch.ones(shapes[name], device=device)
        kind = torch.float32 if "embed" in name else dtype
        empty = torch.empty(shapes[name], device=device, dtype=kind)
        return empty.normal_(0, 0.02, generator=draw)

    fill(model, shapes, drawn)
    model.tie_weights()
    model.set_attn_implementation(attention_implementation(device))
    return model.to(device).eval().requires_grad_(False)


def llama_with_lora(
    sizes: Sizes, *, layers: int, vocabulary: int | None = None, dtype: torch.dtype | None = None
) -> PeftModel:
    """Some layers of the sizes' decoder with LoRA, whose B is not zero."""
    config = sizes.config(layers, vocabulary=vocabulary)
    return lora_on(random_llama(config, sizes.device, dtype or sizes.dtype), sizes.rank)


def lora_on(base: PreTrainedModel, rank: int) -> PeftModel:
    """LoRA in fp32 on a model, drawn with B away from zero."""
    device = next(base.parameters()).device
    model = add_lora(base, rank=rank, alpha=2.0 * rank, seed=0).to(device)
    draw = torch.Generator(device=device).manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.01, generator=draw)
    return model


def random_blocks(sizes: Sizes, *, vocabulary: int | None = None, count: int = 0) -> Blocks:
    """Blocks of random tokens on the device; count: of them, a step's if it is 0."""
    draw = torch.Generator().manual_seed(2)
    shape = (count or sizes.blocks, sizes.block_tokens)
    ids = torch.randint(0, vocabulary or sizes.vocabulary, shape, generator=draw)
    return Blocks(input_ids=ids, labels=ids).to(torch.device(sizes.device))


def feasible_of(config: LlamaConfig, sizes: Sizes) -> FeasibleDecisions:
    """Decisions that keep the sizes' share of the decoder, a width a layer."""
    return feasible_decisions(
        model_shape(config),
        parse_budget(f"params={sizes.kept}"),
        widths="per-layer",
        width_multiple=_MULTIPLE[sizes.toy],
    )


def random_masks(model: PeftModel, sizes: Sizes, *, fixed: bool) -> Masks:
    """A decision of random scores: bool, or numbers with a gradient."""
    feasible = feasible_of(model.get_base_model().config, sizes)
    draw = torch.Generator().manual_seed(3)
    scores = [torch.randn(site.size, generator=draw) for site in feasible.sites]
    masks = [mask.to(sizes.device) for mask in project(scores, feasible).masks]
    if fixed:
        return Masks(masks)
    return Masks(mask.float().requires_grad_() for mask in masks)
