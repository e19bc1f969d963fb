import copy
import pickle

import pytest
import torch
from torch import nn

from vlv_model.freezing import evaluating, freeze, is_frozen, thaw


@pytest.fixture
def parent():
    inner = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    return nn.Sequential(freeze(inner), nn.Linear(2, 2))


def test_train_never_sets_a_frozen_part_to_train_mode(parent):
    inner = parent[0]
    for module in (parent, inner, inner[1]):
        module.train()
        assert not any(part.training for part in inner.modules())
    assert parent.training
    assert parent[1].training


def test_frozen_takes_no_gradient(parent):
    parent(torch.ones(1, 2)).sum().backward()
    assert all(p.grad is None for p in parent[0].parameters())
    assert all(p.grad is not None for p in parent[1].parameters())


def test_thaw_undoes_freeze(parent):
    assert is_frozen(parent[0])
    thaw(parent[0])
    parent.train()
    assert all(part.training for part in parent.modules())
    assert all(p.requires_grad for p in parent.parameters())
    assert not is_frozen(parent[0])


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_frozen_by_itself(parent, clone):
    twin = clone(parent)
    twin.train()
    assert is_frozen(twin[0])
    assert not twin[0].training
    assert thaw(twin[0]).train() is twin[0]
    assert twin[0].training
    assert not parent[0].training


def test_evaluating_restores_the_mode_even_after_an_error(parent):
    parent.train()

    def fail():
        with evaluating(parent):
            assert not parent[1].training
            assert not torch.is_grad_enabled()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert parent[1].training
    assert not parent[0].training
    assert torch.is_grad_enabled()
