"""Words and ordered pairs of tokens as labels, and the loss that reads them off vectors."""

import math

import pytest
import torch
from torch.nn import functional as F

from trainer import word_loss
from trainer.word_loss import LABELS, RARE, WordHead, present

START, END = 900, 999  # marks; the end mark is the highest number


def tokens(*texts: list[int]) -> torch.Tensor:
    rows = [[START, *text, END] for text in texts]
    width = max(map(len, rows)) + 2  # padding follows the end mark
    return torch.tensor([row + [0] * (width - len(row)) for row in rows])


def of_row(found: tuple[torch.Tensor, torch.Tensor, int], row: int) -> set[int]:
    labels, rows, _ = found
    return set(labels[rows == row].tolist())


def test_words_are_what_stands_between_the_marks() -> None:
    found = word_loss.words(tokens([5, 6, 7], [7, 6], []))
    assert len(of_row(found, 0)) == 3
    assert of_row(found, 1) < of_row(found, 0)
    assert of_row(found, 2) == set()


def test_a_swap_has_the_same_words_and_other_pairs() -> None:
    both = tokens([5, 8, 6], [6, 8, 5])
    one, other = (of_row(word_loss.words(both), row) for row in (0, 1))
    assert one == other
    one, other = (of_row(word_loss.pairs(both), row) for row in (0, 1))
    assert len(one) == len(other) == 3
    assert not one & other


def test_pairs_reach_over_any_distance() -> None:
    found = of_row(word_loss.pairs(tokens([1, 2, 3, 4], [1, 4])), 1)
    assert found < of_row(word_loss.pairs(tokens([1, 2, 3, 4], [1, 4])), 0)


def test_labels_that_few_rows_have_are_not_asked_for() -> None:
    labels, rows = torch.tensor([3, 3, 3, 9, 4, 4]), torch.tensor([0, 0, 1, 1, 1, 2])
    asked, there = present(labels, rows, least=2, count=3)
    assert asked.tolist() == [3, 4]  # 3 stands twice in row 0, and counts once
    assert there.tolist() == [[1, 0], [1, 1], [0, 1]]


def test_the_loss_is_the_cross_entropy_per_label_that_is_there() -> None:
    """At the start every label is as rare as RARE says, whatever the vectors."""
    torch.manual_seed(0)
    head = WordHead(16)
    torch.nn.init.zeros_(head.embedding)
    texts = tokens([5, 6], [5, 6], [5, 7], [7, 8])
    (loss,) = word_loss.word_loss(head, (F.normalize(torch.randn(4, 16), dim=1),), texts)
    yes, no = math.log1p(math.exp(-RARE)), math.log1p(math.exp(RARE))
    # words 5 (3 rows), 6 (2) and 7 (2) are asked of 4 rows; no pair stands in 4 rows
    assert loss.item() == pytest.approx((7 * yes + 5 * no) / 7, rel=1e-5)


def test_vectors_learn_to_say_words_and_order() -> None:
    torch.manual_seed(0)
    head = WordHead(32)
    vectors = torch.nn.Parameter(torch.randn(8, 32))
    texts = tokens(*([[5, 6]] * 4), *([[6, 5]] * 4))  # equal but for the order
    optimizer = torch.optim.Adam([vectors, *head.parameters()], lr=0.05)
    losses = []
    for _ in range(150):
        (loss,) = word_loss.word_loss(head, (F.normalize(vectors, dim=1),), texts)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 < losses[0]


def test_labels_are_few_enough_for_a_table() -> None:
    many = tokens(list(range(1, 40)))
    for kind in (word_loss.words(many), word_loss.pairs(many)):
        assert int(kind[0].min()) >= 0
        assert int(kind[0].max()) < LABELS


def test_a_batch_without_words_in_common_costs_nothing() -> None:
    (loss,) = word_loss.word_loss(WordHead(8), (F.normalize(torch.randn(2, 8), dim=1),), tokens([1], [2]))
    assert loss.item() == 0
