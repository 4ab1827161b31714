"""tools/emoji.py, which splits drawings of several styles into a training set and a validation set."""
import pytest

import emoji
from conftest import call


@pytest.mark.parametrize("name, wanted", [
    ("1f44b", ("1f44b", ())), ("1F44B-1F3FB", ("1f44b", ("1f3fb",))), ("2764-fe0f", ("2764", ())),
    ("1f3ff", ("1f3ff", ())),
    ("1f469-1f3fd-200d-1f91d-200d-1f468-1f3ff", ("1f469-200d-1f91d-200d-1f468", ("1f3fd", "1f3ff")))])
def test_a_subject_is_its_code_points_but_for_the_skin(name, wanted):
    assert emoji.subject(name) == wanted


def test_subjects_are_held_out_in_all_styles_and_tones(tmp_path, capsys):
    for style, end in (("a", "png"), ("b", "webp")):
        for i in range(200):
            for tone in ("", "-1f3fb", "-1f3fd", "-1f3ff"):
                path = tmp_path / style / ("people" if i % 2 else "food") / f"{i:05x}{tone}.{end}"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(f"{style} {i} {tone}")
    flags = [f"fluent={tmp_path / 'a'}", f"noto={tmp_path / 'b'}"]
    assert call(emoji.main, tmp_path / "out", *flags) is None
    subjects = {}
    for part in ("train", "held_out"):
        folders = {path.name: sorted(path.iterdir()) for path in (tmp_path / "out" / part).iterdir()}
        assert set(folders) == {"people-fluent", "people-noto", "food-fluent", "food-noto"}
        subjects[part] = {emoji.subject(file.stem)[0] for files in folders.values() for file in files}
        for files in folders.values():                                       # without and with a tone
            names = [emoji.subject(file.stem) for file in files]
            assert len(names) == 2 * len({name for name, _ in names}) == 2 * len({n for n, tone in names if not tone})
    assert not subjects["train"] & subjects["held_out"] and len(subjects["train"] | subjects["held_out"]) == 200
    assert 3 <= len(subjects["held_out"]) <= 20
    tones = {file.stem.split("-")[1] for file in (tmp_path / "out/train").rglob("*-1f3f*")}
    assert len(tones) == 3                                                   # not always the same one
    n = {part: 2 * len(each) for part, each in subjects.items()}
    assert capsys.readouterr().out == ", ".join(f"{style}: {n[part]} {part}" for style in ("fluent", "noto")
                                                for part in ("held_out", "train")) + "\n"
    line = f"error: {tmp_path / 'out'} exists already; name a new folder"
    assert call(emoji.main, tmp_path / "out", *flags) == line
    assert "no such folder" in call(emoji.main, tmp_path / "other", "noto")
