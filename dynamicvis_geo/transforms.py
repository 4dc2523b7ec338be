"""From raw reflectance to the input of the backbone."""

from collections.abc import Mapping, Sequence
from typing import Any, overload

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynamicvis_geo.errors import SpecError

#: Mean and standard deviation of ImageNet's RGB, of values in 0..1. Times 255 they are
#: the numbers of the official DynamicVis preprocessor.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

#: The highest reflectance that an image given by the user may have.
HIGHEST = 10000


class Preprocess(nn.Module):
    """Reflectance to 8 bits, resized as Pillow resizes, ImageNet-normalised.

    The path of the established adapter of this model: scale *input_range* to 0..1 and
    clip, times 255, truncate to whole levels, resize (bicubic, with the antialiasing of
    Pillow's ``Image.resize``), divide by 255, subtract the mean and divide by the
    standard deviation. It runs on whole batches, on the device of the batch, and on
    samples and batches of TorchGeo, as ``transforms=`` of a dataset for instance.

    Args:
        img_size: pixels of a side of the result, or (height, width); None leaves the
            size as it is.
        input_range: the values that become black and white. (0, 10000) is Sentinel-2
            reflectance as delivered; (0, 3000) the usual stretch for display.

    Raises:
        SpecError: if *input_range* is not two increasing numbers.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] | None = 512,
        input_range: Sequence[float] = (0.0, 10000.0),
    ) -> None:
        super().__init__()
        if len(input_range) != 2 or not input_range[0] < input_range[1]:
            raise SpecError(
                f'input_range={tuple(input_range)!r} must be two increasing numbers, '
                'such as (0, 10000)'
            )
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.input_range = float(input_range[0]), float(input_range[1])
        low, high = self.input_range
        # Kept as tensors: CUDA multiplies by the reciprocal of a Python number, which
        # rounds otherwise and so can truncate to another level.
        for name, values in (
            ('low', low),
            ('span', high - low),
            ('mean', IMAGENET_MEAN),
            ('std', IMAGENET_STD),
        ):
            value = torch.tensor(values, dtype=torch.float32)
            if value.ndim:
                value = value[:, None, None]
            self.register_buffer(name, value, persistent=False)
        self.low: Tensor
        self.span: Tensor
        self.mean: Tensor
        self.std: Tensor

    @property
    def provenance(self) -> dict[str, Any]:
        """Range, size and normalisation, for the record of a file."""
        return {
            'input_range': list(self.input_range),
            'quantisation': 'uint8, truncated',
            'resize': list(self.img_size) if self.img_size else None,
            'resampling': 'bicubic, antialiased (Pillow)',
            'mean': list(IMAGENET_MEAN),
            'std': list(IMAGENET_STD),
        }

    @overload
    def forward(self, image: Tensor) -> Tensor: ...

    @overload
    def forward(self, image: Mapping[str, Any]) -> dict[str, Any]: ...

    def forward(self, image: Tensor | Mapping[str, Any]) -> Tensor | dict[str, Any]:
        """Preprocess raw values.

        Args:
            image: ``[..., 3, H, W]`` in RGB order, any real dtype that holds the values
                exactly, NaN being the low end of the input range; or a sample or batch
                of TorchGeo, a dictionary with such an ``image``.

        Returns:
            float32 ``[..., 3, *img_size]``; or a copy of the dictionary with that, in
            which ``mask`` (its nearest pixels, if it has the size of the image),
            ``bbox_xyxy`` and ``transform`` follow the new size, and the rest is as it
            was.

        Raises:
            SpecError: if there are not 3 bands, the dtype is a 16-bit float, or the
                dictionary has no ``image``.
        """
        if isinstance(image, Tensor):
            return self._normalise(image)
        sample = dict(image)
        if 'image' not in sample:
            raise SpecError(
                f"the sample has no 'image', but {sorted(sample)}: give "
                "{'image': tensor, ...}, or the tensor alone"
            )
        before = sample['image']
        sample['image'] = after = self._normalise(before)
        if before.shape[-2:] != after.shape[-2:]:
            _follow(sample, before.shape[-2:], after.shape[-2:])
        return sample

    def _normalise(self, image: Tensor) -> Tensor:
        if image.ndim < 3 or image.shape[-3] != 3:
            raise SpecError(
                f'image has shape {tuple(image.shape)}: give [..., 3, H, W], bands in '
                'the order red, green, blue'
            )
        if image.dtype in (torch.float16, torch.bfloat16):
            raise SpecError(
                f'image is {image.dtype}, which rounds reflectance by up to 0.4 %: '
                "give float32 (with a Trainer: precision='bf16-mixed', not 'bf16-true')"
            )
        # Transforms of a dataset or data module are on the CPU wherever the batch is.
        low, span, mean, std = (
            value.to(image.device, torch.float32)
            for value in (self.low, self.span, self.mean, self.std)
        )
        with torch.autocast(image.device.type, enabled=False):
            # In place: new memory for every step takes a CPU longer than the steps.
            levels = (image.float() - low).div_(span)
            levels = levels.nan_to_num_(0.0).clamp_(0, 1).mul_(255).floor_()
            if self.img_size is not None:
                levels = _resize(levels, *self.img_size)
            return levels.div_(255).sub_(mean).div_(std)


def _follow(sample: dict[str, Any], old: Sequence[int], new: Sequence[int]) -> None:
    """Bring what TorchGeo has beside an image from its old to its new size."""
    mask, boxes, affine = (sample.get(k) for k in ('mask', 'bbox_xyxy', 'transform'))
    y, x = (after / before for before, after in zip(old, new, strict=True))
    if isinstance(mask, Tensor) and mask.shape[-2:] == old:
        rows, columns = (
            torch.arange(after, device=mask.device)
            .add(0.5)
            .mul(before / after)
            .long()
            .clamp(max=before - 1)
            for before, after in zip(old, new, strict=True)
        )
        sample['mask'] = mask[..., rows[:, None], columns]
    if isinstance(boxes, Tensor):
        sample['bbox_xyxy'] = boxes * boxes.new_tensor([x, y, x, y], dtype=torch.float)
    if isinstance(affine, Tensor):
        # Rows of the matrix of (column, row, 1); `imagery & labels` has two matrices.
        sizes = affine.new_tensor([1 / x, 1 / y, 1])
        sample['transform'] = affine * sizes.repeat(affine.shape[-1] // 3)


def _resize(levels: Tensor, height: int, width: int) -> Tensor:
    """Resize as Pillow does: columns first, and whole levels after each direction."""
    shape = levels.shape
    levels = levels.reshape(-1, *shape[-3:])
    for size in ((shape[-2], width), (height, width)):
        if levels.shape[-2:] != size:
            levels = F.interpolate(levels, size, mode='bicubic', antialias=True)
            levels = levels.add_(0.5).floor_().clamp_(0, 255)
    return levels.reshape(*shape[:-2], height, width)


def read_reflectance(given: Any) -> Tensor:
    """Bring an image of the user into float32.

    Args:
        given: *input_chw*, raw reflectance ``[3, H, W]``, 0 to 10000: a NumPy array, a
            tensor, or what NumPy takes for one.

    Returns:
        float32 ``[3, H, W]``, a copy.

    Raises:
        SpecError: If it is anything else.
    """
    what = 'input_chw has to be raw reflectance [3, H, W], bands B4, B3, B2, 0..10000'
    if isinstance(given, Tensor):
        given = given.detach().cpu()
        # NumPy has no bfloat16; either is refused below.
        given = (given.half() if given.dtype == torch.bfloat16 else given).numpy()
    if np.ma.is_masked(given):
        raise SpecError(f'{what}; some of it is masked: give input_chw.filled(0)')
    try:
        values = np.asarray(given)
    except (TypeError, ValueError) as error:
        raise SpecError(f'{what}; it is no array ({error})') from error
    if values.dtype.kind not in 'iuf':
        raise SpecError(
            f'{what}; its dtype is {values.dtype}: convert it, as in '
            "input_chw.astype('float32')"
        )
    if values.dtype.itemsize == 2 and values.dtype.kind == 'f':
        raise SpecError(
            f'{what}; a float of 16 bits rounds reflectance by up to 0.4 %: give '
            'float32 from the start'
        )
    if values.ndim != 3 or values.shape[0] != 3 or 0 in values.shape:
        last = values.ndim == 3 and values.shape[-1] == 3
        remedy = ': move the bands to the front, as in np.moveaxis(image, -1, 0)'
        raise SpecError(
            f'{what}; its shape is {values.shape}{remedy if last else ": reshape it"}'
        )
    if not np.isfinite(values).all():
        raise SpecError(
            f'{what}; it holds NaN or infinity: fill what is missing, as in '
            'np.nan_to_num(input_chw, posinf=0, neginf=0)'
        )
    low, high = values.min(), values.max()
    if low < 0 or high > HIGHEST:
        raise SpecError(
            f'{what}; its values reach from {low:g} to {high:g}: give '
            f'input_chw.clip(0, {HIGHEST}) if they are reflectance times 10000'
        )
    if values.dtype.kind == 'f' and 0 < high <= 1:
        raise SpecError(
            f'{what}; its highest value is {high:g}, as of reflectance 0..1: give '
            'input_chw * 10000'
        )
    return torch.from_numpy(np.array(values, dtype=np.float32))
