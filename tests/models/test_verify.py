import copy
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.models import dynamicvis
from dynamicvis_geo.models.config import BackboneConfig
from dynamicvis_geo.models.dynamicvis import DynamicVis
from dynamicvis_geo.models.layers import SparseMixer
from dynamicvis_geo.models.verify import (
    CEILING,
    FLOOR,
    Difference,
    Report,
    compare,
    example_images,
    format_report,
    verify,
)
from dynamicvis_geo.models.weights import load_backbone
from dynamicvis_geo.settings import differing, feature_settings
from dynamicvis_geo.tasks import FeatureExtraction
from tests.models.checkpoints import (
    mmengine_content,
    official_state_dict,
    save_mmengine,
)
from tests.models.parity import fill
from tests.models.reference import MISTAKES, Reference
from tests.models.upstream_repo import NATIVE, git, write_packages, write_repository

pytestmark = pytest.mark.once


@pytest.fixture(scope='module', autouse=True)
def one_thread() -> Iterator[None]:
    # Many small operations: threads only wait for each other, on a busy machine long.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(
    img_size: int = 64, cls: type[DynamicVis] = DynamicVis, **arguments: Any
) -> DynamicVis:
    with pytest.MonkeyPatch.context() as patch, torch.device('meta'):
        patch.setattr(dynamicvis, '_DEPTHS', {'b': (1, 2, 6, 1)})
        model = cls(img_size=img_size, **arguments)
    fill(model.to_empty(device='cpu'))
    return model.requires_grad_(False)


@pytest.fixture(scope='module')
def backbone() -> DynamicVis:
    return build()


@pytest.fixture(scope='module')
def images() -> Tensor:
    return example_images(2, 64, seed=0)


@pytest.fixture(scope='module')
def equal(backbone: DynamicVis, images: Tensor) -> Report:
    return compare(backbone, backbone, images)


def test_a_backbone_agrees_with_itself(equal: Report) -> None:
    assert equal.agrees
    names = [difference.name for difference in equal.differences]
    assert names == ['gate logits', 'stage 0', 'stage 1', 'stage 2', 'stage 3']
    assert all(d.same_routing == 0 for d in equal.differences)
    assert all(0 < d.rounding < 1e-5 for d in equal.differences)
    assert equal.rerouted == 0
    assert equal.pooled_cosine == pytest.approx(1, abs=1e-12)
    assert equal.images == 2
    assert min(equal.seconds) > 0


@pytest.mark.parametrize(
    'key',
    [
        'layers.0.0.projection.bias',
        'layers.1.1.1.spatial_mamba_mixer.mamba_layer.D',
        'layers.2.1.2.spatial_mamba_mixer.mamba_layer.A_log',
        'layers.3.1.0.spatial_mamba_mixer.pre_norm.weight',
        'layers.3.2.weight',
    ],
)
def test_a_perturbed_weight_is_found(
    key: str, backbone: DynamicVis, images: Tensor
) -> None:
    perturbed = copy.deepcopy(backbone)
    perturbed.get_parameter(key).mul_(1.01)
    report = compare(backbone, perturbed, images[:1])
    assert not report.agrees
    stage = int(key.split('.')[1])
    # Gate logits see what comes before them, stages see all that was done so far.
    agreeing = [d.name for d in report.differences[1:] if d.agrees]
    assert agreeing == [f'stage {earlier}' for earlier in range(stage)]
    assert 'beyond tolerance' in format_report(report)
    assert 'DISAGREE' in format_report(report)


def test_a_perturbed_gate_is_found_though_routing_is_given(
    backbone: DynamicVis, images: Tensor
) -> None:
    perturbed = copy.deepcopy(backbone)
    gate = perturbed.get_parameter('layers.2.1.1.spatial_gate.weight')
    gate.add_(torch.full_like(gate, 1e-3))
    report = compare(backbone, perturbed, images[:1])
    assert [d.name for d in report.differences if not d.agrees] == ['gate logits']


def test_tokens_in_another_order_are_found(
    backbone: DynamicVis, images: Tensor
) -> None:
    reverse = copy.deepcopy(backbone)
    for mixer in reverse.modules():
        if hasattr(mixer, 'spatial_gate'):
            mixer.spatial_gate.weight.neg_()
    report = compare(backbone, reverse, images[:1])
    assert not report.agrees
    assert report.rerouted > 0.5
    assert report.differences[-1].own_routing > 0.1  # type: ignore[operator]


def test_the_network_written_out_agrees(backbone: DynamicVis, images: Tensor) -> None:
    report = compare(Reference(backbone).eval(), backbone, images)
    assert report.agrees, format_report(report)
    assert report.rerouted == 0


@pytest.fixture(scope='module')
def faint() -> DynamicVis:
    """What Mamba adds is little, as in large images: mistakes show as little."""
    model = build(img_size=32)
    for name, parameter in model.named_parameters():
        if name.endswith('out_proj.weight'):
            parameter.mul_(5e-3)
    return model


@pytest.mark.parametrize('mistake', MISTAKES)
def test_mistakes_that_are_easily_made_are_found(
    mistake: str, faint: DynamicVis
) -> None:
    images = example_images(1, 32, seed=0)
    report = compare(Reference(faint, mistake).eval(), faint, images)
    assert not report.agrees, format_report(report)
    last = report.differences[-1]
    assert last.same_routing > 1e-4
    # Also where rounding, as of a reduced precision, is no excuse.
    assert not replace(last, rounding=1.0).agrees


def test_ours_run_in_the_precision_of_predict(
    backbone: DynamicVis, images: Tensor
) -> None:
    exact, rough = (
        compare(backbone, backbone, images[:1], precision=precision)
        for precision in ('32-true', 'bf16-mixed')
    )
    assert exact.agrees
    assert rough.differences[-1].rounding > 100 * exact.differences[-1].rounding
    assert all(difference.tolerance <= CEILING for difference in rough.differences)
    with pytest.raises(SpecError, match=r"precision='16-true'.*32-true, bf16-mixed"):
        compare(backbone, backbone, images, precision='16-true')


class Rounded(DynamicVis):
    """Differs from its base by rounding only, as another implementation does."""

    def forward(self, x: Tensor, generator: Any = None) -> tuple[Tensor, ...]:
        noise = torch.empty_like(x).uniform_(-1, 1, generator=torch.Generator())
        return super().forward(x + 2**-21 * noise, generator)


def test_rounding_that_swaps_tokens_is_no_disagreement() -> None:
    # Without position embedding, the tokens of a flat image are equal, and the last
    # bits decide which of them are chosen.
    backbone = build(with_pe=False)
    other = build(cls=Rounded, with_pe=False)
    report = compare(other, backbone, torch.full((1, 3, 64, 64), 0.5))
    assert report.rerouted > 0.1
    assert report.differences[-1].own_routing > 100 * FLOOR  # type: ignore[operator]
    assert report.agrees, format_report(report)
    # The rounding is measured under the same routing, too.
    assert report.differences[-1].rounding < FLOOR


class TopkMixer(SparseMixer):
    """Chooses as the official mixer does, which leaves the order of equals open."""

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        weights = self.spatial_gate(x).softmax(1)
        values, ids = torch.topk(weights[..., 0], x.shape[1] // self.reduction)
        index = ids[..., None].expand(-1, -1, x.shape[-1])
        chosen = x.gather(1, index)
        mixed = chosen + values[..., None] * self.spatial_mamba_mixer(chosen)
        return (x + weights * x).scatter(1, index, mixed)


def test_order_of_equal_tokens_is_no_disagreement() -> None:
    flat = torch.full((1, 3, 128, 128), 0.5)
    no_globals = {'pos': 'none', 'num': -1}
    backbone = build(img_size=128, with_pe=False, global_token_cfg=no_globals)
    official = copy.deepcopy(backbone)
    for mixer in official.modules():
        if isinstance(mixer, SparseMixer):
            mixer.__class__ = TopkMixer
    with torch.inference_mode():
        assert not torch.allclose(official(flat)[0], backbone(flat)[0], atol=1e-3)
    assert compare(official, backbone, flat).agrees


@pytest.mark.parametrize(
    'arguments',
    [
        {'path_type': 'forward_reverse_shuffle_gate', 'shuffle_seed': 5},
        {'spatial_token_keep_ratios': [0, 0, 0, 0]},
    ],
)
def test_every_kind_of_backbone_can_be_compared(
    arguments: dict[str, Any], images: Tensor
) -> None:
    backbone = build(**arguments)
    assert compare(copy.deepcopy(backbone), backbone, images[:1]).agrees


def test_global_random_state_is_kept(backbone: DynamicVis, images: Tensor) -> None:
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    compare(backbone, backbone, images[:1])
    assert torch.rand(1) == expected
    assert not any(module._forward_hooks for module in backbone.modules())


def test_not_a_number_is_disagreement(backbone: DynamicVis, images: Tensor) -> None:
    broken = copy.deepcopy(backbone)
    broken.get_parameter('layers.3.2.bias')[0] = torch.nan
    assert not compare(backbone, broken, images).agrees
    assert not compare(broken, broken, images).agrees


def test_the_worst_image_counts(backbone: DynamicVis, images: Tensor) -> None:
    class SecondIsWrong(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.calls = backbone.layers, 0

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            self.calls += 1
            return backbone(x * (1.01 if self.calls == 2 else 1))  # type: ignore[no-any-return]

    report = compare(SecondIsWrong(), backbone, images)
    assert not any(difference.agrees for difference in report.differences)


def test_images_must_be_a_batch(backbone: DynamicVis, images: Tensor) -> None:
    for wrong in (images[0], images[:0]):
        with pytest.raises(SpecError, match=r'images has shape .*give \[N, 3, H, W\]'):
            compare(backbone, backbone, wrong)


def test_tolerance_follows_rounding_between_its_bounds() -> None:
    def tolerance(rounding: float) -> float:
        return Difference('stage 0', 0.0, 0.0, rounding).tolerance

    assert tolerance(1e-8) == 1e-5
    assert tolerance(5e-6) == pytest.approx(5e-5)
    assert tolerance(0.1) == 1e-4


def test_example_images_are_the_same_each_time() -> None:
    first, again = (example_images(2, (64, 96), seed=3) for _ in range(2))
    assert first.shape == (2, 3, 64, 96)
    assert first.dtype == torch.float32
    assert torch.equal(first, again)
    assert not torch.equal(first[0], first[1])
    assert 0.5 < first.std() < 1.5


@pytest.fixture
def official(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A stand-in for the official repository that holds the native network."""
    monkeypatch.syspath_prepend(str(write_packages(tmp_path / 'packages')))
    packages = ('einops', 'mmcv', 'mmengine', 'transformers')

    def loaded() -> dict[str, Any]:
        return {n: m for n, m in sys.modules.items() if n.split('.')[0] in packages}

    before = loaded()
    for name in before:
        del sys.modules[name]
    yield tmp_path / 'repository'
    for name in loaded():
        del sys.modules[name]
    sys.modules.update(before)


@pytest.mark.usefixtures('shallow')
@pytest.mark.parametrize(('shift', 'agrees'), [(0, True), (0.001, False)])
@pytest.mark.filterwarnings('ignore:weights=.random')
def test_verify_runs_both_implementations(
    shift: float, agrees: bool, official: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dynamicvis, '_DEPTHS', {'b': (1, 2, 6, 1)})
    commit = write_repository(official, NATIVE.replace('{shift}', str(shift)))
    git(official, 'checkout', '--quiet', commit)
    config = BackboneConfig(weights='random', img_size=64, repo_path=official)
    report = verify(config, count=1)
    assert report.agrees is agrees
    text = format_report(report)
    assert 'dynamicvis/models/models.py' in text
    assert f'commit: {commit} (NOT the pinned one, 0bfe96f4' in text
    assert 'files: as committed' in text
    assert 'weights: random' in text
    assert 'SHA-256: none, seed 0' in text
    assert 'arch: b' in text
    assert 'image size: 64 x 64' in text
    assert 'spatial_token_keep_ratios: 8, 4, 2, 1' in text
    assert 'global_tokens: 16, 8, 4, 2' in text
    assert 'precision: 32-true' in text


def test_official_code_gets_weights_and_settings_of_the_checkpoint(
    official: Path, tmp_path: Path
) -> None:
    commit = write_repository(official, NATIVE.replace('{shift}', '0'))
    content = mmengine_content(official_state_dict())
    text = content['meta']['cfg'].replace('[8, 4, 2, 1]', '[2, 2, 2, 2]')
    content['meta']['cfg'] = text
    config = BackboneConfig(
        checkpoint=save_mmengine(tmp_path / 'dynamicvis_b_x.pth', content),
        img_size=96,
        implementation='upstream',
        repo_url=str(official),
        repo_commit=commit,
        repo_cache=tmp_path / 'cache',
    )
    model, provenance = load_backbone(config)
    assert type(model).__module__ == 'dynamicvis.models.models'
    assert model.get_submodule('layers.0.1.0').reduction == 2
    assert not any(module.training for module in model.modules())
    native, expected = load_backbone(replace(config, implementation='native'))
    for name, tensor in native.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=0, atol=0)
    del expected['scan']  # which the official code has no choice of
    assert provenance == expected | {
        'implementation': 'upstream',
        'upstream_commit': commit,
        'upstream_edited': False,
    }


HELD = (
    NATIVE
    + """

class Network(DynamicVisBackbone):
    pass


class DynamicVisBackbone(nn.Module):
    def __init__(self, **arguments):
        super().__init__()
        network = Network(**arguments)
        self.layers, self.pos_embed = network.layers, network.pos_embed
        self.run, self.img_size = [network.eval()], network.img_size

    def forward(self, x):
        return self.run[0](x)
"""
)


@pytest.mark.usefixtures('shallow')
@pytest.mark.filterwarnings('ignore:weights=.random')
def test_stages_of_the_official_code(official: Path) -> None:
    commit = write_repository(official, HELD.replace('{shift}', '0'))
    git(official, 'checkout', '--quiet', commit)
    config = BackboneConfig(weights='random', img_size=64, repo_path=official)
    image = torch.rand(1, 3, 64, 64) * 9000
    for stage in (0, 2, 3):
        upstream, native = (
            FeatureExtraction(replace(config, implementation=name), 'grid', stage=stage)
            for name in ('upstream', 'native')
        )
        assert type(upstream.backbone).__module__ == 'dynamicvis.models.models'
        assert torch.equal(upstream(image), native(image))
        assert upstream.feature_shape == native.feature_shape
        made = [{'model': task.provenance} for task in (upstream, native)]
        assert made[0]['model']['stage'] == stage
        found = differing(*map(feature_settings, made))
        assert found == ['model.backbone.code']  # The stand-in is not the pinned one.


@pytest.mark.skipif(
    'RS_EMBED_DYNAMICVIS_REPO_PATH' not in os.environ or find_spec('mmengine') is None,
    reason='needs the extra upstream, and RS_EMBED_DYNAMICVIS_REPO_PATH to be set',
)
@pytest.mark.parametrize(
    'arguments',
    [
        {},
        {'arch': 'l'},
        {'img_size': 224},
        {'path_type': 'forward'},
        {'path_type': 'forward_reverse_gate'},
        {'path_type': 'shuffle'},
        {'path_type': 'forward_reverse_shuffle_mean'},
        {'path_type': 'forward_reverse_shuffle_gate'},
    ],
)
@pytest.mark.filterwarnings('ignore:weights=.random')
def test_native_agrees_with_the_official_code(arguments: dict[str, Any]) -> None:
    config = replace(BackboneConfig.from_env(), weights='random', img_size=64, arch='b')
    report = verify(replace(config, **arguments), count=1)
    assert report.agrees, format_report(report)
