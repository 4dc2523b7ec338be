"""Recorded forwards: equal to the forward itself, whatever comes."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from dynamicvis_geo.models.config import BackboneConfig
from dynamicvis_geo.tasks import FeatureExtraction

with_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA GPU')


def make_module() -> FeatureExtraction:
    return FeatureExtraction(BackboneConfig(weights='random', img_size=64))


def images(count: int) -> Tensor:
    return torch.rand(count, 3, 64, 64, device='cuda') * 10_000


@with_gpu
def test_replays_and_ragged_batches_equal_the_backbone() -> None:
    module = make_module().cuda()
    for count in (4, 4, 4, 3, 1, 5, 5, 4):
        batch = images(count)
        features = module(batch)
        with torch.no_grad():
            (expected,) = module.backbone(module.preprocess(batch))
        error = (features - expected.mean((2, 3))).norm() / expected.mean((2, 3)).norm()
        assert features.shape == (count, 768)
        assert error < 1e-5
    assert len(module._graphs._recordings) == 2


@with_gpu
@pytest.mark.parametrize('stage', [0, 1, 2])
def test_stages_are_recorded_too(stage: int) -> None:
    config = BackboneConfig(weights='random', img_size=64)
    module = FeatureExtraction(config, 'grid', stage=stage).cuda()
    for _ in range(3):
        batch = images(4)
        features = module(batch)
        with torch.no_grad():
            x = module.preprocess(batch)
            expected = module.backbone(x, out_indices=(0, 1, 2, 3))[stage]
        assert (features - expected).norm() / expected.norm() < 1e-5
    assert len(module._graphs._recordings) == 1


@with_gpu
def test_earlier_features_are_not_overwritten() -> None:
    module = make_module().cuda()
    first, second = images(2), images(2)
    for _ in range(3):
        kept = module(first)
        expected = kept.clone()
        module(second)
        assert torch.equal(kept, expected)


@with_gpu
def test_precision_and_weights_are_those_of_the_call() -> None:
    module = make_module().cuda()
    batch = images(2)
    exact = [module(batch) for _ in range(3)][-1]
    with torch.autocast('cuda', torch.bfloat16):
        rounded = [module(batch) for _ in range(3)][-1]
    assert not torch.equal(exact, rounded)
    assert torch.allclose(exact, rounded, rtol=1e-3, atol=1e-3)
    norm: nn.LayerNorm = module.backbone.layers[3][2]  # type: ignore[index, assignment]
    with torch.no_grad():
        norm.weight.mul_(2)
    assert not torch.allclose(module(batch), exact)


@pytest.mark.usefixtures('shallow')
@pytest.mark.filterwarnings('ignore:weights=.random')
def test_modules_can_be_copied_and_pickled() -> None:
    module = make_module()
    if torch.cuda.is_available():
        module = module.cuda()
        for _ in range(2):
            module(images(2))
    image = torch.rand(1, 3, 64, 64) * 10_000
    expected = module.cpu()(image)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(image), expected)
