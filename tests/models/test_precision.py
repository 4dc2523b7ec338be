"""Float32 stays float32 under every setting, and every setting stays what it was."""

import threading
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F

from dynamicvis_geo.models.precision import float32_products

NEW = hasattr(torch._C, '_get_fp32_precision_getter')
needs_new = pytest.mark.skipif(not NEW, reason='this PyTorch has the old settings only')
ENTRIES = [('generic', 'all')]
ENTRIES += [(b, op) for b in ('cuda', 'mkldnn') for op in ('all', 'matmul', 'conv')]


def set_entry(backend: str, op: str, value: str) -> None:
    torch._C._set_fp32_precision_setter(backend, op, value)


def medium() -> None:
    torch.set_float32_matmul_precision('medium')


def high() -> None:
    torch.set_float32_matmul_precision('high')


def old_tf32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True


def no_tf32_in_convolutions() -> None:
    torch.backends.cudnn.allow_tf32 = False


def everything_tf32() -> None:
    torch.backends.fp32_precision = 'tf32'


def mkldnn_bf16() -> None:
    torch.backends.mkldnn.set_flags(_fp32_precision='bf16')


def old_and_new_mixed() -> None:
    torch.set_float32_matmul_precision('medium')
    torch.backends.cuda.matmul.fp32_precision = 'ieee'
    torch.backends.cudnn.conv.fp32_precision = 'tf32'
    torch.backends.cudnn.rnn.fp32_precision = 'ieee'


def nothing() -> None:
    pass


SETTINGS = [
    *(nothing, medium, high, old_tf32, no_tf32_in_convolutions),
    *(
        pytest.param(setting, marks=needs_new)
        for setting in (everything_tf32, mkldnn_bf16, old_and_new_mixed)
    ),
]


def observe() -> list[object]:
    """Every setting, as the old and the new readers tell it, and what it inherits."""
    readers: list[Callable[[], object]] = [
        torch.get_float32_matmul_precision,
        lambda: torch.backends.cuda.matmul.allow_tf32,
        lambda: torch.backends.cudnn.allow_tf32,
    ]
    seen: list[object] = []
    for reader in readers:
        try:
            seen.append(reader())
        except RuntimeError:  # Old and new settings are mixed.
            seen.append('mixed')
    if NEW:
        generic = torch._C._get_fp32_precision_getter('generic', 'all')
        for value in (generic, 'ieee', 'tf32'):
            set_entry('generic', 'all', value)
            seen += [torch._C._get_fp32_precision_getter(*entry) for entry in ENTRIES]
        set_entry('generic', 'all', generic)
    return seen


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    """Give other tests the settings that they would have had."""
    precision = torch.get_float32_matmul_precision()
    yield
    if NEW:
        for entry in ENTRIES:
            set_entry(*entry, 'none')
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = True


@pytest.mark.parametrize('setting', SETTINGS)
def test_settings_are_as_they_were(setting: Callable[[], None]) -> None:
    setting()
    before = observe()
    with float32_products():
        if NEW:
            for entry in ENTRIES:
                assert torch._C._get_fp32_precision_getter(*entry) == 'ieee'
        else:
            assert torch.get_float32_matmul_precision() == 'highest'
            assert not torch.backends.cudnn.allow_tf32
        with float32_products():
            pass
    assert observe() == before
    with pytest.raises(KeyError), float32_products():
        raise KeyError
    assert observe() == before


@pytest.mark.parametrize('setting', SETTINGS)
def test_products_are_exact_inside(setting: Callable[[], None]) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(1, 4096, 96, generator=generator)
    gate = torch.randn(1, 96, generator=generator)
    image = torch.randn(1, 96, 32, 32, generator=generator)
    filters = torch.randn(192, 96, 3, 3, generator=generator)
    logits, patches = F.linear(tokens, gate), F.conv2d(image, filters)
    setting()
    with float32_products():
        assert torch.equal(F.linear(tokens, gate), logits)
        assert torch.equal(F.conv2d(image, filters), patches)


def test_the_last_thread_to_leave_restores() -> None:
    torch.set_float32_matmul_precision('high')
    entered, leave = threading.Event(), threading.Event()

    def work() -> None:
        with float32_products():
            entered.set()
            leave.wait(60)

    worker = threading.Thread(target=work)
    before = observe()
    with float32_products():
        worker.start()
        entered.wait(60)
    try:
        if NEW:
            assert torch._C._get_fp32_precision_getter('cuda', 'matmul') == 'ieee'
        else:
            assert torch.get_float32_matmul_precision() == 'highest'
    finally:
        leave.set()
        worker.join()
    assert observe() == before


@pytest.mark.parametrize('setting', [nothing, medium, high, old_tf32])
def test_settings_of_a_pytorch_that_has_the_old_ones_only(
    setting: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    if NEW:
        monkeypatch.delattr(torch._C, '_get_fp32_precision_getter')
    setting()
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    with float32_products():
        assert torch.get_float32_matmul_precision() == 'highest'
        assert not torch.backends.cuda.matmul.allow_tf32
        assert not torch.backends.cudnn.allow_tf32
    after = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    assert after == before
