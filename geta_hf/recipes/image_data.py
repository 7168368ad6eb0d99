"""Read labelled images from the Hub, from folders of classes or from idx files, and turn them into rows of a model."""

from __future__ import annotations

import gzip
import io
import logging
import math
import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from geta_hf import GETAError
from geta_hf.recipes.arguments import check_choices

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger(__name__)

Augmentation = Literal["none", "shift_flip", "resized_crop", "randaugment"]
ImageMode = Literal["RGB", "L"]
SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
_NAMED = 5  # corrupt images that a message names; further ones are only counted
_SHIFT = 4  # pixels of padding for CIFAR's crops, at 32 pixels
_IDX_FILES = {"train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")}
_IDX_FILES["eval"] = ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


@dataclass
class DataArguments:
    """Choose the images to train and to evaluate on, and how they are read."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "a Hub data set with images and labels, unless local ones are given"}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "its configuration, if it has several"})
    train_split: str = field(default="train", metadata={"help": "split of the Hub data set to train on"})
    eval_split: str = field(default="validation", metadata={"help": "split of the Hub data set to evaluate on"})
    image_column: str | None = field(default=None, metadata={"help": "default: the only column of images"})
    label_column: str | None = field(default=None, metadata={"help": "default: the only column of classes"})
    train_dir: str | None = field(default=None, metadata={"help": "folder with one folder of images for each class"})
    eval_dir: str | None = field(default=None, metadata={"help": "the same for evaluation, with the same classes"})
    idx_dir: str | None = field(default=None, metadata={"help": "folder with the four idx files of MNIST's names"})
    image_mode: ImageMode | None = field(
        default=None,
        metadata={"help": "convert every image to color or gray; default: images must have the model's channels"},
    )
    image_size: int | None = field(default=None, metadata={"help": "pixels of a side; default: the processor's"})
    augmentation: Augmentation = field(
        default="none",
        metadata={"help": "none is the processor alone; resized_crop (with flips) and randaugment are torchvision's"},
    )
    random_erasing: float = field(default=0.0, metadata={"help": "probability of erasing a rectangle; torchvision"})
    mixup: float = field(default=0.0, metadata={"help": "alpha of mixup's Beta distribution; 0 mixes nothing"})
    max_train_images: int | None = field(default=None, metadata={"help": "size of a random sample; default: all"})
    max_eval_images: int | None = field(default=None, metadata={"help": "size of a random sample; default: all"})
    sample_seed: int = field(default=0, metadata={"help": "seed of both samples"})
    check_images: bool = field(
        default=True, metadata={"help": "decode all images before training; otherwise a corrupt one stops it"}
    )
    skip_corrupt: bool = field(default=False, metadata={"help": "leave corrupt images out, named and counted"})

    def __post_init__(self) -> None:
        check_choices(self)
        if self.image_size is not None and self.image_size < 1:
            raise GETAError(f"image_size = {self.image_size} must be at least 1 pixel")
        if not 0 <= self.random_erasing <= 1:
            raise GETAError(f"random_erasing = {self.random_erasing} is a probability: give a number in [0, 1]")
        if not 0 <= self.mixup < math.inf:
            raise GETAError(f"mixup = {self.mixup} must be 0 or a positive number, such as 0.2")
        if self.skip_corrupt and not self.check_images:
            raise GETAError("skip_corrupt needs check_images, which finds the corrupt images")

    @property
    def is_in_folders(self) -> bool:
        """Return whether the images are in folders of classes."""
        return self.train_dir is not None or self.eval_dir is not None

    @property
    def is_local(self) -> bool:
        """Return whether the images are local, in which case `dataset_name`, a config's, is not read."""
        return self.idx_dir is not None or self.is_in_folders


@dataclass(frozen=True)
class Images:
    """Hold labelled images that are decoded when they are asked for.

    Attributes:
        source: name of the data, for messages and the model card.
        names: of each image, for messages.
        labels: index into `classes` of each image.
        classes: names of the classes.
        opener: returns an image by its position; what it raises shows that the image is corrupt.
    """

    source: str
    names: Sequence[str]
    labels: Sequence[int]
    classes: Sequence[str]
    opener: Callable[[int], Image.Image]

    def __len__(self) -> int:
        return len(self.labels)

    def open(self, index: int) -> Image.Image:
        """Return an image, decoded. Raise GETAError with its name if that fails."""
        try:
            image = self.opener(index)
            image.load()
        except Exception as error:  # Pillow's decoders raise errors of many kinds for damaged files
            reason = " ".join(str(error).split())[:200]
            raise GETAError(
                f"{self.source}: image {self.names[index]} is corrupt ({type(error).__name__}: {reason}); remove it, "
                f"or pass --check_images true --skip_corrupt, which find and leave out such images before training"
            ) from error
        return image

    def select(self, chosen: Sequence[int]) -> Images:
        """Return some of the images, in the given order."""
        return Images(
            self.source,
            [self.names[index] for index in chosen],
            [self.labels[index] for index in chosen],
            self.classes,
            lambda index: self.opener(chosen[index]),
        )

    def sample(self, limit: int | None, seed: int) -> Images:
        """Return a random sample of at most `limit` images, in the order of the data; all where it is None."""
        if limit is None or limit >= len(self):
            return self
        if limit < 1:
            raise GETAError(f"a sample of {limit} images is empty; give 1 or more")
        return self.select(sorted(random.Random(seed).sample(range(len(self)), limit)))


# ---------------------------------------------------------------------------------------------------------- sources


def load_images(data: DataArguments, part: str) -> Images:
    """Return the images to train on (`part="train"`) or to evaluate on (`part="eval"`), without reading them.

    Raises:
        GETAError: no data or several sources, or files that are missing, empty or damaged.
    """
    folder = data.train_dir if part == "train" else data.eval_dir
    if data.idx_dir is not None and data.is_in_folders:
        raise GETAError("give one source of images: idx_dir, or train_dir with eval_dir")
    if data.idx_dir is not None:
        return read_idx(Path(data.idx_dir), part)
    if data.is_in_folders:
        if folder is None:
            raise GETAError(f"{part}_dir is missing: give the folders train_dir and eval_dir")
        return read_folder(Path(folder))
    if data.dataset_name is None:
        raise GETAError("no images: give dataset_name (such as `uoft-cs/cifar10`), train_dir with eval_dir, or idx_dir")
    return _hub(data, data.train_split if part == "train" else data.eval_split)


def read_folder(folder: Path) -> Images:
    """Return the images of a folder that has one folder for each class; files that are no images are left out.

    Raises:
        GETAError: no such folder, no class, or a class without an image.
    """
    if not folder.is_dir():
        raise GETAError(f"{folder}: no such folder of images")
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise GETAError(f"{folder} has no folder for a class; put the images of each class into one of its name")
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        own = sorted(path for path in (folder / name).rglob("*") if path.suffix.lower() in SUFFIXES)
        if not own:
            raise GETAError(f"{folder / name} has no image ({', '.join(sorted(SUFFIXES))}); fill it or remove it")
        files += own
        labels += [label] * len(own)

    def load(index: int) -> Image.Image:
        # By its bytes: Pillow leaves the file of a damaged image open.
        return _pillow().open(io.BytesIO(files[index].read_bytes()))

    return Images(str(folder), [str(path.relative_to(folder)) for path in files], labels, classes, load)


def read_idx(folder: Path, part: str) -> Images:
    """Return the images of idx files, as MNIST and Fashion-MNIST have them, plain or with .gz.

    Args:
        folder: that holds the four files under MNIST's names.
        part: `train` or `eval`.

    Raises:
        GETAError: a missing or damaged file, or numbers of images and labels that differ.
    """
    pixels, labels = (_idx(folder, name) for name in _IDX_FILES[part])
    if pixels.ndim != 3 or labels.ndim != 1 or len(pixels) != len(labels):
        raise GETAError(
            f"{folder}: images of shape {pixels.shape} do not go with labels of shape {labels.shape}; both files must "
            f"be of one data set"
        )
    classes = [str(label) for label in range(int(labels.max()) + 1)]

    def load(index: int) -> Image.Image:
        return _pillow().fromarray(pixels[index])

    return Images(
        str(folder), [f"{_IDX_FILES[part][0]}[{i}]" for i in range(len(labels))], labels.tolist(), classes, load
    )


def _idx(folder: Path, name: str) -> np.ndarray[Any, Any]:
    path = next((path for path in (folder / f"{name}.gz", folder / name) if path.is_file()), None)
    if path is None:
        raise GETAError(f"{folder} has neither {name}.gz nor {name}")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise GETAError(f"{path} can't be unpacked ({error}); download it again") from error
    # Two zero bytes, the type (8 is uint8), the number of dims, then each size as a big-endian integer.
    dims = content[3] if len(content) > 3 else 0
    shape = np.frombuffer(content, ">u4", dims, 4).tolist() if len(content) >= 4 + 4 * dims else []
    if content[:3] != b"\0\0\x08" or not shape or 0 in shape or len(content) != 4 + 4 * dims + math.prod(shape):
        raise GETAError(f"{path} is no idx file of bytes, or is damaged; download it again")
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dims).reshape(shape)


def _hub(data: DataArguments, split: str) -> Images:
    try:
        import datasets
    except ImportError as error:
        raise GETAError("dataset_name needs `pip install datasets`; or give train_dir and eval_dir") from error
    try:
        rows = datasets.load_dataset(str(data.dataset_name), data.dataset_config, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error.__cause__ or error).split())[:500]
        raise GETAError(f"{data.dataset_name}, split {split}, can't be read: {reason}") from error
    return from_rows(rows, f"{data.dataset_name}, {split}", data.image_column, data.label_column)


def from_rows(rows: Any, source: str, image_column: str | None = None, label_column: str | None = None) -> Images:
    """Return the images of a `datasets.Dataset`.

    Args:
        rows: with a column of images and one of classes.
        source: name of the data.
        image_column, label_column: needed where there are several such columns, or labels are plain integers.

    Raises:
        GETAError: a column that does not exist, or none or several to choose from.
    """
    import datasets

    images = image_column or _only(rows, source, datasets.Image, "image_column")
    labels = label_column or _only(rows, source, datasets.ClassLabel, "label_column")
    for name, column in (("image_column", images), ("label_column", labels)):
        if column not in rows.features:
            raise GETAError(f"{source} has no column {column!r}; set {name} to one of {', '.join(rows.features)}")
    values = rows[labels][:]
    if not len(values) or not all(isinstance(value, int) and value >= 0 for value in values):
        raise GETAError(f"{source}: column {labels!r} must hold a class, an integer from 0, for each of at least 1 row")
    names = getattr(rows.features[labels], "names", None) or [str(label) for label in range(max(values) + 1)]
    # Undecoded, so that a damaged image is named and not an error of the table it is stored in.
    stored = rows.cast_column(images, datasets.Image(decode=False))

    def load(index: int) -> Image.Image:
        entry = stored[index][images]
        content = Path(entry["path"]).read_bytes() if entry["bytes"] is None else entry["bytes"]
        return _pillow().open(io.BytesIO(content))

    return Images(source, [f"row {index}" for index in range(len(values))], values, names, load)


def _only(rows: Any, source: str, kind: type, option: str) -> str:
    found = [name for name, feature in rows.features.items() if isinstance(feature, kind)]
    if len(found) == 1:
        return found[0]
    raise GETAError(
        f"{source} has {len(found)} columns of type {kind.__name__}; set {option} to one of {', '.join(rows.features)}"
    )


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise GETAError("reading images needs `pip install geta_hf[vision]`") from error
    return Image


# ----------------------------------------------------------------------------------------------------------- checks


def check_classes(train: Images, test: Images) -> None:
    """Raise GETAError where the classes of two parts differ, since a model has one output for each class."""
    short, long = sorted((list(train.classes), list(test.classes)), key=len)
    # Classes that are only numbers end with the largest label that occurs.
    numbered = long == [str(label) for label in range(len(long))] and short == long[: len(short)]
    if short != long and not numbered:
        different = sorted(set(train.classes) ^ set(test.classes))[:_NAMED]
        raise GETAError(
            f"{train.source} has {len(train.classes)} classes and {test.source} has {len(test.classes)}; only one of "
            f"them has {different}: give both the same classes"
        )


def usable(images: Images, data: DataArguments, channels: int) -> Images:
    """Decode all images once and return those that can be used.

    Args:
        images: to check.
        data: with `check_images`, `skip_corrupt` and `image_mode`.
        channels: that the model takes.

    Raises:
        GETAError: a corrupt image without `skip_corrupt`, or one of another number of channels without `image_mode`;
            names it, and says how many there are.
    """
    if not data.check_images:
        return images
    corrupt: list[int] = []
    for index in range(len(images)):
        try:
            image = images.open(index)
        except GETAError:
            corrupt.append(index)
        else:
            check_channels(image, images, index, data, channels)
    if not corrupt:
        return images
    names = ", ".join(images.names[index] for index in corrupt[:_NAMED])
    rest = f" and {len(corrupt) - _NAMED} more" if len(corrupt) > _NAMED else ""
    counted = f"{images.source}: {len(corrupt)} of {len(images)} images are corrupt: {names}{rest}"
    if not data.skip_corrupt:
        raise GETAError(f"{counted}; remove them, or pass --skip_corrupt")
    if len(corrupt) == len(images):
        raise GETAError(f"{counted}; no image remains")
    logger.warning("%s; left out", counted)
    known = set(corrupt)
    return images.select([index for index in range(len(images)) if index not in known])


def check_channels(image: Image.Image, images: Images, index: int, data: DataArguments, channels: int) -> None:
    """Raise GETAError for an image whose number of channels is not the model's, without `image_mode`."""
    own = len(image.getbands())
    # The one band of a palette holds numbers of colors, which are no brightness.
    if data.image_mode is None and (own != channels or image.mode == "P"):
        mode = "L" if channels == 1 else "RGB"
        raise GETAError(
            f"{images.source}: image {images.names[index]} has {own} channel{'s' * (own != 1)} (mode {image.mode}), "
            f"but the model takes {channels}; pass --image_mode {mode} to convert every image"
        )


# ------------------------------------------------------------------------------------------------------------- rows


class Rows(Dataset[dict[str, Any]]):
    """Turn images into what an image classification model takes: `pixel_values` (channels, height, width), `labels`.

    With mixup, labels are the shares of all classes, float, shape (classes,); otherwise a class, int.

    Args:
        images: to read.
        processor: resizes and normalizes them.
        data: with `image_mode`, and in training with the augmentation and mixup.
        channels: that the model takes.
        training: whether to augment. Default False.
    """

    def __init__(
        self, images: Images, processor: Any, data: DataArguments, channels: int, training: bool = False
    ) -> None:
        self.images = images
        self.processor = processor
        self.data = data
        self.channels = channels
        self.mixup = data.mixup if training else 0.0
        self.before, self.after = augmenters(data, image_side(processor)) if training else ([], [])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pixels, label = self._pixels(index), self.images.labels[index]
        if not self.mixup:
            return {"pixel_values": pixels, "labels": label}
        # A partner for each image rather than for each batch: no collator has to know of it.
        other = int(torch.randint(len(self), ()))
        alpha = torch.tensor(float(self.mixup))
        share = float(torch.distributions.Beta(alpha, alpha).sample())
        shares = torch.zeros(len(self.images.classes))
        shares[label] += share
        shares[self.images.labels[other]] += 1 - share
        return {"pixel_values": share * pixels + (1 - share) * self._pixels(other), "labels": shares}

    def _pixels(self, index: int) -> Tensor:
        image = self.images.open(index)
        check_channels(image, self.images, index, self.data, self.channels)
        if self.data.image_mode is not None:
            image = image.convert(self.data.image_mode)
        for change in self.before:
            image = change(image)
        # A grayscale image has no dim of channels, which the processor can't tell from a size.
        # A copy: Pillow's own memory is read-only, of which torchvision's processors warn.
        array = np.array(image)
        array = array[..., None] if array.ndim == 2 else array
        pixels: Tensor = self.processor(array, return_tensors="pt", input_data_format="channels_last")["pixel_values"][
            0
        ]
        for change in self.after:
            pixels = change(pixels)
        return pixels


def image_side(processor: Any) -> tuple[int, int]:
    """Return height and width of what a processor makes; of the shortest edge twice where it keeps proportions."""
    size = dict(processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size)
    edge = size.get("shortest_edge")
    return (size["height"], size["width"]) if edge is None else (edge, edge)


def set_side(processor: Any, side: int) -> None:
    """Let a processor make images of `side` · `side` pixels, in place; what it crops away keeps its share."""
    square = {"height": side, "width": side}
    size = dict(processor.size)
    edge = size.get("shortest_edge")
    if getattr(processor, "do_center_crop", False):
        ratio = side / processor.crop_size["height"]
        processor.crop_size = square
        larger = {key: round(value * ratio) for key, value in size.items() if value is not None}
    else:
        larger = square if edge is None else {"shortest_edge": side}
    processor.size = larger


def augmenters(data: DataArguments, side: tuple[int, int]) -> tuple[list[Callable[..., Any]], list[Callable[..., Any]]]:
    """Return what changes an image at random before the processor, and its pixels afterwards.

    Args:
        data: with the choice.
        side: height and width of what the processor makes.

    Raises:
        GETAError: torchvision is needed and not installed.
    """
    if data.augmentation in ("none", "shift_flip") and not data.random_erasing:
        return [], [shift_and_flip] if data.augmentation == "shift_flip" else []
    try:
        from torchvision.transforms import v2
    except (ImportError, RuntimeError) as error:  # torchvision of another torch raises a RuntimeError
        raise GETAError(
            f"augmentation = {data.augmentation} and random_erasing need torchvision ({error}): `pip install "
            f"geta_hf[vision]`, or choose shift_flip"
        ) from error
    before: list[Callable[..., Any]] = []
    after: list[Callable[..., Any]] = [shift_and_flip] if data.augmentation == "shift_flip" else []
    if data.augmentation in ("resized_crop", "randaugment"):
        before = [v2.RandomResizedCrop(side, antialias=True), v2.RandomHorizontalFlip()]
    if data.augmentation == "randaugment":
        before.append(v2.RandAugment())
    if data.random_erasing:
        after.append(v2.RandomErasing(data.random_erasing))
    return before, after


def shift_and_flip(pixels: Tensor) -> Tensor:
    """Return an image moved by up to an eighth of its side in both directions and mirrored half of the time.

    These are CIFAR's crops: at 32 pixels, 4 of padding. What moves in is the processor's zero.

    Args:
        pixels: (channels, height, width).
    """
    height, width = pixels.shape[-2:]
    down, right = (max(1, round(size * _SHIFT / 32)) for size in (height, width))
    padded = torch.nn.functional.pad(pixels, (right, right, down, down))
    top, left = (int(torch.randint(2 * room + 1, ())) for room in (down, right))
    moved = padded[..., top : top + height, left : left + width]
    return moved.flip(-1) if torch.rand(()) < 0.5 else moved
