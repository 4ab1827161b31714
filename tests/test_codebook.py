"""The codebook, section 3 of dq.py.

    straight_through    test_straight_through_has_the_value_of_q_and_the_gradient_of_z
    Codebook.assign     test_nearest_code_equals_a_loop, test_the_nearest_code_is_found_far_from_the_origin
    Codebook.forward    test_commitment_counts_every_code_once_and_pulls_only_the_encoder and three more
    Codebook.update     test_ema_update_equals_a_loop_over_codes
    Codebook.restart    test_restart_revives_dead_codes_and_leaves_the_others and three more;
                        with several ranks: survival/test_processes.py
"""
import itertools
import operator

import pytest
import torch

import dq
import naive
from dq import Codebook


def test_nearest_code_equals_a_loop():
    book, z = Codebook(7, 3), torch.randn(50, 3)
    book.codes.copy_(torch.randn(7, 3) * torch.linspace(0.2, 3, 7)[:, None])  # of different norms
    ids = book.assign(z)
    assert len(ids.unique()) > 3, "50 vectors use at most three of 7 codes, but their nearest codes are more than that"
    for vector, i in zip(z, ids.tolist()):
        assert i == naive.nearest(book.codes, vector), "a vector is assigned a code that is not its nearest"


def test_the_nearest_code_is_found_far_from_the_origin():
    book, z = Codebook(64, 4), torch.randn(1000, 4) + 1000
    book.codes.copy_(torch.randn(64, 4) + 1000)
    nearest = torch.cdist(z.double(), book.codes.double()).argmin(1)
    assert (book.assign(z) == nearest).float().mean() > 0.995                # the others tie up to rounding


def test_straight_through_has_the_value_of_q_and_the_gradient_of_z():
    z, q, cost = torch.randn(5, 3, requires_grad=True), torch.randn(5, 3), torch.randn(5, 3)
    out = dq.straight_through(z, q)
    torch.testing.assert_close(out.detach(), q, msg=lambda why: f"the value differs from q: {why}")
    (out * cost).sum().backward()
    assert z.grad is not None, "no gradient reaches z"
    torch.testing.assert_close(z.grad, cost, msg=lambda why: f"the gradient changes on its way to z: {why}")


@pytest.mark.parametrize("age, decay", [(0, 0.1), (5, 0.4), (1000, 0.9)])
def test_ema_update_equals_a_loop_over_codes(age, decay):
    V, D = 6, 3
    book = Codebook(V, D, decay=0.9)
    book.restart = operator.is_                                              # does nothing
    book.codes.normal_()
    book.uses.uniform_(1, 2)
    book.sums.copy_(book.codes * book.uses[:, None])
    book.age.fill_(age)
    codes, uses, sums = (t.clone() for t in (book.codes, book.uses, book.sums))
    z = torch.randn(2, D, 4, 4)
    weight = torch.ones(2, 4, 4)
    z[:, :, :2, :2] = z[:, :, :1, :1]                                        # one coarse code covers four cells
    weight[:, :2, :2] = 1 / 4
    book.train()
    q, ids, loss = book(z, weight)
    for b, y, x in itertools.product(range(2), range(4), range(4)):
        assert ids[b, y, x] == naive.nearest(codes, z[b, :, y, x]), "the ids are not those of the nearest codes"
    uses, sums = naive.averages(codes, uses, sums, z, weight, decay)
    torch.testing.assert_close(book.uses, uses, msg=lambda why: (
        f"in batch {age + 1}, uses is not the moving average of the weights of the assigned vectors: {why}"))
    torch.testing.assert_close(book.sums, sums, msg=lambda why: (
        f"uses is right, but sums is not the moving average of the weighted vectors: {why}"))
    torch.testing.assert_close(book.codes, sums / uses[:, None], msg=lambda why: (
        f"uses and sums are right, but a code is not the average of the vectors that chose it: {why}"))


def test_commitment_counts_every_code_once_and_pulls_only_the_encoder():
    book = Codebook(4, 2).eval()
    book.codes.normal_()
    z = torch.randn(1, 2, 2, 2, requires_grad=True)
    weight = torch.tensor([[[0.25, 1.0], [1.0, 0.5]]])
    q, ids, loss = book(z, weight)
    expected = sum(0.25 * weight[0, y, x] * (book.codes[ids[0, y, x]] - z[0, :, y, x]).square().mean()
                   for y in range(2) for x in range(2)) / 4
    torch.testing.assert_close(loss, expected)
    q.sum().backward()
    assert (z.grad == 1).all()                                               # straight-through


def test_commitment_pulls_vectors_to_their_codes():
    book = Codebook(4, 2).eval()
    book.codes.normal_()
    z = torch.randn(1, 2, 2, 2, requires_grad=True)
    _, ids, loss = book(z, torch.full((1, 2, 2), 0.5))
    loss.backward()
    target = 0.25 * 0.5 / 4 * (z.detach() - book.codes[ids].permute(0, 3, 1, 2))  # the mean over 2 channels gives 1/2
    torch.testing.assert_close(z.grad, target)


def test_the_codebook_learns_in_training_only():
    book, z, weight = Codebook(4, 2), torch.randn(3, 2, 4, 4), torch.ones(3, 4, 4)
    book.train()
    book(z, weight)
    assert len(book.codes.unique(dim=0)) == 4 and book.age == 1              # the first batch initialises it
    before = {name: x.clone() for name, x in book.state_dict().items()}
    book.eval()
    book(z + 1, weight)
    assert all(torch.equal(x, before[name]) for name, x in book.state_dict().items())
    book.train()
    book(z + 1, weight)
    assert all(not torch.equal(x, before[name]) for name, x in book.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_distances_are_in_float32(dtype):
    """Also under autocast. Among so many codes, bfloat16 would pick a wrong one now and then."""
    book, z = Codebook(256, 2).eval(), torch.rand(1, 2, 8, 8).to(dtype)
    book.codes.copy_(torch.rand(256, 2))
    with torch.autocast("cpu", torch.bfloat16):
        q, ids, loss = book(z, torch.ones(1, 8, 8))
    assert q.dtype == loss.dtype == torch.float32
    for y, x in itertools.product(range(8), range(8)):
        assert ids[0, y, x] == naive.nearest(book.codes.double(), z[0, :, y, x].double())


def test_restart_revives_dead_codes_and_leaves_the_others():
    book, z, weight = Codebook(8, 2), torch.randn(64, 2), torch.full((64,), 0.5)
    book.restart(z, weight)                                                  # the first batch initialises all codes
    assert (book.uses == 4).all(), "after all codes are restarted, their usage is not set to the mean"
    book.uses.copy_(torch.arange(8) + 1)
    book.sums.copy_(book.codes * book.uses[:, None])
    book.codes[5], book.uses[5], book.sums[5] = 100.0, 0.39, 39.0            # 0.39 is less than 0.1 times the mean, 4
    before = [t.clone() for t in (book.codes, book.uses, book.sums)]
    book.restart(z, weight)
    others = torch.arange(8) != 5
    for t, was in zip((book.codes, book.uses, book.sums), before):
        torch.testing.assert_close(t[others], was[others], msg=lambda why: f"the restart changes a used code: {why}")
    distance = (z - book.codes[5]).norm(dim=1)
    assert distance.min() < 0.1, "the dead code is not moved to a vector of the batch"
    assert distance.min() > 0, "no noise is added to the dead code: it equals a vector of the batch"
    assert book.uses[5] == 4, "the usage of the restarted code is not set to the mean"
    torch.testing.assert_close(book.sums[5], 4 * book.codes[5], msg=lambda why: (
        f"sums / uses differs from the restarted code, so the next update would move it away: {why}"))


def test_restart_draws_by_weight():
    book, z = Codebook(8, 2), torch.rand(64, 2)
    z[32:] += 100
    book.restart(z, (torch.arange(64) < 32).float())
    assert (book.codes < 50).all(), "a code is restarted at a vector of weight 0"
    assert (book.codes != 0).any(), "no code is restarted, although all are dead at first"
    near = torch.cdist(book.codes, z).min(1).values.max()
    assert near < 0.1, "a restarted code is not close to any vector of the batch"


def test_no_vector_restarts_two_codes_while_there_are_enough():
    """There are more codes than vectors, but few are dead. Each dead code gets a different vector."""
    book, z = Codebook(64, 2), torch.arange(20.0)[:, None].expand(20, 2) * 100
    book.uses.fill_(20 / 64)
    dead = torch.randperm(64)[:15]
    book.uses[dead] = 0.0
    book.restart(z, torch.ones(20))
    started = (book.codes[dead, 0] / 100).round()
    assert len(started.unique()) == 15


def test_a_batch_of_few_different_vectors_gives_codes_that_differ():
    book = Codebook(16, 2)
    book.restart(torch.randn(3, 2).repeat(20, 1), torch.ones(60))
    assert torch.pdist(book.codes).min() > 1e-5, "two codes are equal, so one of them will never be chosen"


def test_the_first_batch_is_quantized_by_codes_of_its_own():
    """All codes are dead at first. They must be initialised before the nearest code is searched, not after."""
    book, z = Codebook(64, 2).train(), torch.randn(4, 2, 4, 4)
    q, ids, loss = book(z, torch.ones(4, 4, 4))
    assert len(ids.unique()) > 48 and (q - z).abs().max() < 0.1              # 64 vectors initialise 64 codes
