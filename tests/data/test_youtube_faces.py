"""YouTube Faces: videos of persons with tables of boxes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import load
from PIL import Image

from mea_ray.core.errors import ConfigError, DataError
from mea_ray.core.types import Dataset, ImageSet
from mea_ray.data import DATASETS

# The face is a coloured square on black; red is the person, green the video, blue the frame.

FACE = (6, 4, 16, 14)


def person(root: Path, name: str, red: int, videos: list[int]) -> None:
    lines = ["Filename;Width;Height;X1;Y1;X2;Y2"]
    for video, frames in enumerate(videos):
        for frame in range(frames):
            file = root / name / str(video) / f"aligned_detect_{video}.{frame:03}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            image = Image.new("RGB", (24, 20))
            image.paste((red, 40 * video, 4 * frame), FACE)
            image.save(file, quality=100, subsampling=0)
            lines.append(";".join(map(str, [f"{video}/{file.name}", 24, 20, *FACE])))
    (root / name / f"{name}.csv").write_text("\n".join(lines) + "\n")


def faces(path: Path, **options: Any) -> Dataset:
    return load("youtube_faces", path, **{"image_size": 8, "min_images": 10, **options})


@pytest.fixture
def database(tmp_path: Path) -> Path:
    root = tmp_path / "aligned_images_DB"
    person(root, "Ann", 80, [10, 4, 6])
    person(root, "Bob", 160, [20])
    person(root, "Cem", 240, [3, 4])
    (root / "README.txt").write_text("not a person")
    return tmp_path


def videos(part: ImageSet, label: int) -> set[int]:
    return {round(int(green) / 40) for green in part.images[part.labels == label][:, 1, 4, 4]}


def test_persons_with_few_frames_are_dropped_and_faces_cut_out(database: Path) -> None:
    dataset = faces(database)
    assert dataset.train.class_names == ("Ann", "Bob")
    assert faces(database, min_images=7).train.class_names == ("Ann", "Bob", "Cem")
    red = dataset.train.images[:, 0]
    for label, value in ((0, 80), (1, 160)):
        assert np.abs(red[dataset.train.labels == label].astype(int) - value).max() < 12, "nothing of the black border"
    assert np.array_equal(faces(database / "aligned_images_DB").train.images, dataset.train.images)


def test_no_video_lies_on_both_sides(database: Path) -> None:
    for fraction in (0.1, 0.2, 0.3, 0.5, 0.9):
        dataset = faces(database, test_fraction=fraction)
        train, test = videos(dataset.train, 0), videos(dataset.test, 0)
        assert train and test and not train & test and train | test == {0, 1, 2}
    assert videos(faces(database, test_fraction=0.2).test, 0) == {1}, "4 of 20 frames"
    assert videos(faces(database, test_fraction=0.3).test, 0) == {2}, "6 of 20 frames"


def test_a_single_video_is_cut_at_its_end(database: Path) -> None:
    dataset = faces(database, test_fraction=0.25)
    blue = [part.images[part.labels == 1][:, 2, 4, 4].astype(int) for part in (dataset.train, dataset.test)]
    assert len(blue[0]) == 15 and len(blue[1]) == 5
    assert blue[0].max() < blue[1].min()


def test_whole_frames_need_no_table(database: Path) -> None:
    (database / "aligned_images_DB" / "Ann" / "Ann.csv").unlink()
    with pytest.raises(DataError, match=r"Ann.csv.*data.crop=full"):
        faces(database)
    dataset = faces(database, crop="full")
    assert len(dataset.train) + len(dataset.test) == 40
    assert dataset.train.images[:, :, 0, 0].max() < 30, "the border is part of the frame"


def test_frames_are_thinned_evenly(database: Path) -> None:
    dataset = faces(database, max_images_per_class=10)
    assert [int((dataset.train.labels == i).sum() + (dataset.test.labels == i).sum()) for i in (0, 1)] == [10, 10]
    assert videos(dataset.train, 0) | videos(dataset.test, 0) == {0, 1, 2}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0/nothing.jpg;24;20;6;4;16;14", "line 2: there is no file"),
        ("0/aligned_detect_0.000.jpg;24;20;6;4;16;", "line 2: .* four integers"),
        ("0/aligned_detect_0.000.jpg;24", "line 2: .* four integers"),
        ("../Bob/0/aligned_detect_0.000.jpg;24;20;6;4;16;14", "line 2: .* is outside"),
        ("/etc/passwd;24;20;6;4;16;14", "line 2: .* is outside"),
        (";24;20;6;4;16;14", "line 2: '' is outside"),
        ("0/\0.jpg;24;20;6;4;16;14", "line 2: "),
        ("0/" + "x" * 5000 + ".jpg;24;20;6;4;16;14", "line 2: there is no file"),
        ("x" * 200_000 + ";24;20;6;4;16;14", "line 1: field larger than field limit"),
        ("0/aligned_detect_0.000.jpg;24;20;6;4;16;" + "9" * 5000, "line 2: .* four integers"),
        ("0/aligned_detect_0.000.jpg;24;20;30;4;40;14", "holds nothing of an image of 24 x 20"),
        ("0/aligned_detect_0.000.jpg;24;20;16;4;6;14", "holds nothing"),
    ],
)
def test_bad_rows_are_refused(database: Path, line: str, message: str) -> None:
    table = database / "aligned_images_DB" / "Ann" / "Ann.csv"
    lines = table.read_text().splitlines()
    table.write_text("\n".join([lines[0], line, *lines[1:]]))
    with pytest.raises(DataError, match=message):
        faces(database)


def test_bad_tables_and_options_are_refused(database: Path) -> None:
    with pytest.raises(DataError, match="0 persons"):
        faces(database, min_images=1000)
    with pytest.raises(ConfigError, match="min_images=1"):
        faces(database, min_images=1)
    with pytest.raises(ConfigError, match="data.path is empty"):
        DATASETS.build("youtube_faces")
    with pytest.raises(ConfigError, match="crop"):
        faces(database, crop="face")
    table = database / "aligned_images_DB" / "Ann" / "Ann.csv"
    table.write_text(table.read_text().replace(";", ","))
    with pytest.raises(DataError, match="lacks the columns Filename"):
        faces(database)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252"])
def test_tables_may_be_in_any_usual_encoding(tmp_path: Path, encoding: str) -> None:
    for name, red in (("Zo\u00eb", 80), ("J\u00f6rg", 160)):
        person(tmp_path, name, red, [6, 6])
        video = tmp_path / name / "1"
        video.rename(tmp_path / name / "n\u00e9")
        table = tmp_path / name / f"{name}.csv"
        table.write_bytes(table.read_text().replace("\n1/", "\nn\u00e9/").encode(encoding))
    dataset = faces(tmp_path)
    assert dataset.train.class_names == ("J\u00f6rg", "Zo\u00eb")
    assert len(dataset.train) + len(dataset.test) == 24


def test_a_table_that_is_no_text_is_refused(database: Path) -> None:
    table = database / "aligned_images_DB" / "Ann" / "Ann.csv"
    table.write_bytes(b"\xff\xfeF\0i\0l")
    with pytest.raises(DataError, match="cannot read .*Ann.csv as text"):
        faces(database)


def test_hidden_and_repeated_frames_are_left_out(database: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = database / "aligned_images_DB"
    (root / ".ipynb_checkpoints").mkdir()
    (root / "__MACOSX").mkdir()
    copies = root / "Ann" / ".ipynb_checkpoints"
    copies.mkdir()
    (copies / "x.jpg").write_bytes((root / "Ann/0/aligned_detect_0.000.jpg").read_bytes())
    with (root / "Ann" / "Ann.csv").open("a") as table:
        table.write(".ipynb_checkpoints/x.jpg;24;20;6;4;16;14\n0/aligned_detect_0.000.jpg;24;20;6;4;16;14\n")
    dataset = faces(database)
    assert dataset.train.class_names == ("Ann", "Bob") and len(dataset.train) + len(dataset.test) == 40
    assert "1 lines that repeat a frame" in caplog.text and "persons with fewer than 10 frames (Cem)" in caplog.text


def test_whole_frames_of_hidden_persons_and_videos_are_left_out(tmp_path: Path) -> None:
    for name in ("A_B", "C_D", ".ipynb_checkpoints"):
        person(tmp_path, name, 80, [6, 6])
    (tmp_path / "A_B" / "0").rename(tmp_path / "A_B" / ".trash")
    (tmp_path / "A_B" / "1" / "deeper").mkdir()
    (tmp_path / "A_B" / "1" / "deeper" / "x.jpg").write_bytes(b"never read")
    dataset = faces(tmp_path, crop="full", min_images=4)
    assert dataset.train.class_names == ("A_B", "C_D") and len(dataset.train) + len(dataset.test) == 18


def test_one_person_can_only_be_a_pool(tmp_path: Path) -> None:
    person(tmp_path, "Ann", 80, [6, 6])
    dataset = faces(tmp_path)
    assert len(dataset.train) == 6 and "1 persons in" in dataset.pool_only


def test_frames_that_no_table_lists_are_counted(database: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = len(faces(database).train.images) + len(faces(database).test.images)
    table = database / "aligned_images_DB" / "Bob" / "Bob.csv"
    table.write_text("\n".join(table.read_text().splitlines()[:-3]) + "\n")
    dataset = faces(database)
    assert len(dataset.train) + len(dataset.test) == whole - 3
    assert "3 frames that no table lists (" in caplog.text and "aligned_detect_0.017.jpg" in caplog.text
