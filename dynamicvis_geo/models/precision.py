"""Float32 products that are float32, whatever the process allows elsewhere."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

# Of PyTorch 2.9 and later; each entry inherits from 'all' and from 'generic'.
_ENTRIES = (
    *(('generic', 'all'), ('cuda', 'all'), ('cuda', 'matmul'), ('cuda', 'conv')),
    *(('mkldnn', 'all'), ('mkldnn', 'matmul'), ('mkldnn', 'conv')),
)

_lock = threading.Lock()
_inside = 0
_undo = ExitStack()


@contextmanager
def float32_products() -> Iterator[None]:
    """Keep products and convolutions of float32 tensors in float32, on CPU and CUDA.

    TF32 (on CUDA the default of convolutions) keeps 10 bits of 23, and bfloat16 (on
    CPUs that have it, under ``torch.set_float32_matmul_precision('medium')``) keeps 7.
    Afterwards, also after an error, every setting is as it was. What autocast casts is
    not float32 and stays as fast as it is.

    The settings are those of the process: all its threads have float32 until the last
    that is inside leaves. Inside, the old readers of them, such as
    ``torch.backends.cudnn.allow_tf32``, may raise; ``fp32_precision`` does not. A
    backward pass runs after the forward, hence outside, under what is set there.
    """
    global _inside
    with _lock:
        if not _inside:
            _set_float32(_undo)
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                _undo.close()


def _set_float32(undo: ExitStack) -> None:
    if not hasattr(torch._C, '_get_fp32_precision_getter'):
        cudnn = torch.backends.cudnn
        undo.callback(setattr, cudnn, 'allow_tf32', cudnn.allow_tf32)
        cudnn.allow_tf32 = False
        precision = torch.get_float32_matmul_precision()
        undo.callback(torch.set_float32_matmul_precision, precision)
        torch.set_float32_matmul_precision('highest')
        return
    # The public properties raise where old and new ones were mixed, and that of mkldnn
    # sets 'generic'. What an entry inherits from is 'ieee' when its turn comes, so one
    # that reads otherwise has that value of its own, and gets it back.
    setter = torch._C._set_fp32_precision_setter
    for backend, op in _ENTRIES:
        value = torch._C._get_fp32_precision_getter(backend, op)
        if value != 'ieee':
            undo.callback(setter, backend, op, value)
            setter(backend, op, 'ieee')
