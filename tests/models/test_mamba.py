import pytest
import torch
from torch import nn

from dynamicvis_geo.models.layers import PatchEmbed, SparseMixer
from dynamicvis_geo.models.mamba import MambaBlock, MambaMixer, RMSNorm
from dynamicvis_geo.models.mamba2 import Mamba2Mixer

from . import parity


def filled(module: nn.Module, name: str) -> nn.Module:
    return parity.fill(module, parity.COMPONENTS[name]['weight_prefix'])


@torch.inference_mode()
def check(module: nn.Module, name: str, key: str = 'y') -> None:
    component, arrays = parity.COMPONENTS[name], parity.golden(name)
    got = module(arrays['x'])
    got = got[0] if isinstance(got, tuple) else got
    error = parity.relative_error(got, arrays[key])
    assert error <= parity.tolerance(component)


def test_mixer() -> None:
    check(filled(MambaMixer(96), 'comp_mixer'), 'comp_mixer')


def test_mixer_over_a_long_sequence_with_extreme_decays() -> None:
    component = parity.COMPONENTS['comp_mixer_long']
    mixer = filled(MambaMixer(96), 'comp_mixer_long')
    arrays = parity.golden('comp_mixer_long')
    x = parity.sequence(component['input_name'], tuple(component['input_shape']))
    with torch.inference_mode():
        y = mixer(x)
    tolerance = parity.tolerance(component)
    assert parity.relative_error(y[:, ::16], arrays['y']) <= tolerance
    assert parity.relative_error(y[:, -8:], arrays['y_last']) <= tolerance


@pytest.mark.parametrize(
    ('head_groups', 'key'), [('tiled', 'y'), ('contiguous', 'y_interleaved')]
)
@pytest.mark.parametrize('chunk_size', [7, 64])
def test_mamba2_mixer(head_groups: str, key: str, chunk_size: int) -> None:
    mixer = Mamba2Mixer(96, head_groups=head_groups, chunk_size=chunk_size)
    check(filled(mixer, 'comp_mixer2'), 'comp_mixer2', key)


@pytest.mark.parametrize('mixer', [MambaMixer(96), Mamba2Mixer(96)])
@torch.inference_mode()
def test_mixers_are_float64_throughout(mixer: MambaMixer | Mamba2Mixer) -> None:
    mixer = mixer.double()
    x = parity.sequence('double', (1, 8, 96)).double()
    before = mixer(x)
    mixer.A_log += 1e-10  # which float32 does not see
    difference = parity.relative_error(mixer(x), before)
    assert 0 < difference < 1e-9


@pytest.mark.parametrize('mixer', [MambaMixer(96), Mamba2Mixer(96)])
@torch.inference_mode()
def test_mixers_of_empty_sequences(mixer: MambaMixer | Mamba2Mixer) -> None:
    assert mixer(torch.empty(2, 0, 96)).shape == (2, 0, 96)


@pytest.mark.parametrize(
    'path_type', ['forward', 'forward_reverse_mean', 'forward_reverse_gate']
)
def test_block(path_type: str) -> None:
    name = f'comp_block_{path_type}'
    check(filled(MambaBlock(96, path_type), name), name)


@pytest.mark.parametrize(
    'name', ['comp_sparse', 'comp_sparse_pool', 'comp_sparse_plain']
)
def test_sparse_mixer(name: str) -> None:
    settings = parity.COMPONENTS[name]['kwargs']
    tokens = settings['global_token_cfg']
    mixer = SparseMixer(
        96,
        4,
        tokens['num'],
        tokens['pos'],
        settings['is_softmax_on_x'],
        norm_topk_prob=False,
        block=MambaBlock(96),
    )
    check(filled(mixer, name), name)


def test_tied_tokens_are_chosen_by_position() -> None:
    mixer = SparseMixer(96, 4, 0, 'none', True, False, MambaBlock(96))
    filled(mixer, 'comp_sparse_plain')
    x = parity.sequence('tie', (1, 1, 96)).expand(2, 64, 96)
    with torch.inference_mode():
        y = mixer(x)
    unchosen = torch.isclose(y, x * (1 + 1 / 64), rtol=1e-6, atol=0).all(-1)
    assert not unchosen[:, :16].any()
    assert unchosen[:, 16:].all()


@pytest.mark.parametrize(
    ('name', 'embed'),
    [
        ('comp_patch0', PatchEmbed(3, 96, 7, 4, 1e-6)),
        ('comp_patch1', PatchEmbed(96, 192, 3, 2, 1e-6)),
    ],
)
def test_patch_embed(name: str, embed: PatchEmbed) -> None:
    check(filled(embed, name), name)


def test_norms_have_the_right_eps() -> None:
    arrays = parity.golden('comp_norms')
    rms = parity.fill(RMSNorm(96), 'component.rms.norm.')
    layer = parity.fill(nn.LayerNorm(96, eps=1e-6), 'component.ln.norm.')
    with torch.inference_mode():
        assert parity.relative_error(rms(arrays['x']), arrays['y_rms']) < 1e-6
        assert parity.relative_error(layer(arrays['x']), arrays['y_ln']) < 1e-6
