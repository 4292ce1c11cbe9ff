"""Losses against their plain formulas, and what they keep for the backward pass."""

import pytest
import torch
from torch.nn import functional

from diagnostics import UserError
from diagnostics.finetune import distillation_loss, mixed_loss, objectives, predicting, supervised_loss

BATCH, TOKENS, VOCAB = 2, 11, 7


@pytest.fixture
def case(monkeypatch):
    monkeypatch.setattr(objectives, "CHUNK", 3)
    torch.manual_seed(0)
    student, teacher = torch.randn(2, BATCH, TOKENS, VOCAB, dtype=torch.float64)
    labels = torch.randint(0, VOCAB, (BATCH, TOKENS))
    labels[:, :4] = labels[0, 7] = -100
    return student.requires_grad_(), teacher.requires_grad_(), labels


def plain_kl(student, teacher, labels):
    """Sum over positions whose next label is a target, and their number, by loops."""
    total, count = 0, 0
    for row in range(BATCH):
        for t in range(TOKENS - 1):
            if labels[row, t + 1] != -100:
                p, q = teacher[row, t].softmax(0).detach(), student[row, t].softmax(0)
                total, count = total + sum(p[v] * (p[v] / q[v]).log() for v in range(VOCAB)), count + 1
    return total, count


def plain_ce(student, labels):
    return functional.cross_entropy(student[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def assert_same_loss_and_gradient(found, wanted, student):
    gradients = [torch.autograd.grad(loss, student, retain_graph=True)[0] for loss in (found, wanted)]
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(*gradients)


def test_distillation(case):
    student, teacher, labels = case
    total, count = plain_kl(student, teacher, labels)
    mask = predicting(labels)
    assert int(mask.sum()) == count == 13
    assert_same_loss_and_gradient(distillation_loss(student, teacher, mask), total / count, student)
    assert_same_loss_and_gradient(distillation_loss(student, teacher, mask, n_items=5), total / 5, student)
    assert distillation_loss(student, student, mask) == 0
    distillation_loss(student, teacher, mask).backward()
    assert teacher.grad is None


def test_supervised_is_the_stock_loss(case):
    student, _, labels = case
    assert_same_loss_and_gradient(supervised_loss(student, labels), plain_ce(student, labels), student)


def test_mixture(case):
    student, teacher, labels = case
    total, count = plain_kl(student, teacher, labels)
    wanted = 0.25 * plain_ce(student, labels) + 0.75 * total / count
    assert_same_loss_and_gradient(mixed_loss(student, teacher, labels, supervised=0.25), wanted, student)
    with pytest.raises(UserError, match="give 0 to 1"):
        mixed_loss(student, teacher, labels, supervised=1.5)


def test_without_targets_the_loss_is_zero_and_goes_backward(case):
    student, teacher, labels = case
    nothing = torch.full_like(labels, -100)
    loss = mixed_loss(student, teacher, nothing, supervised=0.5)
    loss.backward()
    assert loss == 0
    assert not student.grad.any()


def test_logits_of_half_precision_are_taken_in_float32(case):
    student, teacher, labels = (value.detach() for value in case)
    student, teacher = student.bfloat16(), teacher.bfloat16()
    found = distillation_loss(student, teacher, predicting(labels))
    total, count = plain_kl(student.float(), teacher.float(), labels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, total / count)


def test_the_rounding_of_a_large_vocabulary_does_not_add_up():
    """In float32 throughout, the loss would be off by 1e-6 and more, below 0 too; the logits are float32 exactly."""
    generator = torch.Generator().manual_seed(0)
    teacher = 4 * torch.randn(1, 3, 50_000, generator=generator)
    student = teacher + 1e-3 * torch.randn(teacher.shape, generator=generator)
    mask = torch.ones(1, 3, dtype=torch.bool)
    p, q = (logits[0].double().log_softmax(-1) for logits in (teacher, student))
    exact = float((p.exp() * (p - q)).sum(-1).mean())
    assert 1e-8 < exact < 1e-6
    assert float(distillation_loss(student, teacher, mask)) == pytest.approx(exact, rel=1e-5)
    assert distillation_loss(teacher, teacher, mask) == 0


def test_no_wider_copy_is_kept_for_the_backward_pass(case):
    student, teacher, labels = case
    student = student.detach().bfloat16().requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        mixed_loss(student, teacher.bfloat16(), labels, supervised=0.5)
    assert not [tensor for tensor in kept if tensor.dtype.itemsize > 2 and tensor.ndim > 1]


def test_logits_of_different_shapes_are_refused(case):
    student, teacher, labels = case
    with pytest.raises(UserError, match="differ in their logits"):
        distillation_loss(student, teacher[..., :-1], predicting(labels))
