"""The backbone under torch.compile and torch.export, on which users build their own."""

import pytest
import torch

from dynamicvis_geo.models import DynamicVis, dynamicvis
from dynamicvis_geo.models.layers import SparseMixer
from dynamicvis_geo.models.mamba import MambaBlock


@torch.no_grad()
def test_compiles_as_one_graph() -> None:
    torch.manual_seed(0)
    mixer = SparseMixer(16, 2, 4, 'head', True, False, MambaBlock(16))
    compiled = torch.compile(mixer, fullgraph=True, backend='eager')
    x = torch.randn(2, 64, 16)
    torch.testing.assert_close(compiled(x), mixer(x))


@pytest.mark.parametrize('strict', [False, True])
@torch.no_grad()
def test_exports_for_any_batch(strict: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamicvis, '_DEPTHS', {'b': (1, 1, 1, 1)})
    torch.manual_seed(0)
    model = DynamicVis(img_size=64).eval()
    exported = torch.export.export(
        model,
        (torch.randn(2, 3, 64, 64),),
        dynamic_shapes={'x': {0: torch.export.Dim('batch', min=1, max=64)}},
        strict=strict,
    ).module()
    for batch_size in (1, 5):
        x = torch.randn(batch_size, 3, 64, 64)
        torch.testing.assert_close(exported(x)[0], model(x)[0])
