"""A state with a faint residual stream."""

from __future__ import annotations

import pytest
from atp_export.verification.faint import EMBEDDING, HEAD, faded, faint_factors
from atp_export.verification.places import Place

from atp_edge.model.families import said_shape
from tests.tiny import tiny_model


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_is_the_embedding_is_not_held_twice(tied: bool) -> None:
    model = tiny_model("llama", tied=tied)
    state = {n: p.detach() for n, p in model.named_parameters(remove_duplicate=False)}
    places = {n: Place(tensor=EMBEDDING if tied and n == HEAD else n) for n in state}
    factors = faint_factors(state, places, said_shape(model.config))
    found = faded(state, factors)
    assert found.keys() == state.keys()
    assert (found[HEAD] is found[EMBEDDING]) == tied
    assert (found[HEAD] is state[HEAD]) == (not tied)
    assert found[EMBEDDING] is not state[EMBEDDING]
