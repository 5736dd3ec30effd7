"""Two-stage baselines: decisions by a score, made once before any tuning.

Each gives a score a structure ([size] a site, larger stays) that is projected onto the
budget, as the learned decision is; ShortGPT's gives a model with fewer layers instead, since a
plan keeps one structure or more of every site. Widths between layers follow the source: one
ranking over all layers where it ranks globally, equal shares where it cuts every layer alike.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from atp_edge.config import StructureSpace
from atp_edge.data.blocks import Blocks
from atp_edge.decision.budget import FeasibleDecisions
from atp_edge.losses import language_loss
from atp_edge.model.families import READER_OF, model_shape, module_path, structured
from atp_edge.model.hooks import read_under
from atp_edge.model.structures import Site, parts_by_structure
from atp_edge.run.watched import counted

Baseline = Callable[[PreTrainedModel, Blocks, FeasibleDecisions], list[Tensor]]


def check_start(start: str, structures: StructureSpace) -> None:
    """Raise ValueError for a score that does not know the structures of a space."""
    if structures == "head-dims" and start in ("wanda-sp", "flap"):
        raise ValueError(
            f"decision.start = {start!r} scores by what o_proj reads and knows nothing of RoPE "
            "pairs in q and k: with decision.space = 'head-dims' take importance, all-kept, "
            "magnitude, group-taylor or torch-pruning"
        )


def magnitude(model: PreTrainedModel, blocks: Blocks, feasible: FeasibleDecisions) -> list[Tensor]:
    """Mean square of a structure's coupled weights: the order of their L2 norm, a parameter.

    (Li et al., arXiv 1608.08710, summed over the group as LLM-Pruner's `l2` does.)
    """
    return [_a_weight(model, site, lambda w: w.detach().float() ** 2) for site in feasible.sites]


def group_taylor(
    model: PreTrainedModel, blocks: Blocks, feasible: FeasibleDecisions
) -> list[Tensor]:
    """Mean of |w * dL/dw| over a structure's coupled weights (LLM-Pruner, arXiv 2305.11627, eq. 3).

    First order, gradients summed over the calibration text before the product.
    """
    with _gradients(model, blocks):
        return [
            _a_weight(model, site, lambda w: (w.detach() * _gradient(w)).float().abs())
            for site in feasible.sites
        ]


def wanda_sp(model: PreTrainedModel, blocks: Blocks, feasible: FeasibleDecisions) -> list[Tensor]:
    """|W| * ||x|| of what o_proj and down_proj read, equal shares a layer.

    Wanda's score (arXiv 2306.11695, eq. 1) summed over a structure, as FLAP's paper compares with
    (Wanda-sp, arXiv 2312.11983); ranks within a site, so that every site loses the same share.
    """
    check_start("wanda-sp", feasible.sites[0].space)
    moments = _input_moments(model, blocks, feasible)
    scores = [
        _a_structure(site, _weight(model, site).abs().sum(0) * square.sqrt())
        for site, (_, square) in zip(feasible.sites, moments, strict=True)
    ]
    return [s.argsort().argsort() / len(s) for s in scores]


def flap(model: PreTrainedModel, blocks: Blocks, feasible: FeasibleDecisions) -> list[Tensor]:
    """Fluctuation of each input times ||W||^2 of its column, standardised a site, ranked globally.

    FLAP's WIFV score and adaptive structure search (arXiv 2312.11983, eqs. 5 to 7), without its
    bias compensation, which adds biases that runtimes do not load.
    """
    check_start("flap", feasible.sites[0].space)
    scores = []
    for site, (mean, square) in zip(
        feasible.sites, _input_moments(model, blocks, feasible), strict=True
    ):
        fluctuation = (square - mean**2) * (_weight(model, site) ** 2).sum(0)
        score = _a_structure(site, fluctuation)
        spread = score.std() if len(score) > 1 else score.new_ones(())
        scores.append((score - score.mean()) / spread.clamp_min(1e-12))
    return scores


def torch_pruning(
    model: PreTrainedModel, blocks: Blocks, feasible: FeasibleDecisions
) -> list[Tensor]:
    """GroupTaylorImportance of Torch-Pruning over its dependency graph, for MLPs (extra `peers`).

    Attention is scored by `group_taylor`: Torch-Pruning 1.6.1 finds no end to the group of v_proj
    under grouped-query attention as transformers 5.23 traces it.
    """
    try:
        import torch_pruning as tp
    except ImportError:
        raise ValueError(
            "the package torch-pruning is not installed: pip install 'atp-edge[peers]'"
        ) from None

    scores = group_taylor(model, blocks, feasible)
    with _gradients(model, blocks):
        importance = tp.importance.GroupTaylorImportance(group_reduction="sum", normalizer=None)
        graph = tp.DependencyGraph().build_dependency(
            model,
            example_inputs={"input_ids": blocks.input_ids[:1, :8], "use_cache": False},
            output_transform=lambda out: out.logits,
        )
        for i, site in enumerate(feasible.sites):
            if site.kind == "mlp":
                name = model_shape(model.config).layout.mlp[0]
                if name != "gate_proj":
                    continue  # Torch-Pruning does not know how a fused one is split.
                gate: Any = model.get_submodule(module_path(site.layer, name))
                rows = list(range(site.size))
                group = graph.get_pruning_group(gate, tp.prune_linear_out_channels, idxs=rows)
                scores[i] = importance(group).detach().float().cpu() / site.unit_parameters
    return scores


BASELINES: dict[str, Baseline] = {
    "magnitude": magnitude,
    "group-taylor": group_taylor,
    "wanda-sp": wanda_sp,
    "flap": flap,
    "torch-pruning": torch_pruning,
}


# Whole layers (ShortGPT)


@torch.no_grad()
def block_influence(model: PreTrainedModel, blocks: Blocks) -> Tensor:
    """1 - cosine of a layer's input and output, mean over tokens: [layers].

    (ShortGPT, arXiv 2403.03853, eq. 1.)
    """
    layers: Any = model.get_submodule("model.layers")
    found = torch.zeros(len(layers))

    def watch(i: int, module: nn.Module, inputs: Any, output: Any) -> None:
        after = output[0] if isinstance(output, tuple) else output
        cosine = nn.functional.cosine_similarity(inputs[0].float(), after.float(), dim=-1)
        found[i] += (1 - cosine).mean().cpu()

    hooks = [layer.register_forward_hook(partial(watch, i)) for i, layer in enumerate(layers)]
    read_under(hooks, model, *blocks.input_ids.split(1))
    return found / len(blocks.input_ids)


def without_least_layers(
    model: PreTrainedModel, blocks: Blocks, feasible: FeasibleDecisions
) -> PreTrainedModel:
    """A copy without the layers of least influence, as few as meet the budget: plain and uniform.

    Raises ValueError when the budget leaves no whole layer.
    """
    order = block_influence(model, blocks).argsort(descending=True)
    count = int(feasible.target_share * len(order) + 1e-9)
    if count < 1:
        raise ValueError(
            f"a share of {feasible.target_share:.3f} keeps none of {len(order)} layers; "
            f"take a budget of {1 / len(order):.3f} or more"
        )
    kept = sorted(order[:count].tolist())
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = count
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in kept]
    slim: Any = AutoModelForCausalLM.from_config(config).to(model.device, model.dtype)
    place = {old: new for new, old in enumerate(kept)}
    state = {}
    for name, value in model.state_dict().items():
        parts = name.split(".")
        if "layers" in parts:
            at = parts.index("layers") + 1
            if int(parts[at]) not in place:
                continue
            parts[at] = str(place[int(parts[at])])
        state[".".join(parts)] = value
    slim.load_state_dict(state)
    return slim.eval()


# Parts


class _gradients:  # noqa: N801  # a context manager, named as a function
    """Gradients of the language loss, summed over blocks, on the weights while inside."""

    def __init__(self, model: PreTrainedModel, blocks: Blocks) -> None:
        self.model, self.blocks = model, blocks

    def __enter__(self) -> None:
        self.wanted = {p: p.requires_grad for p in self.model.parameters()}
        self.model.requires_grad_(True)
        self.model.zero_grad()
        for i in counted(range(len(self.blocks.input_ids)), "scoring"):
            language_loss(self.model, self.blocks.rows([i]).to(self.model.device)).backward()

    def __exit__(self, *_: object) -> None:
        self.model.zero_grad()
        for parameter, wanted in self.wanted.items():
            parameter.requires_grad_(wanted)


def _gradient(weight: Tensor) -> Tensor:
    assert weight.grad is not None
    return weight.grad


def _weight(model: PreTrainedModel, site: Site) -> Tensor:
    """The weight of o_proj or down_proj, [hidden, inputs]."""
    module: Any = model.get_submodule(module_path(site.layer, READER_OF[site.kind]))
    return module.weight.detach().float().cpu()


def _a_weight(model: PreTrainedModel, site: Site, of: Callable[[Tensor], Tensor]) -> Tensor:
    """`of` summed over each structure's weights and biases, a parameter: [size]."""
    shape = model_shape(model.config)
    total = torch.zeros(site.size)
    for name in shape.projections(site.kind):
        module: Any = model.get_submodule(module_path(site.layer, name))
        parts = structured(shape.layers[site.layer], name)
        reads = name == READER_OF[site.kind]
        total += _a_structure(site, of(module.weight).sum(0 if reads else 1).cpu(), *parts)
        # Biases of o_proj and down_proj belong to no structure.
        if module.bias is not None and not reads:
            total += _a_structure(site, of(module.bias).cpu(), *parts)
    return total / site.unit_parameters


def _a_structure(site: Site, values: Tensor, *parts: int) -> Tensor:
    """Rows or columns [size * n] summed over the structures that own them: [size].

    parts: rows of what lies in them one after the other (q, k, v of a fused projection).
    """
    every = parts_by_structure(
        values.float().cpu(), 0, parts or (len(values),), site.size, site.space
    )
    return torch.stack([part.sum(1) for part in every]).sum(0)


@torch.no_grad()
def _input_moments(
    model: PreTrainedModel, blocks: Blocks, feasible: FeasibleDecisions
) -> list[tuple[Tensor, Tensor]]:
    """Mean and mean square over tokens of what o_proj or down_proj reads: [inputs] each, a site."""
    sums = [[torch.zeros(()), torch.zeros(())] for _ in feasible.sites]

    def watch(sums: list[Tensor], module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        z = inputs[0].flatten(0, -2).float().cpu()
        sums[0], sums[1] = sums[0] + z.sum(0), sums[1] + (z**2).sum(0)

    hooks = [
        model.get_submodule(module_path(s.layer, READER_OF[s.kind])).register_forward_pre_hook(
            partial(watch, pair)
        )
        for s, pair in zip(feasible.sites, sums, strict=True)
    ]
    read_under(hooks, model, *blocks.input_ids.split(1))
    tokens = blocks.input_ids.numel()
    return [(first / tokens, second / tokens) for first, second in sums]
