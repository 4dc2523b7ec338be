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


@pytest.mark.parametrize(
    'statement',
    [
        'import dynamicvis_geo',
        'from dynamicvis_geo import cli; cli._parser().format_help()',
    ],
)
def test_heavy_libraries_wait_until_they_are_needed(statement: str) -> None:
    code = (
        f'{statement}; import sys; '
        "print(sorted({'torch', 'torchgeo', 'lightning', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == '[]'
