"""What the matrices of a checkpoint read on calibration text: the grams that GPTQ rounds by.

A token counts by how much the loss heeds what the matrix makes of it (GuidedQuant, arXiv
2505.07004, section 3.2, one group of channels). Were all tokens equal, a block's first would rule:
its activations are a hundred times the others' (massive activations, arXiv 2402.17762), and their
exact values hardly matter.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from atp_edge.model.checkpoint import load_narrow
from atp_edge.model.families import PARTS, Projection
from atp_edge.model.storage import EMBEDDING, HEAD

# The first of several projections that read one input, by the others.
BESIDE: dict[str, Projection] = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}


def input_grams(checkpoint: Path, ids: Tensor) -> dict[str, Tensor]:
    """X^T diag(w) X [in, in] over token blocks [N, T], by the name of the module that reads X (the
    first of several), in fp32. w: of every token, the squared size of d loss / d output, summed
    over the projections that read X. Under lm_head what the vocabulary head reads, and under
    model.embed_tokens G^T G, G [T, in] being d loss / d embeddings' output, which an error in a
    token's row meets. Where both are one matrix, lm_head holds the sum.

    All layers' grams are held at once, K^2 * 4 bytes each: 0.2 GB for a model of 135M parameters,
    more than the weights for the largest; and one block's activations. Raises ValueError when there
    are no blocks.
    """
    if not len(ids):
        raise ValueError("there is no block to calibrate on: give longer documents or more of them")
    model = load_narrow(checkpoint).requires_grad_(False)
    grams: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0].detach().flatten(0, -2)

            def add(gradient: Tensor) -> None:
                weighted = gradient.flatten(0, -2).square().sum(-1, keepdim=True)
                gram = x.T @ (weighted * x)
                grams[name] = grams[name].add_(gram) if name in grams else gram

            output.register_hook(add)

        return hook

    for path, module in model.named_modules():
        parent, _, own = path.rpartition(".")
        if own in PARTS:
            module.register_forward_hook(watch(f"{parent}.{BESIDE.get(own, own)}"))
    model.get_output_embeddings().register_forward_hook(watch(HEAD))
    embed = model.get_input_embeddings()
    # Gemma multiplies a row before it leaves the module, and an error in it as well.
    scale = float(getattr(embed, "embed_scale", 1.0))
    table = HEAD if model.config.tie_word_embeddings else EMBEDDING
    for block in ids:
        # The gradient goes back to the embeddings' output, through what no weight asks for.
        embedded = embed(block[None]).requires_grad_()
        model(inputs_embeds=embedded, labels=block[None], use_cache=False).loss.backward()
        met = scale**2 * (embedded.grad[0].T @ embedded.grad[0])
        grams[table] = grams[table].add_(met) if table in grams else met
    return grams
