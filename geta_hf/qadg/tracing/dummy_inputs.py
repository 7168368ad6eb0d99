"""Make a model without weights, and a batch that it runs: all that the dependency graph needs of a checkpoint.

`empty_model` builds a model from its configuration on meta. `make_dummy_inputs` makes what its forward takes, in
transformers' own term "dummy inputs": text, pictures, sound or a time series, as the forward's signature asks.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.utils import ModelOutput

from geta_hf.errors import GETAError
from geta_hf.qadg.tracing.record_forward import record_forward
from geta_hf.quantization.experts import is_unstacked, unstack_experts
from geta_hf.utils.config_limits import check_counts
from geta_hf.utils.model_classes import find_model_class
from geta_hf.utils.process_state import exclusive

# For a configuration that names no class of its own: the first task that knows it. Models of several modalities come
# before text alone, and a plain trunk last.
_TASKS = (
    modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING,
    modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    modeling_auto.MODEL_FOR_MASKED_LM_MAPPING,
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
    modeling_auto.MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING,
    modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    modeling_auto.MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING,
    modeling_auto.MODEL_FOR_CTC_MAPPING,
    modeling_auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING,
    modeling_auto.MODEL_FOR_OBJECT_DETECTION_MAPPING,
    modeling_auto.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING,
    modeling_auto.MODEL_FOR_PRETRAINING_MAPPING,
    modeling_auto.MODEL_MAPPING,
)

_FACTORIES = (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn)
_RANDOM = (Tensor.normal_, Tensor.uniform_)
_RANGES = (torch.arange, torch.linspace, torch.logspace, torch.full, torch.eye)
_HUGE = 2**26  # elements; no buffer is that large
_LONG = 2**14  # elements; two vectors of so many together have no huge outer product
_LONGEST = 2**22  # the longest dimension of a parameter; a vocabulary has a million entries at most
_MANY_TENSORS = 2**18

_PIXELS = (64, 256)  # side of an image where the configuration names none: every common stride divides it
_SAMPLES = 4000  # a quarter of a second of sound at 16 kHz
_FRAMES = 64  # and as many of its spectra as common strides divide

Batch = dict[str, Tensor]


def empty_model(source: str | PreTrainedConfig) -> PreTrainedModel:
    """Build a Hugging Face model from its configuration alone; no weight is downloaded, stored or initialised.

    The class is the first of `config.architectures` that transformers has, else the one that the auto classes give.
    Code from the Hub is never run.

    Args:
        source: a Hub name, a local folder, a `config.json` file, or a configuration (which is not changed).

    Returns:
        The model in evaluation mode, tied as usual: parameters on meta, buffers real, on CPU.

    Raises:
        GETAError: the configuration cannot be found or reached, transformers has no class for it, it asks for more
            layers or larger tensors than any model has, or the class needs a package that is not there.
    """
    if isinstance(source, PreTrainedConfig):
        config = copy.deepcopy(source)
        check_counts(config.to_dict(), None, type(config).__name__)
    else:
        config = _load_config(source)
    return build_empty(_model_class(config), config)


def build_empty(model_class: type[PreTrainedModel], config: PreTrainedConfig, **options: Any) -> PreTrainedModel:
    """Build a model of a class from a configuration as `empty_model` does.

    Args:
        model_class: of transformers, or the user's own.
        config: which may be changed.
        options: for the constructor, such as `dtype`.

    Raises:
        GETAError: the class cannot be built from this configuration alone.
    """
    # Tensors are made on CPU, where buffers get their content, and a parameter goes to meta as soon as a module holds
    # it. Memory that is never written costs nothing, as long as the system grants it.
    try:
        with exclusive(), _Sized(), _without_weights():
            model = model_class._from_config(config, **options)
            if is_unstacked(config):
                unstack_experts(model)
    except GETAError:
        raise
    # A configuration that is damaged may fail anywhere in the code of its class.
    except Exception as error:
        raise GETAError(
            f"{model_class.__name__} cannot be built from its {type(config).__name__}: "
            f"{' '.join(str(error).split()).rstrip('.')}. Install what is missing, or correct the configuration"
        ) from error
    for name, parameter in model.named_parameters():
        if max(parameter.shape, default=0) > _LONGEST:
            raise GETAError(
                f"the configuration makes {name} a tensor of shape {tuple(parameter.shape)}, larger than that of any "
                f"model; correct the configuration"
            )
    model.tie_weights()
    return model.eval()


@contextmanager
def _without_weights() -> Iterator[None]:
    """Move every parameter to meta as a module gets it, and initialize none; models of other threads get theirs."""
    thread = threading.get_ident()
    usual = PreTrainedModel.init_weights

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or threading.get_ident() != thread:
            return None
        empty = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        vars(empty).update(vars(parameter))
        return empty

    def init_weights(model: PreTrainedModel) -> None:
        if threading.get_ident() != thread:
            usual(model)

    handle = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]
    PreTrainedModel.init_weights = init_weights  # type: ignore[method-assign]
    try:
        yield
    finally:
        PreTrainedModel.init_weights = usual  # type: ignore[method-assign]
        handle.remove()


class _Sized(TorchFunctionMode):
    """A mode that bounds what a model's constructor makes.

    Tensors that are too large for a buffer, such as all experts of a layer, are made on meta; what cannot be, and a
    number of tensors that no model has, is an error before it costs memory. Tensors that no module holds yet are not
    filled with random numbers either, which would take long.
    """

    def __init__(self) -> None:
        super().__init__()
        self._made = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _RANDOM:
            return args[0]
        if func in _FACTORIES and kwargs.get("device") is None:
            self._made += 1
            if self._made > _MANY_TENSORS:
                raise GETAError(f"the configuration makes more than {_MANY_TENSORS} tensors; correct it")
            # Sizes come in many forms, so they are read from the result, which costs nothing on meta.
            outline = func(*args, **kwargs | {"device": "meta"})
            if outline.numel() > _HUGE:
                return outline
        elif func in _RANGES or _is_long(args):
            _check_outline(func, args, kwargs)
        return func(*args, **kwargs)


def _is_long(args: Sequence[Any]) -> bool:
    """Return whether tensors are long enough that an outer product of them might be huge."""
    tensors = [part for part in args if isinstance(part, Tensor) and not part.is_meta]
    return sum(tensor.numel() for tensor in tensors) > _LONG


def _check_outline(func: Any, args: Any, kwargs: Any) -> None:
    """Raise GETAError if a call would make a huge tensor; found by running it on meta first."""
    try:
        on_meta = kwargs | {"device": "meta"} if func in _RANGES else kwargs
        outline = func(*(part.to("meta") if isinstance(part, Tensor) else part for part in args), **on_meta)
    except Exception:  # what depends on values has no outline
        return
    if isinstance(outline, Tensor) and outline.numel() > _HUGE:
        raise GETAError(
            f"the configuration makes a buffer of {outline.numel()} elements, larger than that of any model; correct "
            f"the configuration"
        )


def _load_config(source: str) -> PreTrainedConfig:
    try:
        # A configuration with code of its own could do anything as it is read.
        values, _ = PreTrainedConfig.get_config_dict(source)
        # Before the class sees it: many a class lists the types of its layers, be they a billion.
        check_counts(values, None, str(source))
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except GETAError:
        raise
    # A configuration that is damaged may fail anywhere in the code of its class.
    except Exception as error:
        raise GETAError(
            f"no configuration for {source!r}: {' '.join(str(error).split())} Pass a name on the Hub (which needs a "
            "network), a local folder or config.json whose model_type transformers knows, or a configuration object"
        ) from error


def _model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    # `architectures` names the class that was saved, hence the one with the head that was trained.
    for name in config.architectures or ():
        found = find_model_class(name)
        if found is not None:
            return found
    for task in _TASKS:
        known: Any = task.get(type(config), ())
        for found in known if isinstance(known, tuple) else (known,):
            return found
    raise GETAError(
        f"transformers {transformers.__version__} has no model class for {type(config).__name__} with architectures "
        f"{config.architectures}; build the model yourself and pass it with a batch"
    )


def make_dummy_inputs(model: PreTrainedModel, rows: int = 2, length: int = 8) -> Batch:
    """Make inputs that `model(**batch)` runs with, from what the model says of itself.

    What is needed follows from `main_input_name`, `input_modalities` and the forward's signature; sizes follow from
    the configuration; where it allows several layouts of pictures or sound, they are tried in turn, without computing
    with the parameters. Token ids are random but no special tokens; the last row of text ends in padding. A language
    model whose pictures come in no layout known here gets text alone, and its vision part is untouched.

    Args:
        model: any Hugging Face model, on any device or meta.
        rows: how many samples.
        length: how many tokens, where there is text.

    Returns:
        Keyword arguments of the forward, on CPU, floating-point ones in the model's dtype. The same at every call.

    Raises:
        GETAError: an argument is needed of which nothing is known; pass a batch of your own then.
    """
    return _Maker(model, rows, length).batch()


class _Maker:
    """The arguments of one model's forward, made from what its signature and its configuration say.

    Args:
        model: any Hugging Face model.
        rows: how many samples.
        length: how many tokens, where there is text.
    """

    def __init__(self, model: PreTrainedModel, rows: int, length: int) -> None:
        self.model = model
        self.rows = rows
        self.length = length
        self.config = model.config
        # Of its own, so that a batch is the same at every call and the caller's random numbers are not used up.
        self.generator = torch.Generator().manual_seed(0)
        self.arguments = inspect.signature(model.forward).parameters
        modalities = model.input_modalities
        self.modalities = {modalities} if isinstance(modalities, str) else set(modalities)
        self.main = model.main_input_name

    def batch(self) -> Batch:
        """Return all arguments."""
        batch = self.text() | self.series()
        if self.config.is_encoder_decoder and "decoder_input_ids" in self.arguments:
            batch["decoder_input_ids"] = self.token_ids(self.length)
        # Text alone is the last resort: a model that also reads sound would run it, with its encoder untouched.
        batch = self.with_pictures(batch) or self.first_that_runs([*self.with_sound(batch), batch])
        missing = [name for name, p in self.arguments.items() if _required(p) and name not in batch]
        if missing or not batch:
            raise GETAError(
                f"{type(self.model).__name__} needs {', '.join(missing) or self.main}, for which no example can be "
                f"made; pass a batch of your own (its forward takes {', '.join(self.arguments)})"
            )
        return batch

    def first_that_runs(self, candidates: list[Batch]) -> Batch:
        """Return the first batch that the forward takes, else the first with all it needs; an only one is not tried."""
        required = {name for name, p in self.arguments.items() if _required(p)}
        complete = []
        for candidate in candidates:
            has_main = self.main in candidate or not self.wants(self.main)
            if has_main and required <= candidate.keys():
                complete.append(candidate)
        # Trying takes a recording, and whoever uses an only one records it anyway, with a better error.
        if len(complete) > 1:
            for candidate in complete:
                if _runs(self.model, candidate) is not None:
                    return candidate
        return _first(complete, {})

    def wants(self, name: str) -> bool:
        """Return whether the forward cannot do without this argument."""
        return name in self.arguments and (name == self.main or _required(self.arguments[name]))

    def takes(self, name: str, modality: str) -> bool:
        """Return whether the forward has this argument and the model makes use of it."""
        return name in self.arguments and (self.wants(name) or modality in self.modalities)

    def text(self) -> Batch:
        """Return token ids and their mask, the last row padded; where words have places on a page, these too."""
        if not self.takes("input_ids", "text"):
            return {}
        ids = self.token_ids(self.length)
        mask = torch.ones_like(ids)
        # Padding, since the code that handles it may be another path, and training has it.
        padding = self.length // 4
        if padding:
            mask[-1, -padding:] = 0
            ids[-1, -padding:] = self.padding_token()
        batch = {"input_ids": ids}
        if "attention_mask" in self.arguments:
            batch["attention_mask"] = mask
        if "bbox" in self.arguments:
            # Left, top, right, bottom: models take differences of these, which must not be negative.
            batch["bbox"] = torch.tensor([1, 2, 5, 7]).expand(self.rows, self.length, 4).contiguous()
        return batch

    def token_ids(self, length: int) -> Tensor:
        """Return random ordinary tokens, of shape (rows, length)."""
        # Special ones have an effect: a picture's place is counted, and a decoder may stop at the end token.
        special = set(_special_tokens(self.config))
        ordinary = [token for token in range(min(self.vocabulary(), 1000)) if token not in special] or [0]
        chosen = torch.randint(len(ordinary), (self.rows, length), generator=self.generator)
        return torch.tensor(ordinary)[chosen]

    def vocabulary(self) -> int:
        """Return how many tokens every part of the model knows."""
        # A part with a configuration of its own, such as a decoder, may have another vocabulary, and ids have to be
        # valid in all.
        return min((size for size in _settings(self.config, "vocab_size") if isinstance(size, int)), default=2)

    def padding_token(self) -> int:
        """Return the one that the configuration names if it is inside the vocabulary, else 0."""
        return _first([token for token in _settings(self.config, "pad_token_id") if token < self.vocabulary()], 0)

    def noise(self, *shape: int) -> Tensor:
        """Return normal noise in the model's dtype."""
        return torch.randn(*shape, generator=self.generator).to(self.model.dtype)

    def with_pictures(self, text: Batch) -> Batch:
        """Return the text with pictures or clips in the first layout that the model takes; {} where there is none."""
        if self.main == "pixel_values_videos":
            return text | {self.main: self.noise(self.rows, self.frames(), self.channels(), *self.sizes()[0])}
        if not self.takes("pixel_values", "image"):
            return {}
        tokens = _settings(self.config, "image_token_id", "image_token_index")
        if not tokens:
            return self.first_that_runs([*(text | pictures for pictures in self.pictures([])), text])
        # Such a model replaces image tokens in the text, so the text needs exactly as many as the pictures give.
        for pictures in self.pictures([1, 2, 3, 5]):
            count = self.tokens_per_picture(pictures)
            if count is not None:
                return self.with_image_tokens(text, tokens[0], count) | pictures
        return text

    def pictures(self, several: list[int]) -> Iterator[Batch]:
        """Yield layouts of pictures: as patches, alone, as clips, and as tiles.

        Args:
            several: the numbers of tiles to try for each picture.
        """
        channels = self.channels()
        patch = _first([size for size in _settings(self.config, "patch_size") if isinstance(size, int)], 1)
        if "image_grid_thw" in self.arguments:
            # Rows of flattened patches, of all pictures one after the other; the grid (time, height, width) tells them
            # apart. A side has to be a multiple of the patches that are merged into one token.
            side = 2 * _first(_settings(self.config, "spatial_merge_size", "merge_size"), 1)
            depth = _first(_settings(self.config, "temporal_patch_size"), 1)
            yield {
                "pixel_values": self.noise(self.rows * side**2, channels * depth * patch**2),
                "image_grid_thw": torch.tensor([[1, side, side]] * self.rows),
            }
        if "spatial_shapes" in self.arguments:
            yield {
                "pixel_values": self.noise(self.rows, 16, channels * patch**2),
                "pixel_attention_mask": torch.ones(self.rows, 16, dtype=torch.long),
                "spatial_shapes": torch.tensor([[4, 4]] * self.rows),
            }
        clips = [self.frames()] if _settings(self.config, "num_frames") or "video" in self.modalities else []
        layouts: list[list[int]] = [[], *([count] for count in clips + several)]
        for frames, (height, width) in itertools.product(layouts, self.sizes()):
            # Shape (rows, channels, height, width), or (rows, frames or tiles, channels, height, width).
            batch = {"pixel_values": self.noise(self.rows, *frames, channels, height, width)}
            yield batch
            if "image_sizes" in self.arguments:
                yield batch | {"image_sizes": torch.tensor([[height, width]] * self.rows)}

    def tokens_per_picture(self, pictures: Batch) -> int | None:
        """Return how many image tokens the text must hold for each picture; None when this layout does not fit."""
        shapes = _runs(_ImageFeatures(self.model), pictures)
        if shapes is None:
            return None
        return sum(shape[:-1].numel() for shape in shapes) // self.rows

    def with_image_tokens(self, text: Batch, token: int, count: int) -> Batch:
        """Return the text with `count` image tokens in front of every row."""
        # In front, where no row is padded.
        front = torch.full((self.rows, count), token)
        ids = torch.cat([front, text["input_ids"]], dim=1)
        batch = text | {"input_ids": ids}
        if "attention_mask" in text:
            batch["attention_mask"] = torch.cat([torch.ones_like(front), text["attention_mask"]], dim=1)
        if "mm_token_type_ids" in self.arguments:
            batch["mm_token_type_ids"] = (ids == token).long()
        return batch

    def frames(self) -> int:
        """Return how many frames a clip has."""
        return _first(_settings(self.config, "num_frames", "frames_per_clip"), 4)

    def channels(self) -> int:
        """Return how many colours a picture has."""
        return _first(_settings(self.config, "num_channels", "in_channels", "in_chans"), 3)

    def sizes(self) -> list[tuple[int, int]]:
        """Return heights and widths to try."""
        size = _first(_settings(self.config, "image_size", "crop_size"), None)
        if size is None:
            return [(pixels, pixels) for pixels in _PIXELS]
        if isinstance(size, Mapping):
            return [(size["height"], size["width"])]
        return [(size[0], size[1]) if isinstance(size, list | tuple) else (size, size)]

    def with_sound(self, text: Batch) -> Iterator[Batch]:
        """Yield the text with spectra or waves in every layout that models take."""
        if self.wants("input_features"):
            masks = self.arguments.keys() & {"input_features_mask", "feature_attention_mask"}
            for shape in self.spectra():
                sound = {"input_features": self.noise(self.rows, *shape)}
                # Which of the two sizes is time is not known here, so a mask over each is tried, then none.
                for time in shape if masks else ():
                    yield text | sound | {mask: torch.ones(self.rows, time, dtype=torch.long) for mask in masks}
                yield text | sound
        if self.wants("input_values"):
            channels = [*_settings(self.config, "audio_channels"), 1]
            waves: list[tuple[int, ...]] = [(_SAMPLES,), *((count, _SAMPLES) for count in channels)]
            for layout in [*self.spectra(), *waves]:
                yield text | {"input_values": self.noise(self.rows, *layout)}

    def spectra(self) -> Iterator[tuple[int, int]]:
        """Yield layouts of spectra: time x bins and bins x time, as long as we like or as the model insists."""
        bins = _settings(
            self.config, "num_mel_bins", "feature_size", "input_feat_per_channel", "feature_projection_input_dim"
        )
        frames = _settings(self.config, "max_length")
        # Whisper's encoder halves the length by a stride, and takes only what fills all of its positions.
        doubled = [2 * positions for positions in _settings(self.config, "max_source_positions")]
        for time, count in itertools.product([_FRAMES, *frames, *doubled], bins):
            yield from ((time, count), (count, time))

    def series(self) -> Batch:
        """Return past values of a time series, where they alone are enough."""
        if not self.wants("past_values"):
            return {}
        past = _first(_settings(self.config, "context_length"), 16)
        channels = _settings(self.config, "num_input_channels", "input_size")
        return {"past_values": self.noise(self.rows, past, *channels[:1])}


class _ImageFeatures(nn.Module):
    """The part of a model that turns pictures into what takes the place of image tokens."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, **pictures: Tensor) -> Any:
        # Some classes with a head define it themselves, others rely on the model inside.
        owner: Any = self.model if "get_image_features" in dir(type(self.model)) else self.model.base_model
        features = owner.get_image_features(**pictures)
        return features["pooler_output"] if isinstance(features, ModelOutput) else features


def _runs(model: nn.Module, batch: Batch) -> list[torch.Size] | None:
    """Return the shapes of the outputs, or None when the forward refuses the batch."""
    try:
        graph = record_forward(model, batch)
    except GETAError:
        return None
    return [torch.Size(graph.values[position].shape) for position in graph.outputs]


def _required(parameter: inspect.Parameter) -> bool:
    named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    return named and parameter.default is parameter.empty


def _configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """Yield a configuration and those inside it, outermost first."""
    level = [config]
    while level:
        yield from level
        inner = (value for outer in level for value in vars(outer).values())
        level = [value for value in inner if isinstance(value, PreTrainedConfig)]


def _settings(config: PreTrainedConfig, *names: str) -> list[Any]:
    """Return the values that these fields have, earlier names first, then outer configurations first."""
    found = (getattr(inner, name, None) for name in names for inner in _configs(config))
    return [value for value in found if value is not None]


def _special_tokens(config: PreTrainedConfig) -> Iterator[int]:
    for inner in _configs(config):
        for name, value in vars(inner).items():
            if name.endswith(("_token_id", "_token_index")):
                yield from value if isinstance(value, list | tuple) else (value,)


def _first(values: list[Any], default: Any) -> Any:
    return values[0] if values else default
