"""Folders of image files, and videos of faces with their tables of boxes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mea_ray.core.errors import ConfigError, DataError
from mea_ray.core.types import Dataset
from mea_ray.data import DATASETS


def save(path: Path, colour: tuple[int, int, int] | int, size: tuple[int, int] = (20, 14)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L" if isinstance(colour, int) else "RGB", size, colour).save(path)


def folder(path: Path, **options: Any) -> Dataset:
    return DATASETS.build("image_folder", path=str(path), image_size=8, **options)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for part, count in (("train", 5), ("val", 2)):
        for name, red in (("dog", 200), ("cat", 50)):
            for i in range(count):
                save(tmp_path / part / name / f"{i}.png", (red, i, 0), size=(10 + 7 * i, 30))
    (tmp_path / "train" / "dog" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / ".hidden").mkdir()
    return tmp_path


def test_train_and_val_folders(tree: Path) -> None:
    dataset = folder(tree)
    assert dataset.train.class_names == ("cat", "dog")
    assert dataset.train.images.shape == (10, 3, 8, 8)
    assert dataset.train.labels.tolist() == [0] * 5 + [1] * 5
    assert dataset.train.images[:, 0, 4, 4].tolist() == [50] * 5 + [200] * 5
    assert dataset.train.images[:, 1, 4, 4].tolist() == [0, 1, 2, 3, 4] * 2
    assert dataset.test.labels.tolist() == [0, 0, 1, 1]
    assert len(folder(tree, max_images_per_class=1).train) == 2


def test_classes_alone_are_cut_in_two(tree: Path) -> None:
    dataset = folder(tree / "train", test_fraction=0.4)
    assert np.bincount(dataset.test.labels).tolist() == [2, 2]
    seen = [{(r, g) for r, g in part.images[:, :2, 4, 4].tolist()} for part in (dataset.train, dataset.test)]
    assert len(seen[0]) == 6 and len(seen[1]) == 4 and not seen[0] & seen[1]
    assert np.array_equal(folder(tree / "train", test_fraction=0.4).test.images, dataset.test.images)


def test_the_middle_is_cut_out_after_resizing(tmp_path: Path) -> None:
    wide = np.zeros((16, 48), np.uint8)
    wide[:, 16:32] = 255
    for part in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            Image.fromarray(wide).save(tmp_path / part / name / "0.png")
    images = folder(tmp_path).train.images
    assert images.shape == (2, 1, 8, 8), "grey files stay grey"
    assert images[..., 1:7].min() > 250


def test_a_large_jpeg_is_averaged(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
    for name in ("a", "b"):
        for i in range(2):
            path = tmp_path / name / f"{i}.jpg"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(noise).save(path, quality=95)
    images = folder(tmp_path, test_fraction=0.5).train.images
    assert abs(images.mean() - 127) < 10 and images.std() < 20


def test_damaged_and_missing_files_are_refused(tree: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="data.path is empty"):
        DATASETS.build("image_folder")
    with pytest.raises(DataError, match="no folder"):
        folder(tmp_path / "nowhere")
    broken = tree / "train" / "cat" / "3.png"
    broken.write_bytes(broken.read_bytes()[:40])
    with pytest.raises(DataError, match=r"cannot decode .*train/cat/3.png"):
        folder(tree)
    broken.unlink()
    assert len(folder(tree).train) == 9
    save(tree / "val" / "cow" / "0.png", 3)
    with pytest.raises(DataError, match="class 'cow'"):
        folder(tree)


def test_folders_without_classes_or_test_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "train" / "a" / "0.png", 3)
    with pytest.raises(DataError, match="none of test, val"):
        folder(tmp_path)
    save(tmp_path / "val" / "ILSVRC_0001.png", 3)
    with pytest.raises(DataError, match="has no folders"):
        folder(tmp_path)
    (tmp_path / "val" / "a").mkdir()
    with pytest.raises(DataError, match="holds no images"):
        folder(tmp_path)


def test_images_that_do_not_fit_into_memory_are_refused(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mea_ray.data import decode

    class Memory:
        available = 100

    monkeypatch.setattr(decode.psutil, "virtual_memory", Memory)
    with pytest.raises(DataError, match="smaller data.image_size"):
        folder(tree)


# --- YouTube Faces: the face is a coloured square on black; red is the person, green the video, blue the frame. ---

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
    return DATASETS.build("youtube_faces", **{"path": str(path), "image_size": 8, "min_images": 10, **options})


@pytest.fixture
def database(tmp_path: Path) -> Path:
    root = tmp_path / "aligned_images_DB"
    person(root, "Ann", 80, [10, 4, 6])
    person(root, "Bob", 160, [20])
    person(root, "Cem", 240, [3, 4])
    (root / "README.txt").write_text("not a person")
    return tmp_path


def videos(part: Any, label: int) -> set[int]:
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
        ("../Bob/0/aligned_detect_0.000.jpg;24;20;6;4;16;14", "lies outside"),
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
    with pytest.raises(ConfigError, match="at least 2"):
        faces(database, min_images=1)
    with pytest.raises(ConfigError, match="data.path is empty"):
        DATASETS.build("youtube_faces")
    with pytest.raises(ConfigError, match="crop"):
        faces(database, crop="face")
    table = database / "aligned_images_DB" / "Ann" / "Ann.csv"
    table.write_text(table.read_text().replace(";", ","))
    with pytest.raises(DataError, match="lacks the columns Filename"):
        faces(database)
