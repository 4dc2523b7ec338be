from itertools import combinations
from pathlib import Path

import pytest

from dynamicvis_geo.errors import SourceError, SpecError
from dynamicvis_geo.plotting.palette import (
    MISSING,
    class_colours,
    colour_distance,
    read_class_colours,
)

NOMENCLATURES = {
    'WorldCover': 'Tree cover;Shrubland;Grassland;Cropland;Built-up;Bare / sparse '
    'vegetation;Snow and ice;Permanent water bodies;Herbaceous wetland',
    'Dynamic World': 'trees;shrub_and_scrub;grass;crops;built;bare;snow_and_ice;water;'
    'flooded_vegetation',
}


@pytest.mark.parametrize('names', NOMENCLATURES.values(), ids=list(NOMENCLATURES))
def test_kinds_of_land_have_the_same_colours_in_all_nomenclatures(names: str) -> None:
    reference = class_colours(NOMENCLATURES['WorldCover'].split(';'))
    assert [*class_colours(names.split(';')).values()] == [*reference.values()]


@pytest.mark.parametrize(
    ('name', 'like'),
    [
        ('SeaLake', 'water'),
        ('Marine waters', 'water'),
        ('BROAD-LEAVED FOREST', 'tree'),
        ('AnnualCrop', 'crops'),
        ('Non-irrigated arable land', 'crops'),
        ('Ice/Snow', 'snow'),
        ('Pastures', 'grass'),
        ('Developed, Open Space', 'built'),
        ('Inland marshes', 'wetland'),
        ('Beaches, dunes, sands', 'bare'),
        ('Vineyards', 'PermanentCrop'),
        ('Sparsely vegetated areas', 'bare'),
        ('Artificial, non-agricultural vegetated areas', 'grass'),
        ('Industrial or commercial units', 'Industrial'),
    ],
)
def test_names_mean_what_they_say(name: str, like: str) -> None:
    assert class_colours([name])[name] == class_colours([like])[like]


@pytest.mark.parametrize('name', ['no water', 'non-forest', 'forest loss', 'justice'])
def test_names_that_deny_or_only_contain_a_kind_do_not_mean_it(name: str) -> None:
    kinds = class_colours(['water', 'forest', 'ice'])
    assert class_colours([name])[name] not in kinds.values()


@pytest.mark.parametrize(
    'names',
    [
        *(text.split(';') for text in NOMENCLATURES.values()),
        ['train', 'val', 'test', 'left out'],
        [*'ABCDEFGHIJ', 'water', 'forest'],
    ],
)
def test_classes_can_be_told_apart_with_deuteranopia(names: list[str]) -> None:
    colours = class_colours(names)
    assert list(colours) == names
    assert colours == class_colours(names)
    for one, other in combinations([*colours.values(), MISSING], 2):
        assert colour_distance(one, other) > 11, (one, other)


def test_a_hundred_classes_have_a_hundred_colours() -> None:
    names = [f'forest {i}' for i in range(50)] + [f'kind {i}' for i in range(50)]
    assert len(set(class_colours(names).values())) == 100


def test_deuteranopia_is_seen_from_here() -> None:
    assert colour_distance('black', 'white') == pytest.approx(100, abs=0.1)
    assert colour_distance('#9a7f00', '#d75b1c') < 20
    assert colour_distance('#0072b2', '#e69f00') > 60


def test_chosen_colours_win_and_are_kept_free(tmp_path: Path) -> None:
    path = tmp_path / 'colours.csv'
    path.write_text('name,color\nwater, black\n"a, b",#14602c\nunused,red\n')
    chosen = read_class_colours(path)
    colours = class_colours(['trees', 'water', 'a, b'], chosen)
    assert (colours['water'], colours['a, b']) == ('#000000', '#14602c')
    assert colour_distance(colours['trees'], '#14602c') > 11
    with pytest.raises(SpecError, match='the classes are oats'):
        class_colours(['oats'], chosen)
    with pytest.raises(SpecError, match="'oats', 'pale', is none"):
        class_colours(['oats'], {'oats': 'pale'})
    with pytest.raises(SpecError, match="'oats', 'none', is none"):
        class_colours(['oats'], {'oats': 'none'})


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('class,color\na,red\n', "first line is 'class,color'"),
        ('name,color\na,red\nb,pale\n', "line 3: 'pale' is no color"),
        ('name,color\na,red\na,blue\n', 'line 3: it names a again'),
        ('name,color\n,red\n', 'line 2: it has no name'),
        ('name,color\na\n', "line 2: '' is no color"),
        ('name,color\na,none\n', "line 2: 'none' is no color"),
        ('', "first line is ''"),
    ],
)
def test_unusable_colours_name_the_line(
    text: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / 'colours.csv'
    path.write_text(text)
    with pytest.raises(SourceError, match=message):
        read_class_colours(path)
    with pytest.raises(SourceError, match='cannot be read'):
        read_class_colours(tmp_path)
