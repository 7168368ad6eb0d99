from __future__ import annotations

import gzip
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import ViTImageProcessor

from geta_hf import GETAError
from geta_hf.recipes import image_data
from geta_hf.recipes.image_data import DataArguments, Images, Rows
from tests.recipes.pictures import CLASSES, SIDE, picture, write_folder, write_idx

PLAIN = DataArguments(train_dir="x")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("images") / "train", 4)


@pytest.fixture(scope="module")
def idx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_idx(tmp_path_factory.mktemp("idx"), 6)


def processor(channels: int = 3) -> Any:
    half = [0.5] * channels
    return ViTImageProcessor(size={"height": SIDE, "width": SIDE}, image_mean=half, image_std=half)


def expected(image: Image.Image) -> Tensor:
    pixels = torch.from_numpy(np.array(image, dtype=np.float32))
    pixels = pixels[..., None] if pixels.dim() == 2 else pixels
    return (pixels.permute(2, 0, 1) / 255 - 0.5) / 0.5


def test_a_folder_of_classes(folder: Path) -> None:
    (folder / "level" / "notes.txt").write_text("no image")
    (folder / "stray.png").write_text("in no class")
    found = image_data.read_folder(folder)
    assert list(found.classes) == list(CLASSES) and list(found.labels) == [0] * 4 + [1] * 4
    assert found.names[5] == "upright/1.png"
    row = Rows(found, processor(), PLAIN, 3)[5]
    assert row["labels"] == 1
    torch.testing.assert_close(row["pixel_values"], expected(picture(1, 101)))


def test_idx_files_with_and_without_gz(idx: Path) -> None:
    data = DataArguments(idx_dir=str(idx))
    train, test = (image_data.load_images(data, part) for part in ("train", "eval"))
    assert (len(train), list(train.labels), list(train.classes)) == (6, [0, 1] * 3, ["0", "1"])
    row = Rows(test, processor(1), data, 1)[3]
    torch.testing.assert_close(row["pixel_values"], expected(picture(1, 1003, "L")))
    # One channel becomes three equal ones where that is asked for.
    row = Rows(test, processor(), replace(data, image_mode="RGB"), 3)[3]
    torch.testing.assert_close(row["pixel_values"], expected(picture(1, 1003, "L")).expand(3, -1, -1))


def test_rows_of_datasets() -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"img": datasets.Image(), "kind": datasets.ClassLabel(names=list(CLASSES))})
    rows = datasets.Dataset.from_dict({"img": [picture(0, 1), picture(1, 2)], "kind": [0, 1]}, features=features)
    found = image_data.from_rows(rows, "mine")
    assert list(found.classes) == list(CLASSES) and list(found.labels) == [0, 1]
    assert found.open(1).tobytes() == picture(1, 2).tobytes()
    with pytest.raises(GETAError, match=r"mine has no column 'image'; set image_column to one of img, kind"):
        image_data.from_rows(rows, "mine", "image")
    with pytest.raises(GETAError, match=r"mine has 0 columns of type ClassLabel; set label_column to one of img, kind"):
        image_data.from_rows(rows.cast_column("kind", datasets.Value("int64")), "mine")
    plain = image_data.from_rows(rows.cast_column("kind", datasets.Value("int64")), "mine", label_column="kind")
    assert list(plain.classes) == ["0", "1"]


def test_a_sample_is_random_repeatable_and_never_empty(folder: Path) -> None:
    images = image_data.read_folder(folder)
    assert images.sample(3, 1).names == images.sample(3, 1).names
    assert {name for seed in range(20) for name in images.sample(3, seed).names} == set(images.names)
    assert images.sample(None, 0) is images and images.sample(99, 0) is images
    chosen = images.sample(3, 1)
    assert chosen.open(2).tobytes() == images.open(images.names.index(chosen.names[2])).tobytes()
    with pytest.raises(GETAError, match="a sample of 0 images is empty"):
        images.sample(0, 0)


def test_corrupt_images_are_named_counted_and_skipped_on_request(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_folder(tmp_path / "train", 4)
    (folder / "level" / "1.png").write_bytes(b"no image")
    whole = (folder / "upright" / "2.png").read_bytes()
    (folder / "upright" / "2.png").write_bytes(whole[: len(whole) // 2])  # its header can be read
    images = image_data.read_folder(folder)
    with pytest.raises(GETAError, match=r"2 of 8 images are corrupt: level/1.png, upright/2.png; .*--skip_corrupt"):
        image_data.usable(images, PLAIN, 3)
    kept = image_data.usable(images, replace(PLAIN, skip_corrupt=True), 3)
    assert "2 of 8 images are corrupt: level/1.png, upright/2.png; left out" in caplog.text
    assert len(kept) == 6 and not {"level/1.png", "upright/2.png"} & set(kept.names)
    assert [kept.labels[i] for i in range(6)] == [0, 0, 0, 1, 1, 1]
    # Without the check before training, the run stops at the image, by its name.
    assert image_data.usable(images, replace(PLAIN, check_images=False), 3) is images
    with pytest.raises(GETAError, match=r"level/1.png is corrupt \(Unid.*--check_images true --skip_corrupt"):
        Rows(images, processor(), PLAIN, 3)[1]
    broken = images.select([1, 6])
    with pytest.raises(GETAError, match=r"2 of 2 images are corrupt.*no image remains"):
        image_data.usable(broken, replace(PLAIN, skip_corrupt=True), 3)
    many = images.select([1] * 7)
    with pytest.raises(GETAError, match=r"7 of 7 images are corrupt: .* and 2 more; remove"):
        image_data.usable(many, PLAIN, 3)


@pytest.mark.parametrize(
    ("mode", "channels", "message"),
    [
        ("L", 3, r"image level/0.png has 1 channel \(mode L\), but the model takes 3; pass --image_mode RGB"),
        ("RGB", 1, r"has 3 channels \(mode RGB\), but the model takes 1; pass --image_mode L"),
        ("RGBA", 3, r"has 4 channels"),
        ("P", 1, r"\(mode P\)"),
    ],
)
def test_channels_that_are_not_the_models(mode: str, channels: int, message: str, tmp_path: Path) -> None:
    images = image_data.read_folder(write_folder(tmp_path / "train", 1, mode))
    with pytest.raises(GETAError, match=message):
        image_data.usable(images, PLAIN, channels)
    with pytest.raises(GETAError, match=message):
        Rows(images, processor(channels), PLAIN, channels)[0]
    asked = replace(PLAIN, image_mode="L" if channels == 1 else "RGB")
    assert Rows(image_data.usable(images, asked, channels), processor(channels), asked, channels)[0][
        "pixel_values"
    ].shape == (channels, SIDE, SIDE)


def test_damaged_idx_files(idx: Path, tmp_path: Path) -> None:
    with pytest.raises(GETAError, match=r"has neither train-images-idx3-ubyte\.gz nor"):
        image_data.read_idx(tmp_path, "train")
    copied = write_idx(tmp_path, 6)
    labels, images = copied / "train-labels-idx1-ubyte", copied / "train-images-idx3-ubyte.gz"
    whole = labels.read_bytes()
    for damaged in (whole[:-1], whole + b"\0", b"\0\0\x0d" + whole[3:], b"", b"\0\0\x08"):
        labels.write_bytes(damaged)
        with pytest.raises(GETAError, match="is no idx file of bytes, or is damaged"):
            image_data.read_idx(copied, "train")
    labels.write_bytes(b"\0\0\x08\x01\0\0\0\x05" + whole[8:-1])
    with pytest.raises(GETAError, match=r"images of shape \(6, 16, 16\) do not go with labels of shape \(5,\)"):
        image_data.read_idx(copied, "train")
    packed = images.read_bytes()
    for cut in (packed[:-20], packed[:20] + b"\xff" * 20 + packed[40:], b"plain"):
        images.write_bytes(cut)
        with pytest.raises(GETAError, match="can't be unpacked"):
            image_data.read_idx(copied, "train")
    images.write_bytes(gzip.compress(b"\0\0\x08\x03" + b"\0" * 12))
    with pytest.raises(GETAError, match="is no idx file of bytes"):
        image_data.read_idx(copied, "train")


def test_folders_that_hold_no_data(tmp_path: Path) -> None:
    with pytest.raises(GETAError, match="no such folder of images"):
        image_data.read_folder(tmp_path / "none")
    with pytest.raises(GETAError, match="has no folder for a class"):
        image_data.read_folder(tmp_path)
    (tmp_path / "cat").mkdir()
    with pytest.raises(GETAError, match=r"cat has no image \(\.bmp"):
        image_data.read_folder(tmp_path)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "no images: give dataset_name"),
        ({"idx_dir": "a", "train_dir": "b"}, "give one source of images"),
        ({"train_dir": "b"}, "eval_dir is missing"),
        ({"augmentation": "mirror"}, "must be one of none, shift_flip"),
        ({"image_mode": "CMYK"}, "image_mode = 'CMYK' must be one of RGB, L, or null"),
        ({"image_size": 0}, "at least 1 pixel"),
        ({"random_erasing": 1.5}, "is a probability"),
        ({"mixup": -1.0}, "must be 0 or a positive number"),
        ({"check_images": False, "skip_corrupt": True}, "skip_corrupt needs check_images"),
    ],
)
def test_contradictions(given: dict[str, Any], message: str) -> None:
    with pytest.raises(GETAError, match=message):
        image_data.load_images(DataArguments(**given), "eval")


def test_local_images_take_the_place_of_a_configs_data_set(folder: Path) -> None:
    data = DataArguments(dataset_name="uoft-cs/cifar10", train_dir=str(folder), eval_dir=str(folder))
    assert data.is_local and list(image_data.load_images(data, "eval").classes) == list(CLASSES)


def test_classes_that_differ(folder: Path, idx: Path) -> None:
    mine, numbers = image_data.read_folder(folder), image_data.read_idx(idx, "train")
    image_data.check_classes(mine, mine)
    image_data.check_classes(numbers, replace(numbers, classes=["0", "1", "2"]))  # the largest label did not occur
    with pytest.raises(GETAError, match=r"2 classes and .* has 3; only one of them has \['aside'\]"):
        image_data.check_classes(mine, replace(mine, classes=[*CLASSES, "aside"]))
    with pytest.raises(GETAError, match="give both the same classes"):
        image_data.check_classes(mine, numbers)


def test_mixup_mixes_images_and_labels_by_the_same_share(folder: Path) -> None:
    images = image_data.read_folder(folder)
    data = replace(PLAIN, mixup=1.0)
    rows, plain = Rows(images, processor(), data, 3, training=True), Rows(images, processor(), PLAIN, 3)
    torch.manual_seed(0)
    shares = []
    for _ in range(8):
        row = rows[0]
        assert float(row["labels"].sum()) == pytest.approx(1)
        share = float(row["labels"][0])
        # Whichever the partner was: the mixture of some pair must be this image, by this share.
        if share < 1:
            gaps = [
                row["pixel_values"] - share * plain[0]["pixel_values"] - (1 - share) * plain[other]["pixel_values"]
                for other in range(4, 8)
            ]
            assert min(float(gap.abs().max()) for gap in gaps) < 1e-5
        shares.append(share)
    assert len(set(shares)) > 2
    assert Rows(images, processor(), data, 3)[0]["labels"] == 0  # never in evaluation


def test_shift_and_flip_moves_an_image_and_keeps_its_values() -> None:
    torch.manual_seed(0)
    image = torch.arange(1.0, 33).expand(1, 32, 32) * torch.arange(1.0, 33)[:, None]
    seen = set()
    for _ in range(60):
        moved = image_data.shift_and_flip(image)
        assert moved.shape == image.shape
        seen.add((float(moved[0, 5, 5]), float(moved[0, 5, 6])))
        assert int((moved != 0).sum()) >= 28 * 28  # at most 4 pixels of each side moved out
        assert set(moved.unique().tolist()) <= {0.0, *image.unique().tolist()}
    assert len(seen) > 20


class _Fake:
    do_center_crop = True

    def __init__(self) -> None:
        self.size, self.crop_size = {"shortest_edge": 256}, {"height": 224, "width": 224}


def test_another_size_keeps_what_a_processor_crops_away() -> None:
    cropping = _Fake()
    image_data.set_side(cropping, 112)
    assert (cropping.size, cropping.crop_size) == ({"shortest_edge": 128}, {"height": 112, "width": 112})
    assert image_data.image_side(cropping) == (112, 112)
    edge = _Fake()
    edge.do_center_crop = False
    image_data.set_side(edge, 64)
    assert edge.size == {"shortest_edge": 64} and image_data.image_side(edge) == (64, 64)
    square = processor()
    image_data.set_side(square, 8)
    assert image_data.image_side(square) == (8, 8)
    images = Images("one", ["a"], [0], ["x"], lambda _: picture(0, 1))
    assert Rows(images, square, PLAIN, 3)[0]["pixel_values"].shape == (3, 8, 8)


def test_a_processor_gets_memory_that_it_may_write_to() -> None:
    """Those of torchvision make a tensor of it, and warn otherwise."""
    seen = []

    def note(array: Any, **_: Any) -> dict[str, list[Tensor]]:
        seen.append(array)
        return {"pixel_values": [torch.from_numpy(array).permute(2, 0, 1)]}

    images = Images("one", ["a"], [0], ["x"], lambda _: picture(0, 1))
    assert Rows(images, note, PLAIN, 3)[0]["pixel_values"].shape == (3, SIDE, SIDE)
    assert seen[0].flags.writeable


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("changes", "changed"),
    [
        ({"augmentation": "resized_crop"}, True),
        ({"augmentation": "randaugment"}, True),
        ({"random_erasing": 1.0}, True),
        ({"augmentation": "randaugment", "random_erasing": 0.5, "mixup": 0.2}, True),
        ({}, False),
    ],
)
def test_augmentations_of_torchvision(channels: int, changes: dict[str, Any], changed: bool) -> None:
    pytest.importorskip("torchvision")
    mode = "L" if channels == 1 else "RGB"
    images = Images("two", ["a", "b"], [0, 1], CLASSES, lambda index: picture(index, 1).convert(mode))
    data = replace(PLAIN, **changes)
    rows, plain = (
        Rows(images, processor(channels), data, channels, training=True),
        Rows(images, processor(channels), data, channels),
    )
    torch.manual_seed(0)
    seen = [rows[0]["pixel_values"] for _ in range(6)]
    assert all(pixels.shape == (channels, SIDE, SIDE) and pixels.isfinite().all() for pixels in seen)
    # Every time another image in training, always the same one in evaluation.
    assert (len({pixels.numpy().tobytes() for pixels in seen}) > 3) == changed
    assert torch.equal(plain[0]["pixel_values"], plain[0]["pixel_values"])


def test_without_torchvision_its_augmentations_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torchvision.transforms", None)
    for data in (replace(PLAIN, augmentation="randaugment"), replace(PLAIN, random_erasing=0.1)):
        with pytest.raises(GETAError, match=r"need torchvision .*geta_hf\[vision\]"):
            image_data.augmenters(data, (8, 8))
