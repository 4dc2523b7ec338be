"""What two descriptions of features must have in common."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.models import BackboneConfig, DynamicVis
from dynamicvis_geo.settings import (
    check_comparable,
    differences,
    differing,
    feature_settings,
)
from dynamicvis_geo.tasks import FeatureExtraction
from tests.models.checkpoints import (
    mmengine_content,
    official_state_dict,
    save_mmengine,
)

SMALL = BackboneConfig(img_size=64)

#: Keys that the first version did not write.
NEW = ('settings', 'upstream_edited')


def made(backbone: Any, **run: Any) -> dict[str, Any]:
    """A provenance as a file gives it back."""
    task = FeatureExtraction(backbone)
    provenance = {'model': task.provenance, 'run': {'precision': '32-true', **run}}
    return json.loads(json.dumps(provenance))  # type: ignore[no-any-return]


@pytest.fixture(scope='module')
def random() -> dict[str, Any]:
    with pytest.warns(UserWarning, match='untrained'):
        return made(replace(SMALL, weights='random'))


def as_first_version(provenance: dict[str, Any]) -> dict[str, Any]:
    model = {k: v for k, v in provenance['model'].items() if k != 'numerics'}
    backbone = {k: v for k, v in model['backbone'].items() if k not in NEW}
    return {**provenance, 'model': {**model, 'backbone': backbone}}


def difference(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return differing(feature_settings(one), feature_settings(other))


def without_settings(folder: Path, name: str) -> Path:
    """A checkpoint whose name is all that tells how it was trained."""
    content = mmengine_content(official_state_dict())
    del content['meta']['cfg']
    return save_mmengine(folder / name, content)


ROUTING = [
    f'model.backbone.settings.{name}'
    for name in (
        'spatial_token_keep_ratios',
        'global_token_pos',
        'global_tokens',
        'is_softmax_on_x',
    )
]


def test_a_name_that_changes_the_model_makes_other_features(tmp_path: Path) -> None:
    plain = without_settings(tmp_path, 'dynamicvis_b_x.pth')
    one = made(replace(SMALL, checkpoint=plain))
    renamed = plain.rename(tmp_path / 'dynamicvis_b_x_wo-token-selection.pth')
    other = made(replace(SMALL, checkpoint=renamed))
    assert one['model']['backbone']['sha256'] == other['model']['backbone']['sha256']
    # Outputs of the first version are told from those of this one, and are like them.
    for first in (one, as_first_version(one)):
        for second in (other, as_first_version(other)):
            assert difference(first, second) == ROUTING
            assert difference(second, first) == ROUTING
        assert difference(first, one) == []
    assert difference(as_first_version(other), other) == []
    assert 'model.backbone.settings.arch' in feature_settings(as_first_version(other))


@pytest.mark.filterwarnings('ignore:weights=.random')
@pytest.mark.parametrize(
    ('change', 'names'),
    [
        ({'scan': 'torch', 'sampling_scale': 0.3, 'fetch_workers': 2}, []),
        ({'img_size': 96}, ['img_size', 'global_tokens']),
        ({'path_type': 'forward'}, ['path_type']),
    ],
)
def test_settings_of_the_configuration(
    change: dict[str, Any], names: list[str], random: dict[str, Any]
) -> None:
    one, other = random, made(replace(SMALL, weights='random', **change))
    found = difference(one, other)
    assert [n for n in found if 'preprocessing' not in n] == [
        f'model.backbone.settings.{name}' for name in names
    ]
    assert found == difference(as_first_version(one), other)


def test_place_and_container_of_the_weights_do_not_count(tmp_path: Path) -> None:
    path = without_settings(tmp_path, 'dynamicvis_b_x.pth')
    one = made(replace(SMALL, checkpoint=path))
    moved = path.rename(tmp_path / 'other_b_name.pth')
    assert difference(one, made(replace(SMALL, checkpoint=moved))) == []


@pytest.mark.filterwarnings('ignore:weights=.random')
def test_precision_counts_where_both_tell_it(random: dict[str, Any]) -> None:
    one = random
    other = json.loads(json.dumps(one))
    other['model']['numerics'] |= {'precision': 'bf16-mixed', 'kernel': 'other'}
    assert difference(one, other) == ['precision']
    assert difference(as_first_version(one), other) == ['precision']
    other = as_first_version(one)
    del other['run']
    assert difference(one, other) == []
    other = json.loads(json.dumps(one))
    other['model']['numerics']['tf32'] = True
    assert difference(one, other) == ['tf32']
    assert difference(as_first_version(one), other) == []


def test_a_module_of_the_users_is_known_by_its_settings_and_weights() -> None:
    backbone = DynamicVis(img_size=32)
    one = made(backbone)
    assert one['model']['backbone']['settings']['img_size'] == [32, 32]
    assert difference(one, made(backbone)) == []
    with torch.no_grad():
        backbone.get_parameter('layers.3.2.bias')[0] += 1e-3
    assert difference(one, made(backbone)) == ['model.backbone.tensors']
    # The first version told neither.
    first = as_first_version(one)
    del first['model']['backbone']['tensors']
    assert difference(first, one) == []


@pytest.mark.filterwarnings('ignore:weights=.random')
def test_official_code_at_another_commit_or_edited_counts(
    random: dict[str, Any],
) -> None:
    described = random['model']['backbone']
    one = {'model': {'backbone': described}}
    pinned = BackboneConfig.repo_commit

    def official(commit: str | None, edited: bool | None) -> dict[str, Any]:
        upstream = {
            'implementation': 'upstream',
            'upstream_commit': commit,
            'upstream_edited': edited,
        }
        return {'model': {'backbone': described | upstream}}

    assert difference(one, official(pinned, False)) == []
    assert difference(one, official(pinned, None)) == []
    for commit, edited in ((pinned, True), ('a' * 40, False), (None, None)):
        assert difference(one, official(commit, edited)) == ['model.backbone.code']


@pytest.mark.filterwarnings('ignore:weights=.random')
def test_the_stage_counts_and_was_the_last_before_it_was_told(
    random: dict[str, Any],
) -> None:
    backbone = DynamicVis(img_size=32, out_indices=(1, 3))
    one = made(backbone)
    other = {'model': FeatureExtraction(backbone, stage=1).provenance}
    assert difference(one, other) == ['model.stage']
    with pytest.raises(SpecError, match=r'otherwise.*model\.stage: 3 \(probe\), 1\.'):
        check_comparable(one, other, 'the maps')
    # An earlier version took the last map, and told just what the model gives.
    for made_now, indices in ((random, [3]), (one, [1, 3]), (other, [1])):
        before = json.loads(json.dumps(made_now))
        del before['model']['stage']
        before['model']['backbone']['settings']['out_indices'] = indices
        assert difference(before, made_now) == difference(made_now, before) == []
    assert difference(as_first_version(random), random) == []


def test_settings_of_an_unfinished_run_of_an_earlier_version() -> None:
    arch = {'model.backbone.settings.arch': 'b'}
    old = {**arch, 'model.backbone.settings.out_indices': [3]}
    assert differences(old, {**arch, 'model.stage': 3}) == []
    told = [('model.stage', '3', '0')]
    assert differences(old, {**arch, 'model.stage': 0}) == told
    assert differences(arch, {**arch, 'model.stage': 0}) == told


def test_nothing_is_told_of_the_model() -> None:
    assert feature_settings({}) == {}
    assert feature_settings({'run': {'precision': '32-true'}}) == {}
    assert feature_settings({'model': {'backbone': 'mine'}}) == {
        'model.backbone': 'mine'
    }
