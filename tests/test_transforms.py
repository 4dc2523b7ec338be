from typing import Any

import numpy as np
import pytest
import torch
from affine import Affine
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.transforms import IMAGENET_MEAN, IMAGENET_STD, Preprocess


def scene(height: int, width: int, top: int = 10000) -> NDArray[np.float32]:
    """Whole reflectances with sharp edges, saturated and negative values."""
    generator = np.random.default_rng(height * width)
    coarse = generator.integers(-500, top + 2000, (3, -(-height // 8), -(-width // 8)))
    blocks = coarse.repeat(8, axis=1).repeat(8, axis=2)[:, :height, :width]
    fine = generator.integers(-400, 400, (3, height, width))
    return (blocks + fine).astype(np.float32)


def with_pillow(
    image: NDArray[np.float32], size: tuple[int, int], top: int = 10000
) -> NDArray[np.uint8]:
    levels = (np.clip(image / np.float32(top), 0, 1) * 255).astype(np.uint8)
    picture = Image.fromarray(levels.transpose(1, 2, 0))
    resized = picture.resize(size[::-1], Image.Resampling.BICUBIC)
    return np.asarray(resized).transpose(2, 0, 1)


def levels_of(normalised: Tensor) -> NDArray[np.float64]:
    mean = torch.tensor(IMAGENET_MEAN)[:, None, None]
    std = torch.tensor(IMAGENET_STD)[:, None, None]
    levels = ((normalised * std + mean) * 255).double().numpy()
    assert np.abs(levels - levels.round()).max() < 1e-3
    return levels.round()


@pytest.mark.parametrize(
    ('size', 'target'),
    [
        ((512, 512), (512, 512)),
        ((400, 400), (512, 512)),
        ((128, 128), (512, 512)),
        ((967, 973), (512, 512)),
        ((300, 700), (224, 224)),
        ((64, 100), (512, 96)),
        ((1, 1), (64, 64)),
    ],
)
def test_equals_pillow(size: tuple[int, int], target: tuple[int, int]) -> None:
    image = scene(*size)
    got = levels_of(Preprocess(target)(torch.from_numpy(image)))
    difference = np.abs(got - with_pillow(image, target))
    assert difference.max() <= 1
    assert (difference > 0).mean() <= 0.001


def test_every_reflectance_truncates_to_the_level_of_numpy() -> None:
    values = torch.arange(-10, 10012).float().reshape(1, 1, -1).expand(3, -1, -1)
    got = levels_of(Preprocess(None)(values))
    expected = (np.clip(values.numpy() / np.float32(10000), 0, 1) * 255).astype(
        np.uint8
    )
    assert np.array_equal(got, expected)


def test_input_range_is_what_becomes_black_and_white() -> None:
    image = torch.tensor([500.0, 1000.0, 2000.0, 3000.0, 9000.0]).expand(3, 1, 5)
    got = levels_of(Preprocess(None, input_range=(1000, 3000))(image))
    assert got[0, 0].tolist() == [0, 0, 127, 255, 255]


def test_batch_equals_its_images_and_integers_their_floats() -> None:
    images = torch.from_numpy(np.stack([scene(70, 90), scene(70, 90)[:, ::-1].copy()]))
    images = images.clamp(min=0)
    preprocess = Preprocess(64)
    together = preprocess(images)
    assert together.dtype == torch.float32
    for image, got in zip(images, together, strict=True):
        assert torch.equal(preprocess(image), got)
    assert torch.equal(preprocess(images.to(torch.int32)), together)


def test_missing_values_count_as_dark() -> None:
    image = torch.full((3, 4, 4), torch.nan)
    assert levels_of(Preprocess(None)(image)).max() == 0


@pytest.mark.parametrize('size', [None, 16, 32])
def test_the_image_stays_as_it_was(size: int | None) -> None:
    image = torch.from_numpy(scene(32, 32))
    image[0, 0, 0] = torch.nan
    before = image.clone()
    Preprocess(size)(image)
    torch.testing.assert_close(image, before, rtol=0, atol=0, equal_nan=True)


def test_autocast_and_casts_of_the_module_change_nothing() -> None:
    image = torch.from_numpy(scene(50, 50))
    expected = Preprocess(64)(image)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert torch.equal(Preprocess(64)(image), expected)


@pytest.mark.parametrize(
    ('arguments', 'image', 'words'),
    [
        ({'input_range': (10000, 0)}, None, r'input_range=\(10000, 0\)'),
        ({'input_range': (0, 1, 2)}, None, 'two increasing numbers'),
        ({}, torch.zeros(4, 8, 8), r'\(4, 8, 8\).*red, green, blue'),
        ({}, torch.zeros(8, 8), r'\(8, 8\)'),
        ({}, torch.zeros(3, 8, 8, dtype=torch.bfloat16), 'bf16-mixed'),
    ],
)
def test_errors_name_the_value(
    arguments: dict[str, Any], image: Tensor | None, words: str
) -> None:
    with pytest.raises(SpecError, match=words):
        Preprocess(**arguments)(image)


def test_sample_is_transformed_with_what_lies_on_the_image() -> None:
    image = torch.from_numpy(scene(64, 32))
    mask = torch.arange(64 * 32).view(64, 32)
    sample = {
        'image': image,
        'mask': mask,
        'bbox_xyxy': torch.tensor([[0.0, 8.0, 16.0, 64.0]]),
        'transform': torch.tensor(Affine(10, 0, 500_000, 0, -10, 4_000_000)),
        'label': torch.tensor(3),
        'crs': 'EPSG:32633',
    }
    given = dict(sample)
    transforms = Preprocess((32, 64))
    got = transforms(sample)
    assert sample == given
    assert torch.equal(got['image'], transforms(image))
    assert torch.equal(got['mask'], mask[1::2].repeat_interleave(2, 1))
    assert got['bbox_xyxy'].tolist() == [[0, 4, 32, 32]]
    assert got['transform'].tolist() == [5, 0, 500_000, 0, -20, 4_000_000, 0, 0, 1]
    assert got['label'] is sample['label']
    assert got['crs'] == 'EPSG:32633'

    batch = {
        key: torch.stack([value, value])
        for key, value in sample.items()
        if isinstance(value, Tensor)
    }
    for key, value in transforms(batch).items():
        assert torch.equal(value[1], got[key]), key


def test_sample_that_keeps_its_size_keeps_the_rest() -> None:
    sample = {
        'image': torch.from_numpy(scene(8, 8)),
        'mask': torch.eye(8),
        'transform': torch.arange(18.0),  # of imagery & labels
    }
    for transforms in (Preprocess(8), Preprocess(None)):
        got = transforms(sample)
        assert got['mask'] is sample['mask']
        assert got['transform'] is sample['transform']
    larger = Preprocess(16)(sample | {'mask': torch.eye(4)})
    assert torch.equal(larger['mask'], torch.eye(4))  # of another size than the image
    assert larger['transform'][9:].tolist() == [4.5, 5, 11, 6, 6.5, 14, 15 / 2, 8, 17]


def test_sample_without_an_image_is_refused() -> None:
    with pytest.raises(SpecError, match=r"no 'image', but \['image1', 'mask'\]"):
        Preprocess()({'image1': torch.zeros(3, 8, 8), 'mask': torch.zeros(8, 8)})


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA GPU')
def test_transforms_of_a_data_module_take_batches_of_any_device() -> None:
    image = torch.from_numpy(scene(64, 64))
    expected = Preprocess(32)(image)
    got = Preprocess(32)({'image': image.cuda()})['image']
    torch.testing.assert_close(got.cpu(), expected)
