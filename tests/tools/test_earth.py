"""tools/earth.py, which cuts a map of the earth into tiles."""
import numpy as np
import pytest
from PIL import Image

import earth
from conftest import call

SEA, LAND, SAND, SNOW = (10, 30, 70), (40, 60, 20), (200, 170, 120), (250, 250, 250)


def tile(*parts):
    """Bands of colours, (colour, rows), 16 pixels wide."""
    return np.concatenate([np.full((rows, 16, 3), colour, np.uint8) for colour, rows in parts])


@pytest.mark.parametrize("parts, label", [
    ([(SEA, 16)], "sea"), ([(SEA, 15), (LAND, 1)], "islands"), ([(SEA, 8), (LAND, 8)], "coast"),
    ([(LAND, 16)], "green"),
    ([(SAND, 16)], "desert"), ([(SNOW, 16)], "ice"), ([(SNOW, 14), (LAND, 2)], "ice")])
def test_a_tile_is_named_by_what_it_shows(parts, label):
    assert earth.kind(tile(*parts)) == label


def test_what_is_held_out_is_another_part_of_the_world():
    """No pixel is in both parts, although tiles overlap. All tiles lie between the two latitudes."""
    seen = {part: np.zeros((360, 720), int) for part in ("train", "held_out")}
    for left, top, part in earth.tiles(16, 8, 720, 360):
        seen[part][top:top + 16, left:left + 16] += 1
    assert not (seen["train"] * seen["held_out"]).any()
    rows, columns = seen["train"].any(1).nonzero()[0], seen["held_out"].any(0).nonzero()[0]
    assert rows[0] >= 36 and rows[-1] < 300                                  # 72 north, 60 south, at 2 pixels a degree
    assert columns[0] >= 610 and columns[-1] < 670                           # 125 to 155 east
    assert seen["train"].max() == 4


def test_tiles_of_a_map(tmp_path, capsys):
    pixels = np.full((360, 720, 3), SEA, np.uint8)
    pixels[100:140, 100:180] = LAND
    pixels[200:260, 600:700] = SAND
    Image.fromarray(pixels).save(tmp_path / "map.png")
    command = [tmp_path / "map.png", tmp_path / "tiles", "--size", 16, "--step", 16]
    assert call(earth.main, *command) is None
    train, held = ({path.name: len(list(path.iterdir())) for path in (tmp_path / "tiles" / part).iterdir()}
                   for part in ("train", "held_out"))
    assert {"sea", "coast", "green"} <= set(train) and {"sea", "desert"} <= set(held)
    assert all(n % 4 == 0 for n in train.values())                           # in four rotations
    name = next((tmp_path / "tiles/train/coast").glob("*_0.png"))
    rotated = [np.asarray(Image.open(str(name).replace("_0.png", f"_{k}.png"))) for k in range(4)]
    assert all((np.rot90(rotated[0], k) == rotated[k]).all() for k in range(4))
    assert (np.asarray(Image.open(next((tmp_path / "tiles/train/sea").iterdir()))) == (26, 57, 103)).all()  # brighter
    said = capsys.readouterr().out
    assert f"train: green {train['green'] // 4} x 4 rotations" in said
    assert call(earth.main, *command) == f"error: {tmp_path / 'tiles'} exists already; name a new folder"
    Image.new("RGB", (300, 300)).save(tmp_path / "square.png")
    assert "must be twice as wide as high" in call(earth.main, tmp_path / "square.png", tmp_path / "other")
