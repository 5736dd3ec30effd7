"""The chunked losses mean what the whole logits mean, and never hold them."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

from atp_edge import losses
from atp_edge.data.blocks import Blocks
from atp_edge.evaluation.text_loss import perplexity
from atp_edge.losses import distilled_loss, language_loss, mean_cross_entropy
from atp_edge.masking.lora import add_lora
from tests.tiny import tiny_model

IDS = torch.randint(0, 97, (3, 30), generator=torch.Generator().manual_seed(0))
LABELS = torch.where(torch.arange(30) % 4 == 1, -100, IDS)
BATCH = Blocks(input_ids=IDS, labels=LABELS)
WEIGHT = 0.3


def whole_loss(model: nn.Module, teacher: nn.Module | None) -> Tensor:
    """The definition, on all logits at once."""
    logits = model(input_ids=IDS).logits[:, :-1].flatten(0, 1).float()
    targets = LABELS[:, 1:].flatten()
    plain = F.cross_entropy(logits, targets)
    if teacher is None:
        return plain
    learned = targets != -100
    wanted = teacher(input_ids=IDS).logits[:, :-1].flatten(0, 1)[learned].float()
    taught = F.cross_entropy(logits[learned], wanted.softmax(-1))
    return (1 - WEIGHT) * plain + WEIGHT * taught


def chunked_loss(model: nn.Module, teacher: nn.Module | None) -> Tensor:
    if teacher is None:
        return language_loss(model, BATCH)
    loss, plain = distilled_loss(model, teacher, BATCH, WEIGHT)
    torch.testing.assert_close(plain, whole_loss(model, None).detach(), rtol=1e-2, atol=0)
    return loss


def model_of(wrapped: bool, tied: bool) -> PeftModel | nn.Module:
    model = tiny_model("llama", tied=tied)
    if not wrapped:
        return model
    lora = add_lora(model, rank=4, alpha=8.0, seed=0)
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return lora


@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("taught", [False, True])
def test_values_and_gradients_equal_the_whole_logits(
    monkeypatch: pytest.MonkeyPatch, taught: bool, wrapped: bool, tied: bool, cast: bool
) -> None:
    monkeypatch.setattr(losses, "CHUNK_TOKENS", 7)
    teacher = tiny_model("llama", seed=5) if taught else None
    model = model_of(wrapped, tied)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert wrapped != any("embed" in name for name in parameters)
    results = []
    for loss_of in (chunked_loss, whole_loss):
        with torch.autocast("cpu", dtype=torch.bfloat16) if cast else contextlib.nullcontext():
            loss = loss_of(model, teacher)
        # Scaled, as gradient accumulation does.
        results.append((loss.detach(), torch.autograd.grad(loss * 3, list(parameters.values()))))
    (ours, our_gradients), (theirs, their_gradients) = results
    torch.testing.assert_close(ours, theirs, rtol=1e-2 if cast else 1e-5, atol=0)
    for name, a, b in zip(parameters, our_gradients, their_gradients, strict=True):
        error = (a - b).norm() / b.norm()
        assert error < (0.05 if cast else 1e-5), (name, error)


def test_a_model_that_equals_its_teacher_has_nothing_to_learn_from_it() -> None:
    model = tiny_model("llama", vocab_size=3000)
    loss, plain = distilled_loss(model, tiny_model("llama", vocab_size=3000), BATCH, 1.0)
    taught, alone = (
        torch.cat([g.flatten() for g in torch.autograd.grad(x, list(model.parameters()))])
        for x in (loss, language_loss(model, BATCH))
    )
    assert taught.norm() < 1e-5 * alone.norm()
    assert not plain.requires_grad


class Largest(TorchDispatchMode):
    """Watches every operator's results for the most elements."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = result if isinstance(result, (list, tuple)) else [result]
        sizes = [t.numel() for t in made if isinstance(t, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


def test_no_more_logits_than_one_chunk_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK_TOKENS", 4)
    small = {"vocab_size": 3000, "hidden_size": 16, "num_attention_heads": 2,
             "num_key_value_heads": 1, "intermediate_size": 8}  # fmt: skip
    model, teacher = (tiny_model("llama", seed=seed, **small) for seed in (0, 1))
    model.lm_head.requires_grad_(False)
    model.model.embed_tokens.requires_grad_(False)
    weight = model.lm_head.weight.numel()
    with Largest() as seen:
        distilled_loss(model, teacher, BATCH, WEIGHT)[0].backward()
    assert seen.elements <= weight  # the whole logits are five times the weight
    with Largest() as seen:
        whole_loss(model, teacher).backward()
    assert seen.elements > 4 * weight


def test_only_labelled_tokens_are_projected_and_none_gives_no_number() -> None:
    model = tiny_model("llama")
    few = Blocks(input_ids=IDS, labels=torch.full_like(IDS, -100))
    few.labels[0, 5] = 3
    rows: list[int] = []
    watch = model.lm_head.register_forward_hook(lambda m, i, o: rows.append(len(i[0])))
    loss = language_loss(model, few)
    watch.remove()
    assert not rows  # the head itself is never asked for all logits
    logits = model(input_ids=IDS).logits
    torch.testing.assert_close(loss, F.cross_entropy(logits[0, 4][None], torch.tensor([3])))
    none = Blocks(input_ids=IDS, labels=few.labels * 0 - 100)
    with pytest.raises(ValueError, match="no token of the batch is labelled"):
        language_loss(model, none)
    with pytest.raises(ValueError, match="no token of the batch is labelled"):
        distilled_loss(model, model, none, WEIGHT)


def test_perplexity_is_over_labelled_tokens_whatever_their_block() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        want = whole_loss(model, None).exp()
    assert perplexity(model, BATCH) == pytest.approx(float(want), rel=1e-5)


def test_a_loss_without_gradients_makes_none() -> None:
    """In fp32 one of the head's weight would take as much memory as it does, and a product."""
    model = tiny_model("llama")
    assert model.lm_head.weight.requires_grad
    products, scattered = [], []
    for grads in (torch.no_grad, torch.enable_grad):
        with grads(), profile() as seen:
            language_loss(model, BATCH)
        names = [e.name for e in seen.events()]
        products.append(names.count("aten::mm"))
        scattered.append(names.count("aten::scatter_add_"))
    assert products[1] - products[0] == 2, "of the hidden states and of the weight"
    assert scattered == [0, 1], "nor one of the logits"


def test_a_second_derivative_is_refused() -> None:
    """Its gradients are made in the forward, so that what depends on them would be left out."""
    hidden = torch.randn(5, 16, requires_grad=True)
    loss = mean_cross_entropy(hidden, nn.Linear(16, 50, bias=False), torch.arange(5))
    (first,) = torch.autograd.grad(loss.square(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.square().sum().backward()


def test_a_head_with_a_bias_is_refused() -> None:
    model = tiny_model("llama")
    model.lm_head = nn.Linear(48, 97)
    with pytest.raises(ValueError, match="lm_head has a bias"):
        language_loss(model, BATCH)


def test_the_distance_of_layers_is_zero_to_oneself_and_its_gradient_leads_nearer() -> None:
    ids = torch.randint(0, 97, (2, 20), generator=torch.Generator().manual_seed(0))
    batch = Blocks(input_ids=ids, labels=ids)
    teacher, model = tiny_model("llama", seed=0), tiny_model("llama", seed=5)

    def distance(of: torch.nn.Module) -> torch.Tensor:
        plain = distilled_loss(of, teacher, batch, 0.5)[0]
        return distilled_loss(of, teacher, batch, 0.5, hidden_weight=2.0)[0] - plain

    assert float(distance(teacher).detach()) == pytest.approx(0, abs=1e-6)
    before = distance(model)
    before.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.05 * parameter.grad
    assert float(distance(model).detach()) < float(before.detach())


def test_a_massive_token_does_not_hide_the_distance_of_the_others() -> None:
    wanted = torch.randn(20, 16, generator=torch.Generator().manual_seed(0))
    wanted[0] *= 1000
    off = wanted * torch.tensor([[1.0]] + 19 * [[1.1]])
    assert float(losses._layers_distance([off], [wanted])) == pytest.approx(0.01 * 19 / 20)


@pytest.mark.parametrize("distils", [False, True])
@pytest.mark.parametrize("family", ["granite", "gemma2"])
def test_logits_that_are_scaled_or_capped_are_learned_as_such(family: str, distils: bool) -> None:
    model, teacher = tiny_model(family), tiny_model(family, seed=1) if distils else None
    gradients = []
    for loss in (whole_loss, chunked_loss):
        model.zero_grad()
        value = loss(model, teacher)
        value.backward()
        gradients.append([value.detach(), *(p.grad.clone() for p in model.parameters())])
    for whole, chunked in zip(*gradients, strict=True):
        torch.testing.assert_close(chunked, whole, atol=1e-5, rtol=1e-4)
