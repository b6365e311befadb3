"""Folders of image files: parts, classes, and images alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import bars_in, class_folders, image_files, load, named_labels
from PIL import Image

from mea_ray.core.errors import ConfigError, DataError
from mea_ray.core.types import Dataset
from mea_ray.data import DATASETS, memory
from mea_ray.data.splits import make_splits


def save(path: Path, colour: tuple[int, int, int] | int, size: tuple[int, int] = (20, 14)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L" if isinstance(colour, int) else "RGB", size, colour).save(path)


def folder(path: Path, **options: Any) -> Dataset:
    return load("image_folder", path, **{"image_size": 8, **options})


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


def test_images_that_do_not_fit_into_memory_are_refused(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: 100)
    with pytest.raises(DataError, match="smaller data.image_size"):
        folder(tree)


def right(dataset: Dataset, classes: str = "abc") -> bool:
    """Whether each image carries the name of its class: the picture of the k-th class has k bars."""
    parts = (dataset.train, dataset.test)
    return all(
        classes.index(name) + 1 == bars_in(image)
        for part in parts
        for name, image in zip(named_labels(part), part.images, strict=True)
    )


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("Train", "Test"),
        ("TRAIN", "VAL"),
        ("training", "testing"),
        ("Training", "Validation"),
        ("train_set", "test_set"),
        ("seg_train", "seg_test"),
        ("seg_train/seg_train", "seg_test/seg_test"),
        ("trainval", "test"),
        ("train2017", "val2017"),
        ("images/train", "images/val"),
        ("train/images", "test/images"),
        ("my_animals/data/Train", "my_animals/data/Test"),
        ("faces_train", "faces_test"),
    ],
)
def test_folders_of_parts_by_whatever_name(tmp_path: Path, train: str, test: str) -> None:
    class_folders(tmp_path / train, count=4)
    class_folders(tmp_path / test, count=2, first=50)
    dataset = folder(tmp_path, image_size=16)
    assert dataset.train.class_names == ("a", "b", "c") and right(dataset)
    assert (len(dataset.train), len(dataset.test), dataset.pool_only) == (12, 6, "")


def test_test_is_taken_before_validation_and_unused_files_cause_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number, (name, count) in enumerate((("TRAIN", 4), ("TEST", 2), ("VAL", 3))):
        class_folders(tmp_path / name, count=count, first=50 * number)
    class_folders(tmp_path / "extra", ("x",), count=5)
    dataset = folder(tmp_path, image_size=16)
    assert (len(dataset.train), len(dataset.test)) == (12, 6) and dataset.train.classes == 3
    assert "5 images outside of the folders of parts" in caplog.text
    assert "9 images of a second test part" in caplog.text


def test_validation_stands_in_for_a_test_part_without_classes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class_folders(tmp_path / "train")
    class_folders(tmp_path / "val", count=2, first=50)
    image_files(tmp_path / "test", 7, first=90)
    dataset = folder(tmp_path, image_size=16)
    assert len(dataset.test) == 6 and right(dataset) and not dataset.pool_only
    assert "test has no classes" in caplog.text


def test_classes_that_are_called_like_parts_remain_classes(tmp_path: Path) -> None:
    """CIFAR-100 and COCO have trains."""
    class_folders(tmp_path, ("bus", "test_tube", "train"))
    assert folder(tmp_path, test_fraction=0.5).train.class_names == ("bus", "test_tube", "train")


def test_single_folders_above_the_classes_are_passed(tmp_path: Path) -> None:
    class_folders(tmp_path / "archive" / "PetImages", ("Cat", "Dog"))
    assert folder(tmp_path).train.class_names == ("Cat", "Dog")
    image_files(tmp_path / "archive" / "Fish" / "deep" / "deeper", first=60)
    assert folder(tmp_path).train.class_names == ("Fish", "PetImages")


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (("cat/train", "cat/test", "dog/train", "dog/test"), "cat has the folders test, train, so that it would be"),
        (("images/train/a", "images/test/a", "masks/train/a", "masks/test/a"), "images has the folders test, train"),
        (("Train/a", "train/a", "test/a"), "has 2 folders for the train part: Train, train; rename all but one"),
        (("trainA", "trainB", "testA", "testB"), "2 folders for the train part: trainA, trainB"),
        (("test/a", "test/b"), "has a folder for test and none for train; add it"),
        (("eval/a", "other/b"), "eval in .* is a validation part by its name, with folders of classes in it"),
        (
            ("train_old/a", "train_old/b", "test_new/a", "test_new/b"),
            "has the folders test_new, train_old, which are parts",
        ),
        (("my/train_old", "my/test_new"), "has the folders test_new, train_old, which are parts rather than classes"),
    ],
)
def test_ambiguous_folders_are_refused_and_never_become_classes(
    tmp_path: Path, folders: tuple[str, ...], message: str
) -> None:
    for name in folders:
        image_files(tmp_path / name, 4)
    with pytest.raises(DataError, match=message):
        folder(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (("x/1.png", "y/2.png", "train/1.png", "test/2.png"), "train has images and no folders of classes"),
        (("train/1.png", "test/2.png"), "has images and no folders of classes"),
        (("1.png", "2.png"), "has images and no folders of classes"),
        (("train/a/1.png", "train/b/1.png"), "has images for train but none for test"),
        (("train/a/1.png", "val/1.png"), "val has images and no folders of classes, and there is no other test part"),
        (("train/a/1.png", "train/b/1.png", "test/a/2.png"), "test/b holds no images; add some, or remove the class"),
        (("train/a/1.png", "train/b/notes.txt", "test/a/2.png"), "train/b holds no images"),
        (("a/1.png", "a/2.png", "b/notes.txt"), "b holds no images"),
        (("a/1.png", "b/2.png"), "class 'a' .* has 1 images, the test split needs at least 2"),
    ],
)
def test_what_lacks_classes_or_a_test_part_is_a_pool_and_refused_as_data(
    tmp_path: Path, files: tuple[str, ...], message: str
) -> None:
    for number, name in enumerate(files):
        save(tmp_path / name.replace(".txt", ".png"), number)
        if name.endswith(".txt"):
            (tmp_path / name.replace(".txt", ".png")).rename(tmp_path / name)
    dataset = folder(tmp_path)
    assert len(dataset.train) + len(dataset.test) > 0
    with pytest.raises(DataError, match=message):
        make_splits(dataset)


def test_folders_without_images_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "photo.heic").write_bytes(b"x")
    with pytest.raises(
        DataError, match=r"holds no images with the suffixes .*not read: 1 files of other types \(.heic\)"
    ):
        folder(tmp_path)


def test_hidden_copies_are_on_no_side(tmp_path: Path) -> None:
    class_folders(tmp_path, count=10)
    for hidden in (".ipynb_checkpoints", "@eaDir", "deep/.cache"):
        image_files(tmp_path / "a" / hidden, 10)
    dataset = folder(tmp_path, image_size=16)
    assert len(dataset.train) + len(dataset.test) == 30 and dataset.train.classes == 3
    train = {image.tobytes() for image in dataset.train.images}
    assert not any(image.tobytes() in train for image in dataset.test.images)


def test_images_in_both_parts_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class_folders(tmp_path / "train", count=5)
    class_folders(tmp_path / "test", count=4, first=3)  # numbers 3 and 4 are in train, too
    folder(tmp_path, image_size=16)
    assert "6 different images in test are in train, too" in caplog.text


def test_a_class_that_links_to_another_gives_no_second_copy(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class_folders(tmp_path / "set", ("b", "c"))
    class_folders(tmp_path / "elsewhere", ("d",))
    (tmp_path / "set" / "a").symlink_to(tmp_path / "set" / "b")
    (tmp_path / "set" / "d").symlink_to(tmp_path / "elsewhere" / "d")
    dataset = folder(tmp_path / "set", image_size=16, test_fraction=0.5)
    assert len(dataset.train) + len(dataset.test) == 12
    assert "4 links to what is read anyway" in caplog.text


def test_names_with_accents_are_one_class_however_they_are_composed(tmp_path: Path) -> None:
    image_files(tmp_path / "train" / "caf\u00e9")
    image_files(tmp_path / "train" / "bar")
    image_files(tmp_path / "test" / "cafe\u0301", first=20)
    image_files(tmp_path / "test" / "bar", first=30)
    dataset = folder(tmp_path)
    assert dataset.train.class_names == ("bar", "caf\u00e9") and np.bincount(dataset.test.labels).tolist() == [4, 4]


def test_names_in_latin_1_are_read(tmp_path: Path) -> None:
    for name in (b"caf\xe9", b"bar"):
        image_files(Path(os.fsdecode(os.fsencode(tmp_path / "set") + b"/" + name)))
    assert folder(tmp_path / "set").train.class_names == ("bar", "caf\u00e9")


def test_a_test_part_that_links_to_train_is_none(tmp_path: Path) -> None:
    class_folders(tmp_path / "train")
    (tmp_path / "test").symlink_to(tmp_path / "train")
    with pytest.raises(DataError, match=r"test holds only links to images of .*train; add others"):
        folder(tmp_path)


def test_the_suffix_says_nothing_about_the_format(tmp_path: Path) -> None:
    for name in ("a", "b"):
        image_files(tmp_path / name, 3, suffix=".JPG")  # they are PNG
    assert len(folder(tmp_path).train) == 4


def test_parts_inside_of_a_part_are_no_classes(tmp_path: Path) -> None:
    class_folders(tmp_path / "train" / "train")
    class_folders(tmp_path / "train" / "test", first=50)
    with pytest.raises(DataError, match=r"train has the folders test, train, which are parts rather than classes"):
        folder(tmp_path)
    assert right(folder(tmp_path / "train", image_size=16))


def test_parts_in_different_folders_do_not_make_classes_of_these(tmp_path: Path) -> None:
    class_folders(tmp_path / "data" / "train")
    class_folders(tmp_path / "more" / "test", first=50)
    with pytest.raises(DataError, match=r"more/test and .*data/train are parts by their names, but lie in different"):
        folder(tmp_path)


@pytest.mark.parametrize("names", [("fold1", "fold2"), ("labelled", "pseudo"), ("entrenamiento", "prueba")])
def test_classes_with_folders_of_the_same_names_cause_a_warning(
    tmp_path: Path, names: tuple[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    for number, name in enumerate(names):
        class_folders(tmp_path / name, first=50 * number)
    assert folder(tmp_path).train.class_names == names
    assert f"the classes are {', '.join(names)}; each holds the folders a, b, c, which are ignored" in caplog.text


def test_folders_of_different_names_below_classes_are_not_mentioned(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class_folders(tmp_path / "cat", ("left", "right"))
    class_folders(tmp_path / "dog", ("left", "front"), first=50)
    folder(tmp_path)
    assert not caplog.text


@pytest.mark.parametrize("above", ["", "train"])
@pytest.mark.parametrize("masks", ["masks", "Labels", "segmentation_masks"])
def test_images_beside_their_masks_are_no_two_classes(tmp_path: Path, above: str, masks: str) -> None:
    class_folders(tmp_path / above, ("images", masks))
    if above:
        class_folders(tmp_path / "test", ("images", masks), first=50)
    with pytest.raises(DataError, match=rf"has the folders images and {masks}, which are images and their masks"):
        folder(tmp_path)


@pytest.mark.parametrize("names", [("mask", "no_mask"), ("photo", "sketch"), ("images", "videos")])
def test_masks_and_photographs_may_be_classes(tmp_path: Path, names: tuple[str, str]) -> None:
    class_folders(tmp_path, names)
    assert folder(tmp_path).train.class_names == names


def test_archives_and_files_in_place_of_the_folder_are_named(tmp_path: Path) -> None:
    archive = tmp_path / "set" / "train.ZIP"
    archive.parent.mkdir()
    archive.write_bytes(b"PK")
    with pytest.raises(DataError, match=r"not read: 1 archives, which must be unpacked first \(train\.ZIP\)"):
        folder(archive.parent)
    with pytest.raises(DataError, match=r"train\.ZIP' is a file, .* must be a folder here; unpack it"):
        folder(archive)
    image_files(tmp_path / "set", 1)
    image = next((tmp_path / "set").glob("*.png"))
    with pytest.raises(DataError, match="is a file, and data.path must be a folder here; give the folder above it"):
        folder(image)


def test_what_git_lfs_has_not_downloaded_is_named(tmp_path: Path) -> None:
    class_folders(tmp_path)
    (tmp_path / "a" / "000.png").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(DataError, match=r"a/000\.png is a pointer of Git LFS; run `git lfs pull`"):
        folder(tmp_path)


def test_suffixes_of_jpeg_2000_in_any_case(tmp_path: Path) -> None:
    for name in ("a", "b"):
        for number, suffix in enumerate((".jp2", ".JPF", ".jpc", ".J2C")):
            image_files(tmp_path / name, 1, first=number, suffix=suffix)
    assert len(folder(tmp_path, test_fraction=0.25).train) == 6
