import copy
import hashlib
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.models import DynamicVis
from dynamicvis_geo.models.dynamicvis import map_shapes

from . import parity

pytestmark = pytest.mark.once


def run(model: DynamicVis, x: Tensor, **arguments: Any) -> tuple[Tensor, ...]:
    with torch.inference_mode():
        return model(x, **arguments)


@pytest.fixture(scope='module')
def small() -> DynamicVis:
    """A model of 64 pixels that no test changes."""
    return parity.build('b_img64_b2')[0]


@pytest.mark.parametrize('name', parity.CASES)
def test_equals_the_official_model(name: str) -> None:
    if name == 'b_ckpt64_on_128':
        model, x = DynamicVis(img_size=128).eval(), None
        model.load_state_dict(parity.build('b_img64_b2')[0].state_dict())
        case = parity.CASES[name]
        x = parity.image(case['input_name'], tuple(case['input_shape']))
    else:
        case = parity.CASES[name]
        model, x = parity.build(name)
        assert parity.checksum(model.state_dict()) == case['weights_sha256']
    assert hashlib.sha256(x.numpy().tobytes()).hexdigest() == case['input_sha256']

    maps = run(model, x)

    expected = list(parity.golden(name).values())
    assert len(maps) == len(expected)
    for got, official in zip(maps, expected, strict=True):
        assert got.shape == official.shape
        assert parity.relative_error(got, official) <= parity.tolerance(case)


def test_a_stage_alone_is_the_official_one_and_later_ones_do_not_run(
    small: DynamicVis,
) -> None:
    case = parity.CASES['b_img64_b2']
    x = parity.image(case['input_name'], tuple(case['input_shape']))
    together = run(small, x, out_indices=(0, 1, 2, 3))
    ran: list[int] = []
    handles = [
        small.get_submodule(f'layers.{stage}.2').register_forward_hook(
            lambda *_, stage=stage: ran.append(stage)
        )
        for stage in range(4)
    ]
    for stage, official in enumerate(parity.golden('b_img64_b2').values()):
        ran.clear()
        (alone,) = run(small, x, out_indices=(stage,))
        # Each of two images on its own.
        assert set(ran) == set(range(stage + 1))
        assert parity.relative_error(alone, official) <= parity.tolerance(case)
        assert torch.equal(alone, together[stage])
    for handle in handles:
        handle.remove()
    assert small.out_indices == (0, 1, 2, 3)
    with pytest.raises(SpecError, match=r'out_indices=\(4,\)'):
        run(small, x, out_indices=(4,))


@pytest.mark.usefixtures('shallow')
@pytest.mark.parametrize(
    'arguments',
    [
        {'img_size': (64, 96)},
        {'img_size': 72},
        {'img_size': 64, 'patch_sizes': (7, 2, 3, 3), 'strides': (2, 2, 2, 4)},
    ],
)
def test_shapes_of_maps_are_known_from_settings(arguments: dict[str, Any]) -> None:
    model = DynamicVis(**arguments, out_indices=(0, 1, 2, 3)).eval()
    maps = run(model, torch.zeros(1, 3, *model.img_size))
    assert map_shapes(model.settings) == tuple(tuple(m.shape[1:]) for m in maps)


def test_order_of_tokens_differs_no_more_than_official_rounding_makes_it() -> None:
    """The official code in float32 differs by 4 places from itself in float64."""
    name = 'b_img512_calm'
    model, x = parity.build(name)
    with parity.Routing() as own:
        run(model, x)
    assert own.differing(parity.routing(name)) <= 4
    with parity.Routing(imposed=parity.routing(name)):
        last = run(model, x)[-1]
    # The official code's own rounding is 5e-7 where no token changes its place.
    assert parity.relative_error(last, parity.golden(name)['stage3']) <= 5e-6


@pytest.mark.parametrize('name', ['b', 'l', 'b_gate', 'b_mamba2', 'l_mamba2_head32'])
def test_state_dict_equals_the_official_one(name: str) -> None:
    official = json.loads((parity.DATA / f'state_dict_{name}.json').read_text())
    with torch.device('meta'):
        model = DynamicVis(arch=official['arch'], **official['constructor'])
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert shapes == official['state_dict']


@pytest.mark.usefixtures('shallow')
@pytest.mark.parametrize(('old', 'new'), [(64, 80), (96, 72), (128, 64)])
def test_position_embedding_of_another_size_is_resized(old: int, new: int) -> None:
    model = DynamicVis(img_size=new)
    tokens = (old // 4) ** 2
    state = model.state_dict() | {
        'pos_embed': parity.weight('pos_embed', (1, tokens, 96))
    }
    before = state['pos_embed'].clone()
    model.load_state_dict(state)
    expected = parity.golden('pos_embed')[f'from{old}_to{new}']
    torch.testing.assert_close(model.pos_embed, expected, atol=1e-6, rtol=0)
    assert torch.equal(state['pos_embed'], before)


@pytest.mark.usefixtures('shallow')
def test_square_position_embedding_fits_a_rectangle_of_as_many_tokens() -> None:
    """The official code cannot tell 16 x 64 tokens from 32 x 32 and mixes them up."""
    square = DynamicVis(img_size=128)
    oblong = DynamicVis(img_size=(64, 256))
    oblong.load_state_dict(square.state_dict())
    assert not torch.equal(oblong.pos_embed, square.pos_embed)
    again = DynamicVis(img_size=(64, 256))
    again.load_state_dict(oblong.state_dict())
    assert torch.equal(again.pos_embed, oblong.pos_embed)


@pytest.mark.usefixtures('shallow')
def test_position_embedding_without_a_grid_is_kept_with_a_warning() -> None:
    model = DynamicVis(img_size=(64, 256))
    with pytest.warns(UserWarning, match='1024 tokens and no record of its grid'):
        model.load_state_dict(dict(model.state_dict()))


@pytest.mark.usefixtures('shallow')
def test_position_embedding_of_an_unknown_rectangle_is_refused() -> None:
    model = DynamicVis(img_size=64)
    state = dict(model.state_dict()) | {'pos_embed': torch.zeros(1, 384, 96)}
    with pytest.raises(SpecError, match='384 tokens'):
        model.load_state_dict(state)


@pytest.mark.usefixtures('shallow')
def test_shuffled_paths_repeat_and_follow_their_seed() -> None:
    x = parity.image('shuffle', (1, 3, 64, 64))
    for path_type in ('shuffle', 'forward_reverse_shuffle_mean'):
        model = DynamicVis(img_size=64, path_type=path_type)
        parity.fill(model)
        state = torch.random.get_rng_state()
        first = run(model, x)[0]
        assert torch.equal(first, run(model, x)[0])
        assert torch.equal(torch.random.get_rng_state(), state)
        other = run(model, x, generator=torch.Generator().manual_seed(1))[0]
        assert parity.relative_error(other, first) > 1e-3
        model.shuffle_seed = 1
        assert torch.equal(run(model, x)[0], other)


@pytest.mark.usefixtures('shallow')
def test_shuffle_gate_has_three_branches() -> None:
    model = DynamicVis(img_size=64, path_type='forward_reverse_shuffle_gate')
    weight = model.state_dict()['layers.0.1.0.spatial_mamba_mixer.gate_layer.0.weight']
    assert weight.shape == (3, 3 * 96)
    maps = run(parity.fill(model), parity.image('shuffle', (2, 3, 64, 64)))
    assert maps[0].isfinite().all()


def test_samples_of_a_batch_do_not_interact(small: DynamicVis) -> None:
    x = parity.image('batch', (3, 3, 64, 64))
    together = run(small, x)[-1]
    for index in range(3):
        alone = run(small, x[index : index + 1])[-1]
        assert torch.equal(together[index : index + 1], alone)
    assert run(small, x[:0])[-1].shape == (0, 768, 2, 2)


def test_many_threads_share_groups_of_images(small: DynamicVis) -> None:
    x = parity.image('batch', (3, 3, 64, 64))
    before = torch.get_num_threads()
    singly = torch.cat([run(small, image[None])[-1] for image in x])
    try:
        torch.set_num_threads(9)
        grouped = run(small, x)[-1]
    finally:
        torch.set_num_threads(before)
    assert parity.relative_error(grouped, singly) < 1e-5


@pytest.mark.usefixtures('shallow')
def test_maps_are_contiguous_and_do_not_depend_on_the_layout_of_images() -> None:
    model, x = parity.build('b_img64_b2', out_indices=(0, 1, 2, 3))
    maps = run(model, x)
    assert all(m.is_contiguous() for m in maps)
    channels_last = run(model, x.contiguous(memory_format=torch.channels_last))
    assert all(torch.equal(a, b) for a, b in zip(channels_last, maps, strict=True))


@pytest.mark.usefixtures('shallow')
def test_batch_shares_its_permutations() -> None:
    model = DynamicVis(img_size=64, path_type='forward_reverse_shuffle_mean')
    parity.fill(model)
    x = parity.image('shuffle', (1, 3, 64, 64)).expand(3, -1, -1, -1)
    generator = torch.Generator().manual_seed(5)
    first, second, third = run(model, x, generator=generator)[-1]
    assert torch.equal(first, second)
    assert torch.equal(first, third)
    again = run(model, x[:1], generator=generator)[-1]
    assert parity.relative_error(again[0], first) > 1e-3


def test_threads_change_features_by_rounding_at_most(small: DynamicVis) -> None:
    x = parity.image('threads', (2, 3, 64, 64))
    before = torch.get_num_threads()
    maps = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            maps.append(run(small, x)[-1])
    finally:
        torch.set_num_threads(before)
    assert parity.relative_error(maps[1], maps[0]) < 1e-5


@pytest.mark.usefixtures('shallow')
def test_more_global_tokens_than_tokens_and_stages_that_keep_none() -> None:
    x = parity.image('edge', (1, 3, 64, 64))
    many = DynamicVis(img_size=64, global_token_cfg={'pos': 'head', 'num': 7})
    assert run(parity.fill(many), x)[0].shape == (1, 768, 2, 2)
    none = DynamicVis(img_size=64, spatial_token_keep_ratios=(8, 4, 2, 1000))
    assert run(parity.fill(none), x)[0].shape == (1, 768, 2, 2)


@pytest.mark.usefixtures('shallow')
@pytest.mark.parametrize(
    ('frozen_stages', 'frozen'),
    [(0, ()), (2, ('layers.0.', 'layers.1.'))],
)
def test_gradients_reach_every_weight_but_the_frozen_stages(
    frozen_stages: int, frozen: tuple[str, ...]
) -> None:
    model = DynamicVis(img_size=64, frozen_stages=frozen_stages)
    parity.fill(model)
    model(parity.image('grad', (1, 3, 64, 64)))[0].square().mean().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith(frozen), name


def test_frozen_whole_a_model_learns_its_position_embedding_only() -> None:
    with torch.device('meta'):
        model = DynamicVis(out_type='avg_featmap', frozen_stages=4)
    learning = [n for n, p in model.named_parameters() if p.requires_grad]
    assert learning == ['pos_embed']


def test_settings_are_those_of_the_modules() -> None:
    with torch.device('meta'):
        plain = DynamicVis('base', img_size=128).settings
        without = DynamicVis(
            spatial_token_keep_ratios=(1, 1, 1, 1),
            is_softmax_on_x=False,
            global_token_cfg={'pos': 'none', 'num': -1},
        ).settings
        second = DynamicVis(
            img_size=(64, 96),
            mamba2=True,
            layer_cfgs={'head_dim': 16, 'chunk_size': 8},
            path_type='shuffle',
            shuffle_seed=3,
            out_indices=(2, 3),
            norm_topk_prob=True,
        ).settings
    assert json.loads(json.dumps(plain)) == plain
    assert plain['arch'] == 'b'
    assert plain['img_size'] == [128, 128]
    assert plain['spatial_token_keep_ratios'] == [8, 4, 2, 1]
    assert plain['global_token_pos'] == 'head'
    assert plain['global_tokens'] == [32, 16, 8, 4]
    assert plain['path_type'] == 'forward_reverse_mean'
    assert (plain['is_softmax_on_x'], plain['norm_topk_prob']) == (True, False)
    assert (plain['mamba2'], plain['layer_cfgs']['state_size']) == (False, 16)
    assert plain['out_indices'] == [3]
    assert without['spatial_token_keep_ratios'] == [1, 1, 1, 1]
    assert without['global_tokens'] == [0, 0, 0, 0]
    assert without['is_softmax_on_x'] is False
    assert second['img_size'] == [64, 96]
    assert second['mamba2_head_groups'] == 'contiguous'
    assert second['shuffle_seed'] == 3
    assert second['layer_cfgs']['head_dim'] == 16
    assert 'chunk_size' not in second['layer_cfgs']
    assert second['out_indices'] == [2, 3]
    assert second['norm_topk_prob'] is True


def test_changes_of_the_built_model_are_told(small: DynamicVis) -> None:
    twin = copy.deepcopy(small)
    for mixer in twin.get_submodule('layers.1.1'):  # type: ignore[union-attr]
        mixer.reduction = 2
    assert twin.settings['spatial_token_keep_ratios'] == [8, 2, 2, 1]


@pytest.mark.usefixtures('shallow')
@pytest.mark.parametrize('path_type', ['forward_reverse_mean', 'forward_reverse_gate'])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_reaches_the_products_of_mamba_blocks_alone(
    path_type: str, dtype: torch.dtype
) -> None:
    model = parity.fill(DynamicVis(img_size=64, path_type=path_type))
    dtypes: dict[str, set[torch.dtype]] = {}

    def note(module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        dtypes.setdefault(type(module).__name__, set()).add(first.dtype)

    for module in model.modules():
        module.register_forward_hook(note)
    with torch.autocast('cpu', dtype):
        maps = run(model, parity.image('b_img64_b2/38', (2, 3, 64, 64)))
    assert maps[-1].dtype == torch.float32
    reduced = {name for name, found in dtypes.items() if dtype in found}
    assert reduced == {'Linear'}
    gate = {'Softmax'} if path_type.endswith('gate') else set()
    exact = {'PatchEmbed', 'Conv2d', 'LayerNorm', 'Gate', 'SparseMixer', 'RMSNorm'}
    assert exact | gate | {'MambaBlock'} <= dtypes.keys()


def test_bfloat16_autocast_stays_close() -> None:
    torch.manual_seed(0)
    model = DynamicVis(img_size=128).eval()
    x = parity.image('bf16', (2, 3, 128, 128))
    with parity.Routing() as routing:
        exact = run(model, x)[-1].mean((2, 3))
    with parity.Routing() as rough_routing, torch.autocast('cpu', torch.bfloat16):
        rough = run(model, x)[-1].mean((2, 3))
    # At 512 pixels 1e-6: the fewer the tokens, the more each mixer moves them.
    assert parity.relative_error(rough, exact) <= 1e-4
    tokens = sum(order.numel() for order in routing.found)
    assert rough_routing.differing(routing.found) < 0.005 * tokens


@pytest.mark.usefixtures('shallow')
@pytest.mark.parametrize('precision', ['high', 'medium'])
def test_matmul_precision_outside_changes_nothing(precision: str) -> None:
    torch.manual_seed(0)
    model = DynamicVis(img_size=256).eval()
    x = parity.image('medium', (1, 3, 256, 256))
    before = torch.get_float32_matmul_precision()
    exact = run(model, x)[-1]
    try:
        torch.set_float32_matmul_precision(precision)
        found = run(model, x)[-1]
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(found, exact)


def test_a_copy_gives_the_same_features(small: DynamicVis) -> None:
    twin = copy.deepcopy(small)
    x = parity.image('copy', (1, 3, 64, 64))
    assert torch.equal(run(twin, x)[-1], run(small, x)[-1])


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        ({'arch': 'xl'}, "arch='xl'.*b, base, l, large"),
        ({'path_type': 'sideways'}, "path_type='sideways'.*forward_reverse_gate"),
        ({'img_size': 0}, 'img_size=0'),
        ({'img_size': (64, 64, 3)}, 'img_size='),
        ({'out_indices': (4,)}, 'out_indices'),
        ({'out_indices': ()}, 'out_indices'),
        ({'out_type': 'cls_token'}, "out_type='cls_token'.*featmap"),
        ({'out_type': 'avg_featmap', 'out_indices': (0, 3)}, 'out_indices'),
        ({'global_token_cfg': {'pos': 'tail', 'num': -1}}, "'tail'.*headtail"),
        ({'global_token_cfg': {'pos': 'head', 'num': -2}}, 'num=-2'),
        ({'spatial_token_keep_ratios': (8, 4)}, 'spatial_token_keep_ratios.*4 values'),
        ({'interpolate_mode': 'lanczos'}, 'interpolate_mode'),
        ({'norm_cfg': {'type': 'BN'}}, 'norm_cfg'),
        ({'frozen_stages': 5}, 'frozen_stages=5'),
        ({'layer_cfgs': {'states': 8}}, 'layer_cfgs.*states'),
        ({'mamba2': True, 'arch': 'l'}, 'head_dim=24.*divisor.*16, 32'),
        ({'mamba2': True, 'mamba2_head_groups': 'odd'}, 'contiguous, tiled'),
    ],
)
def test_wrong_arguments_name_the_value_and_the_choices(
    arguments: dict[str, Any], words: str
) -> None:
    with pytest.raises(SpecError, match=words), torch.device('meta'):
        DynamicVis(**arguments)


def test_image_of_another_size_is_refused(small: DynamicVis) -> None:
    with pytest.raises(SpecError, match=r'96 x 64 pixels.*img_size=\(64, 64\)'):
        small(torch.zeros(1, 3, 96, 64))
    with pytest.raises(SpecError, match='shape'):
        small(torch.zeros(3, 64, 64))
    oblong = DynamicVis(img_size=(64, 96))
    with pytest.raises(SpecError, match='96 x 64 pixels'):
        oblong(torch.zeros(1, 3, 96, 64))
