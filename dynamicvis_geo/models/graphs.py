"""Forwards recorded as CUDA graphs: a thousand launches become one."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: A shape of its own graph each; beyond these, calls are not recorded.
MAX_GRAPHS = 4
_Kind = tuple[object, ...]


@dataclass(frozen=True)
class _Recording:
    graph: torch.cuda.CUDAGraph
    image: Tensor
    output: Tensor


class GraphedForward:
    """Replay a forward on batches of recurring shape.

    A shape is recorded when it comes for the second time, so that no memory is spent on
    one that does not recur, and at most :data:`MAX_GRAPHS` are. A smaller batch of a
    recorded shape, such as the last of a run, is filled up with what the batch before
    it left, and cut again.

    The output is that of the forward itself, but for rounding in batches that are
    filled up: matrix products of another size may add in another order.

    Args:
        forward: gives the output, a tensor whose first axis is the batch. It must not
            depend on the values of its input in any other way than through tensors.
        parameters: gives all tensors that *forward* reads beside its input. When they
            change, recordings are made anew.
    """

    def __init__(
        self,
        forward: Callable[[Tensor], Tensor],
        parameters: Callable[[], Iterable[Tensor]],
    ) -> None:
        self._forward, self._parameters = forward, parameters
        self._seen: set[tuple[_Kind, int]] = set()
        self._recordings: dict[tuple[_Kind, int], _Recording] = {}
        self._weights: object = None

    def __reduce__(self) -> Any:
        """Leave recordings behind when copied, or sent to another process."""
        return GraphedForward, (self._forward, self._parameters)

    def __call__(self, image: Tensor) -> Tensor:
        """Give the output for ``[B, ...]``, in memory of its own."""
        weights = state_of(self._parameters())
        if weights != self._weights:
            self._seen.clear()
            self._recordings.clear()
            self._weights = weights
        kind = _kind(image)
        recording = self._find(kind, len(image))
        if recording is None:
            shape = kind, len(image)
            if shape not in self._seen or len(self._recordings) >= MAX_GRAPHS:
                self._seen.add(shape)
                return self._forward(image)
            recording = self._recordings[shape] = self._record(image)
        recording.image[: len(image)].copy_(image)
        recording.graph.replay()
        return recording.output[: len(image)].clone()

    def _find(self, kind: _Kind, count: int) -> _Recording | None:
        """Find the recording of the smallest batch that holds *count* images."""
        sizes = [n for other, n in self._recordings if other == kind and n >= count]
        return self._recordings[kind, min(sizes)] if sizes else None

    def _record(self, image: Tensor) -> _Recording:
        static = image.clone()
        stream = torch.cuda.Stream(image.device)
        stream.wait_stream(torch.cuda.current_stream(image.device))
        graph = torch.cuda.CUDAGraph()
        # Threads that pin memory for a DataLoader call CUDA meanwhile.
        with (
            torch.cuda.device(image.device),
            torch.cuda.graph(graph, stream=stream, capture_error_mode='thread_local'),
        ):
            output = self._forward(static)
        torch.cuda.current_stream(image.device).wait_stream(stream)
        return _Recording(graph, static, output)


def _kind(image: Tensor) -> _Kind:
    """All but the size of the batch that decides which kernels run."""
    device = image.device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    return tuple(image.shape[1:]), image.dtype, image.device, autocast


def state_of(tensors: Iterable[Tensor]) -> list[tuple[int, int]]:
    """List address and version of tensors: others once they are replaced or written to.

    Args:
        tensors: such as the parameters of a model.

    Returns:
        A pair for each; the version of tensors made under inference mode, which have
        none, is 0.
    """
    return [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]
