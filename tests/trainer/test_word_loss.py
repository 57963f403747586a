"""Words and ordered pairs of tokens as labels, and the loss that reads them off vectors."""

import math

import numpy as np
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


def test_only_what_one_of_a_caption_and_its_swap_has_is_asked_for() -> None:
    true, false = tokens([9, 5, 6], [1, 2]), tokens([9, 6, 5], [1, 3])
    labels, sign = word_loss.differing(true, false)
    place = {label: n for n, label in enumerate(labels.tolist())}
    for row in (0, 1):
        here, there = (of_row(word_loss.words(one), row) | of_row(word_loss.pairs(one), row) for one in (true, false))
        assert {label for label, n in place.items() if sign[row, n] == 1} == here - there
        assert {label for label, n in place.items() if sign[row, n] == -1} == there - here
    assert sign[0].abs().sum() == 2 and sign[1].abs().sum() == 4  # order alone; a word, and its pair


def swapped(vectors: torch.Tensor, head: WordHead, true: torch.Tensor, false: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return word_loss.swapped_words_losses(head, vectors, (vectors, vectors), (true, false))


def test_telling_a_swap_apart_is_logistic_in_the_logits_that_differ() -> None:
    head = WordHead(4)
    torch.nn.init.zeros_(head.embedding)
    true, false = tokens([9, 5, 6], [1, 2]), tokens([9, 6, 5], [1, 3])
    labels, sign = word_loss.differing(true, false)
    with torch.no_grad():
        head.embedding[labels, 0] = torch.arange(1.0, len(labels) + 1)
        head.bias[labels] = 0.5 * torch.arange(len(labels))
    vectors = torch.tensor([[0.6, 0.8, 0.0, 0.0], [0.8, 0.6, 0.0, 0.0]])
    by_hand = []
    for row, first in enumerate((0.6, 0.8)):
        logits = [first * 2 * (n + 1) + 0.5 * n for n in range(len(labels))]
        told = sum(s * logit for s, logit in zip(sign[row].tolist(), logits, strict=True))
        by_hand.append(told / sum(abs(s) for s in sign[row].tolist()) ** 0.5)
    of_image, of_text = swapped(vectors, head, true, false)
    assert of_image.item() == pytest.approx(np.logaddexp(0, [-told for told in by_hand]).mean(), rel=1e-5)
    both = by_hand + [-told for told in by_hand]  # the swaps' texts are given the same vectors here
    assert of_text.item() == pytest.approx(np.logaddexp(0, [-told for told in both]).mean(), rel=1e-5)


def test_a_swap_that_is_no_swap_teaches_nothing() -> None:
    same, head = tokens([5, 6, 7]), WordHead(8)
    vectors = F.normalize(torch.randn(1, 8), dim=1).requires_grad_()
    loss = sum(swapped(vectors, head, same, same), torch.zeros(()))
    loss.backward()
    assert loss.item() == pytest.approx(2 * math.log(2)) and not vectors.grad.any()  # type: ignore[union-attr]


def test_vectors_learn_who_stands_where_though_phrasings_differ() -> None:
    """'5 left-of 6' and '6 right-of 5' are one scene, and each is the other scene's swap."""
    torch.manual_seed(0)
    head, left, right = WordHead(32), 7, 8
    vectors = torch.nn.Parameter(torch.randn(2, 32))
    true = tokens([5, left, 6], [6, right, 5], [6, left, 5], [5, right, 6])
    false = tokens([5, right, 6], [6, left, 5], [6, right, 5], [5, left, 6])
    scene = torch.tensor([0, 0, 1, 1])
    optimizer = torch.optim.Adam([vectors, *head.parameters()], lr=0.05)
    for _ in range(100):
        loss, _ = swapped(F.normalize(vectors, dim=1)[scene], head, true, false)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


def test_gradients_do_not_depend_on_the_order_of_threads() -> None:
    """Or a resumed run would not end as an undisturbed one; at the size of a step, where torch runs in parallel."""
    generator = torch.Generator().manual_seed(0)
    true = torch.cat([torch.full((400, 1), START), torch.randint(40, (400, 12), generator=generator)], dim=1)
    true = torch.cat([true, torch.full((400, 1), END)], dim=1)
    false = true.clone()
    false[:, [2, 8]] = true[:, [8, 2]]
    vectors = F.normalize(torch.randn(400, 256, generator=generator), dim=1)

    def gradient() -> torch.Tensor:
        torch.manual_seed(0)
        head = WordHead(256)
        sum(swapped(vectors, head, true, false), torch.zeros(())).backward()
        assert head.embedding.grad is not None
        return head.embedding.grad

    once = gradient()
    assert once.any() and all(torch.equal(gradient(), once) for _ in range(5))


def test_no_pair_has_the_label_of_its_reverse() -> None:
    ids = torch.randperm(49_000, generator=torch.Generator().manual_seed(0))[:300].view(-1, 2)
    marks = torch.full((len(ids), 1), 49_001), torch.full((len(ids), 1), 49_002)
    forth, back = (torch.cat([marks[0], pair, marks[1]], dim=1) for pair in (ids, ids.flip(1)))
    assert not (word_loss.pairs(forth)[0] == word_loss.pairs(back)[0]).any()
