"""A basis of the values in which few dimensions carry most, for structures of `head-dims`.

Attention is linear in its values: v_proj -> T v_proj with o_proj -> o_proj T^-1 computes the same
for any invertible T [head_dim, head_dim] of a KV head. With C = E[z z^T] over calibration tokens of
what o_proj reads and G = O^T O of its columns, the basis in which z is white and G diagonal cuts
the output least for any number of dimensions kept, in descending order of G: the singular value
decomposition of values and output (MoDeGPT, arXiv 2408.09632, type III; one basis for the query
heads of a group, with their C and G summed).

q and k are fixed to their pairs by RoPE. Since a structure is a pair of q and k together with two
dimensions of v, the two best dimensions go to the pair whose queries and keys are largest,
|q| |k| over the tokens (MoDeGPT, type II), and so on down.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from atp_edge.data.blocks import Blocks
from atp_edge.model.families import LayerShape, model_shape, module_path
from atp_edge.model.hooks import read_under

# Of C's mean diagonal: keeps T well enough conditioned for fp32 weights.
DAMPING = 1e-3


@dataclass(frozen=True, kw_only=True)
class _Moments:
    """Sums over tokens at one layer's attention."""

    queries: Tensor
    """Squares of a RoPE pair, [heads, head_dim / 2]."""
    keys: Tensor
    """The same of keys, [kv_heads, head_dim / 2]."""
    values: Tensor
    """z z^T of what o_proj reads, summed over the query heads of a group, [kv_heads, d, d]."""


@torch.no_grad()
def rebase_values(model: PreTrainedModel, blocks: Blocks) -> None:
    """Change the basis of v_proj and o_proj in place; the model computes the same.

    blocks: calibration text [N, T].
    """
    layers = model_shape(model.config).layers
    moments = [_zeros(layer, model.device) for layer in layers]
    hooks = []
    for i, seen in enumerate(moments):
        q, k, o = (
            model.get_submodule(module_path(i, name)) for name in ("q_proj", "k_proj", "o_proj")
        )
        hooks.append(q.register_forward_hook(partial(_add_pairs, seen.queries)))
        hooks.append(k.register_forward_hook(partial(_add_pairs, seen.keys)))
        hooks.append(o.register_forward_pre_hook(partial(_add_products, seen.values)))
    read_under(hooks, model, *blocks.input_ids.split(1))
    for i, seen in enumerate(moments):
        v, o = (model.get_submodule(module_path(i, name)) for name in ("v_proj", "o_proj"))
        _rebase(v, o, seen)


def _zeros(layer: LayerShape, device: torch.device) -> _Moments:
    pairs, d = layer.head_dim // 2, layer.head_dim
    return _Moments(
        queries=torch.zeros(layer.heads, pairs, device=device),
        keys=torch.zeros(layer.kv_heads, pairs, device=device),
        values=torch.zeros(layer.kv_heads, d, d, device=device),
    )


def _add_pairs(total: Tensor, module: nn.Module, inputs: Any, output: Tensor) -> None:
    pairs = output.float().unflatten(-1, (len(total), 2, -1))
    total += pairs.square().sum((0, 1, 3))


def _add_products(total: Tensor, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    groups, d = total.shape[:2]
    z = inputs[0].float().unflatten(-1, (groups, -1, d)).movedim(2, 0).flatten(1, -2)
    total += z.mT @ z


def _rebase(v: Any, o: Any, seen: _Moments) -> None:
    # On the CPU in float64 whatever the device: the same basis in a resumed run.
    values = seen.values.cpu().double()
    groups, d = values.shape[:2]
    rows = v.weight.cpu().double().unflatten(0, (groups, d))  # [groups, d, H]
    columns = o.weight.cpu().double().unflatten(1, (groups, -1, d))  # [H, groups, heads, d]
    gram = torch.einsum("hgnd,hgne->gde", columns, columns)
    there, back = _basis(values, gram, _places(seen).cpu())
    # Any scale of a dimension may go to either side: rows and columns of equal norms.
    read = (gram @ back).mul(back).sum(1).clamp_min(0).sqrt()
    written = (there @ rows).norm(dim=2).clamp_min(1e-30)
    scale = (read / written).clamp(1e-6, 1e6).sqrt()
    there, back = there * scale[:, :, None], back / scale[:, None, :]
    v.weight.copy_((there @ rows).flatten(0, 1))
    if v.bias is not None:
        bias = v.bias.cpu().double().view(groups, d, 1)
        v.bias.copy_((there @ bias).flatten())
    o.weight.copy_(torch.einsum("hgnd,gde->hgne", columns, back).flatten(1))


def _basis(values: Tensor, gram: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """T and its inverse of every group [groups, d, d]: the i-th best direction at places[i]."""
    mean = values.diagonal(dim1=1, dim2=2).mean(1)
    damping = (DAMPING * mean).clamp_min(1e-12)[:, None, None] * torch.eye(values.shape[1])
    lower = torch.linalg.cholesky(values + damping)
    directions = torch.linalg.eigh(lower.mT @ gram @ lower).eigenvectors.flip(2)
    turned = torch.empty_like(directions)
    turned[:, :, places] = directions
    back = lower @ turned
    # turned^T lower^-1, the inverse of back: turned is orthogonal.
    there = torch.linalg.solve_triangular(lower, turned.mT, upper=False, left=False)
    return there, back


def _places(seen: _Moments) -> Tensor:
    """Where the best value dimensions go, best first: both halves of the strongest pair, and so on
    down, [head_dim]."""
    keys = seen.keys.repeat_interleave(len(seen.queries) // len(seen.keys), 0)
    strongest = (seen.queries * keys).sqrt().sum(0).argsort(descending=True)
    return torch.stack([strongest, strongest + len(strongest)], 1).flatten()
