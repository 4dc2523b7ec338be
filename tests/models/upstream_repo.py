"""A small stand-in for the official repository, and for the packages that it imports.

The stand-in's `models.py` has the official one's imports and class names, and a
backbone of one patch embedding. The packages offer what those imports name, no more.
"""

import subprocess
from pathlib import Path

#: The names that the official file imports, at the pinned commit.
IMPORTS = """
import einops
import mmengine
from mmengine import MessageHub, dist, to_2tuple
from mmengine.dist import get_dist_info
from mmengine.model import BaseModule, ModuleList
from transformers.models.mamba.modeling_mamba import MambaMixer
from mmdet.models import nlc_to_nchw, nchw_to_nlc
from mmpretrain.evaluation import Accuracy
from mmpretrain.models.backbones.base_backbone import BaseBackbone
from mmpretrain.registry import MODELS
from mmpretrain.models import ImageClassifier, build_norm_layer, resize_pos_embed
from mmpretrain.models import ClsHead
from mmdet.structures.bbox import bbox2roi
from mmcv.cnn.bricks.transformer import PatchEmbed
from mmpretrain.structures import DataSample
from mmdet.models import FPN as MMDET_FPN
from mmseg.models.backbones.unet import BasicConvBlock
from mmseg.models.utils import UpConvBlock
from opencd.registry import MODELS as CDMODELS
from mmseg.registry import MODELS as MMSEG_MODELS
import torch
from torch import nn
"""

#: Classes that derive from parts that the backbone does not need.
OTHERS = """
@MODELS.register_module()
class DynamicVisClsHead(ClsHead):
    pass


@CDMODELS.register_module(name='FPN2')
class DualInputsFPN(MMDET_FPN):
    def forward(self, x):
        return super().forward(x)


MMSEG_MODELS.register_module(module=DualInputsFPN)
"""

#: One patch embedding, LayerNorm and a position embedding, with the official class's
#: arguments and its ways: it wants mambapy, prints, and its eval() returns None.
TINY = """
@MODELS.register_module()
class DynamicVisBackbone(BaseBackbone):
    def __init__(self, mamba2=False, arch='b', path_type='forward_reverse_mean',
                 sampling_scale=dict(type='fixed', val=0.1), img_size=512,
                 out_indices=(0, 1, 2, 3), layer_cfgs=dict(), out_type='avg_featmap',
                 init_cfg=None):
        super().__init__(init_cfg)
        if layer_cfgs.get('use_mambapy', True) and not mamba2:
            raise ImportError('mambapy is not installed')
        self.settings = dict(sampling_scale=sampling_scale, layer_cfgs=layer_cfgs,
                             out_indices=out_indices, out_type=out_type)
        width = {'b': 8, 'l': 16}[arch]
        height, breadth = to_2tuple(img_size)
        self.conv = nn.Conv2d(3, width, 4, 4)
        self.norm = build_norm_layer(dict(type='LN', eps=1e-6), width)
        self.pos_embed = nn.Parameter(
            torch.zeros(1, height // 4 * (breadth // 4), width))
        self._register_load_state_dict_pre_hook(self._fit)
        print('trainable params: many')

    def _fit(self, state_dict, prefix, *args):
        old = state_dict[prefix + 'pos_embed']
        sides = [int(p.shape[1] ** 0.5) for p in (old, self.pos_embed)]
        state_dict[prefix + 'pos_embed'] = resize_pos_embed(
            old, to_2tuple(sides[0]), to_2tuple(sides[1]), 'bicubic',
            num_extra_tokens=0)

    def train(self, mode=True):
        super().train(mode)

    def forward(self, x):
        x = self.conv(x)
        grid = x.shape[2:]
        return (nlc_to_nchw(self.norm(nchw_to_nlc(x)) + self.pos_embed, grid),)
"""

#: The native network under the official name, with {shift} added to its input.
NATIVE = """
from dynamicvis_geo.models.dynamicvis import DynamicVis


@MODELS.register_module()
class DynamicVisBackbone(DynamicVis):
    def __init__(self, layer_cfgs, **arguments):
        super().__init__(**arguments)

    def forward(self, x):
        return super().forward(x + {shift})
"""

_PACKAGES = {
    'mmcv/__init__.py': '',
    'mmcv/cnn/__init__.py': """
from torch import nn

def build_norm_layer(cfg, num_features):
    assert cfg['type'] == 'LN'
    return 'ln', nn.LayerNorm(num_features, eps=cfg['eps'])
""",
    'mmcv/cnn/bricks/__init__.py': '',
    'mmcv/cnn/bricks/transformer.py': 'class PatchEmbed: pass',
    'mmengine/__init__.py': """
from . import dist

class MessageHub: pass

def to_2tuple(x):
    return tuple(x) if isinstance(x, (tuple, list)) else (x, x)
""",
    'mmengine/dist.py': 'def get_dist_info(): return 0, 1',
    'mmengine/model.py': """
from torch import nn
from torch.nn import ModuleList

class BaseModule(nn.Module):
    def __init__(self, init_cfg=None):
        super().__init__()
""",
    'transformers/__init__.py': "__version__ = '{transformers}'",
    'transformers/models/__init__.py': '',
    'transformers/models/mamba/__init__.py': '',
    'transformers/models/mamba/modeling_mamba.py': 'class MambaMixer: pass',
}


def write_repository(folder: Path, backbone: str = TINY) -> str:
    """Make a git repository; return the hash of its first commit of two."""
    file = folder / 'dynamicvis' / 'models' / 'models.py'
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(IMPORTS + OTHERS + backbone)
    # The official repository has copies of OpenMMLab's packages, which fail on import
    # where mmcv is not compiled.
    (folder / 'mmdet').mkdir(exist_ok=True)
    (folder / 'mmdet' / '__init__.py').write_text('from mmcv.ops import RoIPool')
    # Its packages load their datasets, and with them what those need.
    for package in ('', 'models', 'datasets'):
        init = folder / 'dynamicvis' / package / '__init__.py'
        init.parent.mkdir(exist_ok=True)
        init.write_text('import braceexpand, webdataset')
    git(folder, 'init', '--quiet')
    commit_all(folder)
    commit = git(folder, 'rev-parse', 'HEAD')
    file.write_text('raise RuntimeError("this commit is not the one asked for")')
    commit_all(folder)
    return commit


def write_packages(folder: Path, transformers: str = '4.50.0') -> Path:
    """Make a folder for `sys.path` with the packages of the extra `upstream`."""
    for name, text in _PACKAGES.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text.replace('{transformers}', transformers))
    return folder


def commit_all(folder: Path) -> None:
    git(folder, 'add', '--all')
    git(folder, 'commit', '--quiet', '--message', 'State')


def git(folder: Path, *arguments: str) -> str:
    identity = ['-c', 'user.name=A', '-c', 'user.email=a@example.org']
    result = subprocess.run(
        ['git', '-C', str(folder), *identity, '-c', 'commit.gpgsign=false', *arguments],
        check=True,
        capture_output=True,
        text=True,
    )
    return result.stdout.strip()
