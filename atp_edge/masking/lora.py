"""peft's LoRA on every projection of the decoder, in layers that can carry a decision."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, Protocol

import torch
from atp_kernels import LoraLayer, backend_name, mask_scored, masked_lora_linear
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as PeftLoraLinear
from torch import Tensor, nn
from transformers import PreTrainedModel

from atp_edge.config import StructureSpace
from atp_edge.model.families import PARTS, READER_OF, model_shape, module_path, structured

# Where a decision's mask stands: `atp_edge.masking.apply`.
Placement = Literal["base", "whole"]


class SiteForward(Protocol):
    """The projections of an attention or MLP, computed together under a decision."""

    def compute(self, name: str, x: Tensor) -> Tensor:
        """One projection's output."""
        ...


class MaskedLoraLinear(PeftLoraLinear):
    """peft's LoRA linear layer under a decision (if any).

    A site computes the layer with others of its block; without one, masks stand on it.
    """

    out_mask: Tensor | None = None
    in_mask: Tensor | None = None
    placement: Placement = "whole"
    site: SiteForward | None = None
    rested: SiteForward | None = None
    """The site of the last fixed decision, which generator steps do not take apart."""
    name: str = ""
    space: StructureSpace = "groups"
    """What the structures of a decision on this model are."""
    rows: tuple[int, ...] = ()
    """Of a layer that writes structures: its output rows, part by part (q, k and v where fused)."""

    structure_mask: Tensor | None = None
    """`in_mask` by structure, where they lie side by side."""
    score: Tensor | None = None
    """Takes the importance of what the layer reads, by structure (`decision.importance.scored`)."""

    @property
    def masks_input_alone(self) -> bool:
        """Whether a decision of numbers stands on what the layer reads and on nothing else."""
        mask = self.structure_mask
        alone = mask is not None and self.out_mask is None and self.placement == "whole"
        return alone and self.site is None and self.lora_alone and _takes_products_apart(mask)

    @property
    def scores_itself(self) -> bool:
        """Whether `score` is filled by the layer's own backward pass."""
        return self.score is not None and self.masks_input_alone

    @property
    def lora_alone(self) -> bool:
        """Whether the layer is W x + s B A x as it stands: on, not merged, and plain LoRA."""
        plain = "default" in self.lora_A and "default" not in self.lora_variant
        return plain and not self.disable_adapters and not self.merged

    def parts(self) -> LoraLayer:
        """The frozen weight and bias, and the LoRA's factors."""
        base = self.get_base_layer()
        return LoraLayer(
            weight=base.weight,
            lora_a=self.lora_A["default"].weight,
            lora_b=self.lora_B["default"].weight,
            bias=base.bias,
        )

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., in_features] -> [..., out_features], or the live ones of either."""
        if not self.lora_alone:
            return super().forward(x, *args, **kwargs)
        if self.site is not None:
            return self.site.compute(self.name, x)
        if self.masks_input_alone:
            assert self.structure_mask is not None
            return self.unmasked(mask_scored(x, self.structure_mask, score=self.score))
        return self._product(
            x, out_mask=self.out_mask, in_mask=self.in_mask, placement=self.placement
        )

    def unmasked(self, x: Tensor) -> Tensor:
        """The layer on an x that the decision was put on already."""
        return self._product(x)

    def _product(self, x: Tensor, **decision: Any) -> Tensor:
        parts = self.parts()
        return masked_lora_linear(
            x,
            parts.weight,
            parts.lora_a,
            parts.lora_b,
            bias=parts.bias,
            scaling=self.scaling["default"],
            **decision,
        )


def _takes_products_apart(mask: Tensor | None) -> bool:
    """Whether a mask of numbers is multiplied apart from the product, by an operator of its own."""
    return mask is not None and mask.dtype != torch.bool and backend_name() == "joined"


def add_lora(
    model: PreTrainedModel,
    *,
    rank: int,
    alpha: float,
    seed: int,
    ranks: Mapping[str, int] | None = None,
    dora: bool = False,
    space: StructureSpace = "groups",
) -> PeftModel:
    """Wrap every projection of the decoder with peft's LoRA; B starts at zero, A from the seed.

    ranks: of projections by their path (`module_path`), where they differ from `rank`; the scale
    alpha / rank is the same for all. dora: peft's weight-decomposed LoRA (arXiv 2402.09353), which
    takes no decision. space: the structures that decisions on the model will be about. Uses peft's
    own extension point for layers, so that the adapter saves and loads as any other.
    """
    shape = model_shape(model.config)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=[*shape.layout.attention, *shape.layout.mlp],
        task_type="CAUSAL_LM",
        rank_pattern=dict(ranks or {}),
        alpha_pattern={path: alpha * r / rank for path, r in (ranks or {}).items()},
        use_dora=dora,
    )
    config._register_custom_module({nn.Linear: MaskedLoraLinear})
    with torch.random.fork_rng(devices=[]), _drawn_in_fp32(model):
        torch.manual_seed(seed)
        made = get_peft_model(model, config)
    note_structures(made, space)
    return made


def note_structures(model: PeftModel, space: StructureSpace) -> None:
    """Tell every LoRA layer of the model which of its rows make a structure."""
    shape = model_shape(model.get_base_model().config)
    for i, layer in enumerate(shape.layers):
        for name in (*shape.layout.attention, *shape.layout.mlp):
            module = lora_layer(model, i, name)
            module.space = space
            if name not in READER_OF.values():
                module.rows = structured(layer, name)


@contextmanager
def _drawn_in_fp32(model: PreTrainedModel) -> Iterator[None]:
    """Weights of another type stand aside, for peft draws A in the type of the weight beside it."""
    aside = {
        module: module.weight
        for path, module in model.named_modules()
        if path.rpartition(".")[2] in PARTS and module.weight.dtype != torch.float32
    }
    for module, weight in aside.items():
        shape = (module.out_features, module.in_features)
        wide = torch.empty(1, dtype=torch.float32, device=weight.device).expand(shape)
        module.weight = nn.Parameter(wide, requires_grad=False)
    try:
        yield
    finally:
        for module, weight in aside.items():
            module.weight = weight


def lora_layer(model: PeftModel, layer: int, projection: str) -> MaskedLoraLinear:
    """The LoRA layer of one projection."""
    module: MaskedLoraLinear = model.get_base_model().get_submodule(module_path(layer, projection))
    return module
