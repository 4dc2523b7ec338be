import pytest
import torch
from torchgeo.datasets import stack_samples

from dynamicvis_geo.datasets import ChipFailure, collate
from dynamicvis_geo.errors import SpecError


def test_tensors_are_stacked_as_torchgeo_does() -> None:
    samples = [
        {'image': torch.rand(3, 4, 4), 'chip': torch.tensor([i])} for i in (5, 6)
    ]
    batch = collate(samples)
    theirs = stack_samples(samples)
    assert batch.keys() == theirs.keys()
    assert all(torch.equal(batch[key], theirs[key]) for key in batch)


def test_everything_else_becomes_a_list() -> None:
    bounds = [(slice(0, 1), slice(0, 1)), (slice(1, 2), slice(0, 1))]
    assert collate([{'bounds': one} for one in bounds]) == {'bounds': bounds}


def test_samples_that_do_not_fit() -> None:
    with pytest.raises(SpecError, match=r"\['crs', 'image'\] and \['image'\]"):
        collate([{'image': torch.ones(1), 'crs': 1}, {'image': torch.ones(1)}])
    with pytest.raises(SpecError, match=r"'image' of different shapes"):
        collate([{'image': torch.ones(3)}, {'image': torch.ones(4)}])


def test_failures_are_told_apart_from_samples() -> None:
    failures = [ChipFailure(i, 'OSError', 'gone') for i in (4, 6)]
    batch = collate([failures[0], {'chip': torch.tensor([5])}, failures[1], None])
    assert batch == {'chip': torch.tensor([[5]]), 'failures': failures}
    assert collate(failures) == {'failures': failures}
    assert collate([None]) == {}
