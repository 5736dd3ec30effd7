import pytest
import torch

from atp_edge.reconstruction.least_squares import gram_of, solve_damped


def test_a_gram_is_that_of_all_rows_and_symmetric() -> None:
    rows = torch.randn(300, 48)
    gram = gram_of(rows)
    torch.testing.assert_close(gram.double(), rows.double().T @ rows.double(), rtol=1e-5, atol=1e-4)
    assert torch.equal(gram, gram.T)


def test_inputs_that_are_not_finite_are_divergence_not_a_traceback() -> None:
    gram = torch.eye(4)
    gram[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="no longer finite"):
        solve_damped(gram, torch.ones(4, 2), 0.1)
