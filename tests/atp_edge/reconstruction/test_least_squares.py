import pytest
import torch

from atp_edge.reconstruction.least_squares import gram_of, solve_damped


@pytest.mark.parametrize("width", [1, 256, 257, 600])
def test_a_gram_is_that_of_all_rows_on_both_sides_of_its_diagonal(width: int) -> None:
    rows = torch.randn(300, width)
    gram = gram_of(rows)
    torch.testing.assert_close(gram.double(), rows.double().T @ rows.double(), rtol=1e-5, atol=1e-4)


def test_inputs_that_are_not_finite_are_divergence_not_a_traceback() -> None:
    gram = torch.eye(4)
    gram[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="no longer finite"):
        solve_damped(gram, torch.ones(4, 2), 0.1)
