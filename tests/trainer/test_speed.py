"""What operations are counted and what speed is measured, for the share of the machine that a run uses."""

from __future__ import annotations

import torch
from torch import nn

from trainer.speed import matrix_speed, operations


def test_operations_of_products_and_convolutions_forward_and_backward_are_counted() -> None:
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    assert operations(lambda: a @ b) == 2 * 3 * 4 * 5
    assert operations(lambda: a + 1) == 0
    layer, x = nn.Linear(4, 5, bias=False), torch.randn(3, 4, requires_grad=True)
    assert operations(lambda: layer(x).sum().backward()) == 3 * 2 * 3 * 4 * 5  # the answer, and both gradients
    kernel, picture = nn.Conv2d(2, 6, 3, padding=1), torch.randn(1, 2, 8, 8)
    assert operations(lambda: kernel(picture)) == 2 * 6 * 2 * 3 * 3 * 8 * 8


def test_the_matrix_speed_is_a_number_of_operations_and_measured_once() -> None:
    cpu = torch.device("cpu")
    speed = matrix_speed(cpu, False)
    assert 1e8 < speed < 1e15 and matrix_speed(cpu, False) == speed
