"""Muon against PyTorch's own, and what orthogonalising does."""

from __future__ import annotations

import pytest
import torch

from kontext_core.training.muon import QUINTIC, Muon, orthogonalise


@pytest.mark.parametrize("shape", [(24, 64), (64, 24), (32, 32)])
def test_singular_values_come_near_one(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 7
    values = torch.linalg.svdvals(orthogonalise(matrix).float())
    assert values.max() < 1.3 and values.median() > 0.6
    # the directions stay: the product with the matrix's own polar factor is symmetric and positive
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    aligned = (u.T @ orthogonalise(matrix).float() @ v.T).diagonal()
    assert aligned.min() > 0.2


@pytest.mark.parametrize("shape", [(24, 64), (64, 24)])
def test_its_steps_are_those_of_pytorch(shape):
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("PyTorch has Muon since 2.9")
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(shape, generator=generator)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    mine = Muon([ours], lr=0.02, weight_decay=0.1)
    peer = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        ours.grad = torch.randn(shape, generator=generator)
        theirs.grad = ours.grad.clone()
        mine.step()
        peer.step()
    moved = (theirs - start).norm()
    # PyTorch multiplies in bfloat16 (2⁻⁸ a rounding) five times over
    assert (ours - theirs).norm() < 0.03 * moved


def test_only_matrices():
    with pytest.raises(ValueError, match=r"matrices; this parameter is \(3,\)"):
        Muon([torch.nn.Parameter(torch.zeros(3))], lr=0.1)


@pytest.mark.parametrize("shape", [(32, 64), (200, 40)])
def test_steps_in_the_smaller_product_are_those_of_the_matrix(shape):
    """A matrix with a product of its own taking over, against the plain iteration in float64."""
    generator = torch.Generator().manual_seed(3)
    matrix = torch.randn(shape, generator=generator)
    matrix *= 10 ** -torch.linspace(0, 3, shape[1])  # singular values over three orders of magnitude
    x = matrix.double() if shape[0] < shape[1] else matrix.T.double()
    x = x / x.norm()
    a, b, c = QUINTIC
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    expected = x if shape[0] < shape[1] else x.T
    found = orthogonalise(matrix)
    bound = 1e-3 if found.dtype == torch.float32 else 0.03
    assert (found.double() - expected).norm() < bound * expected.norm()
