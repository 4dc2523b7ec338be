import subprocess
import sys

import pytest

import dynamicvis_geo


@pytest.mark.parametrize('name', dynamicvis_geo.__all__)
def test_public_names_resolve_and_are_listed(name: str) -> None:
    assert getattr(dynamicvis_geo, name).__name__ == name
    assert name in dir(dynamicvis_geo)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match='Dynamo'):
        _ = dynamicvis_geo.Dynamo


def test_backbone_needs_no_package_but_pytorch() -> None:
    code = """
import sys
for name in ('huggingface_hub', 'safetensors', 'torchvision', 'torchgeo', 'lightning'):
    sys.modules[name] = None
import torch
from dynamicvis_geo.models import DynamicVis
print(DynamicVis(img_size=32).eval()(torch.zeros(1, 3, 32, 32))[0].shape[1])
"""
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == '768'


#: Help of every command but that whose arguments are Lightning's.
HELP = """
import contextlib, io
from dynamicvis_geo import cli
for command in sorted(set(cli.COMMANDS) - {'predict', 'demo'}):
    with contextlib.redirect_stdout(io.StringIO()) as text:
        try:
            cli.main([command, '--help'])
        except SystemExit as ended:
            assert ended.code == 0
    assert 'usage: dynamicvis-geo ' + command in text.getvalue()
    if command != 'plot':
        assert 0 < text.getvalue().find('examples:') < text.getvalue().find('options:')
"""


@pytest.mark.parametrize('code', ['import dynamicvis_geo', HELP])
def test_heavy_libraries_wait_until_they_are_needed(code: str) -> None:
    heavy = {'torch', 'torchgeo', 'lightning', 'numpy', 'geopandas', 'rasterio'}
    code += f'\nimport sys; print(sorted({heavy} & set(sys.modules)))'
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == '[]'


def test_outputs_are_read_without_pytorch() -> None:
    code = """
import sys
for name in ('torch', 'torchgeo', 'lightning'):
    sys.modules[name] = None
import dynamicvis_geo.outputs, dynamicvis_geo.quicklooks, dynamicvis_geo.settings
"""
    subprocess.run([sys.executable, '-c', code], check=True)
