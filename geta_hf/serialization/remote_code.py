"""Write the code that a folder carries, so that it loads where geta_hf is not installed: `trust_remote_code=True`.

The modules that read a folder are copied unchanged but for their imports of each other, which are made relative.
`modeling_geta.py` next to them names the model's classes for transformers' `auto_map`. A model whose class is this
package's own, as the recipes' ResNet-20 is, has the module of its class copied as well.

The copies are flat, all in the folder itself as `geta_<leaf of the module's name>.py`: transformers' download of remote
code follows relative imports between files of one folder and knows no packages. So the leaves in `CARRIED` must differ.
A folder reads itself with the code that it carries, so modules may be renamed without breaking folders of before.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.models.auto import modeling_auto
from transformers.utils import logging

from geta_hf.errors import GETAError

logger = logging.get_logger(__name__)

CARRIED = (
    "geta_hf.errors",
    "geta_hf.utils.config_limits",
    "geta_hf.quantization.maths",
    "geta_hf.quantization.fixed",
    "geta_hf.quantization.experts",
    "geta_hf.serialization.bitpack",
    "geta_hf.serialization.packed_layers",
    "geta_hf.serialization.checksums",
    "geta_hf.serialization.decode",
    "geta_hf.surgery.config_view",
    "geta_hf.surgery.fixes",
    "geta_hf.serialization.static_cache",
    "geta_hf.serialization.loader",
)
"""The modules that are copied, the loader last. They import only each other, torch, safetensors and transformers."""

MODELING = "modeling_geta"

_PACKAGE = __name__.partition(".")[0]

_OWN_IMPORT = re.compile(r"^(\s*from )(geta_hf[\w.]*)( import)", re.MULTILINE)


def save_compressed(model: PreTrainedModel, folder: Path, **kwargs: Any) -> None:
    """Save a compressed model with the code that loads it where geta_hf is not installed.

    A model whose class is neither transformers' nor this package's gets no code, with a warning: such a folder needs
    geta_hf, and the module that defines the class.

    Args:
        model: one with packed layers or a fix list, so that its `save_pretrained` writes geta_hf's format.
        folder: where it is saved; created if it does not exist.
        kwargs: for `save_pretrained`.
    """
    own = _known_class(type(model))
    if own is None:
        logger.warning(
            "%s is not a class of transformers; its folder loads only with geta_hf, where the module of the class is "
            "imported too",
            type(model).__name__,
        )
        model.save_pretrained(folder, **kwargs)
        return
    # Only while it is saved: a later save_pretrained of this model alone would name code that its folder lacks.
    model.config.auto_map = auto_map(model, own)
    try:
        model.save_pretrained(folder, **kwargs)
    finally:
        del model.config.auto_map
    for name, text in code_files(model, own).items():
        (folder / name).write_text(text, encoding="utf-8")


def auto_map(model: PreTrainedModel, own: type[PreTrainedModel]) -> dict[str, str]:
    """Return auto class -> class in the folder's code, for every auto class that offers this model or its base.

    AutoModel alone would not do: lm-eval and pipelines ask for the auto class of their task.

    Args:
        model: the model that is saved.
        own: its class in transformers or in this package.
    """
    found = {"AutoConfig": f"{MODELING}.{type(model.config).__name__}"}
    for auto, classes in _auto_classes(model.config):
        chosen = next((kind for kind in classes if kind in (own, _base_class(own))), None)
        if chosen is not None:
            found[auto] = f"{MODELING}.{chosen.__name__}"
    return found


def _auto_classes(config: Any) -> Iterator[tuple[str, tuple[type, ...]]]:
    """Yield every auto class that knows the config, with the model classes that it chooses from."""
    for name, auto in inspect.getmembers(modeling_auto, inspect.isclass):
        mapping = getattr(auto, "_model_mapping", None)
        if name.startswith("AutoModel") and mapping is not None and type(config) in mapping:
            classes = mapping[type(config)]
            yield name, classes if isinstance(classes, tuple) else (classes,)


def _known_class(kind: type) -> Any:
    """Return the class of transformers or of this package that computes what a model's class does; None if none does.

    A subclass that is made on the fly, as FSDP makes one, leaves the constructor and the forward as they are. One that
    changes them is another architecture, which a folder's code could not build.
    """
    places = ("transformers.models.", f"{_PACKAGE}.")
    found: Any = next((base for base in kind.__mro__ if base.__module__.startswith(places)), None)
    same = found is not None and all(getattr(kind, name) is getattr(found, name) for name in ("__init__", "forward"))
    return found if same else None


def _base_class(own: type[PreTrainedModel]) -> Any:
    """Return the class of the model without its head."""
    mapping: Any = modeling_auto.AutoModel._model_mapping
    classes = mapping.get(own.config_class, own)
    return classes[0] if isinstance(classes, tuple) else classes


def code_files(model: PreTrainedModel, own: type[PreTrainedModel]) -> dict[str, str]:
    """Return the files of code that a folder of this model carries: name -> text."""
    names = [*CARRIED, *sorted({kind.__module__ for kind in _classes(model, own) if _is_ours(kind)})]
    files = {f"{_flat(name)}.py": _relative(importlib.import_module(name)) for name in names}
    return {**files, f"{MODELING}.py": _modeling(model, own)}


def _flat(module: str) -> str:
    leaf = module.rpartition(".")[2]
    return f"geta_{leaf}"


def _relative(module: ModuleType) -> str:
    """Return the source of a module with its imports of geta_hf made relative."""

    def flat(match: re.Match[str]) -> str:
        # Found here, when the folder is written, and not by a user who lacks geta_hf and cannot load it.
        if match[2] not in CARRIED:
            raise GETAError(f"{module.__name__} imports {match[2]}, which folders do not carry; add it to CARRIED")
        return f"{match[1]}.{_flat(match[2])}{match[3]}"

    return _OWN_IMPORT.sub(flat, inspect.getsource(module))


def _classes(model: PreTrainedModel, own: type[PreTrainedModel]) -> list[type]:
    """Return the classes that `modeling_geta.py` names: of the config, the model, and the model without its head.

    AutoModel loads the last one from a folder that was saved with a head.
    """
    return list(dict.fromkeys([type(model.config), own, _base_class(own)]))


def _is_ours(kind: type) -> bool:
    return kind.__module__.startswith(f"{_PACKAGE}.")


def _modeling(model: PreTrainedModel, own: type[PreTrainedModel]) -> str:
    config = type(model.config)
    classes = _classes(model, own)
    theirs = [kind for kind in classes if not _is_ours(kind)]
    lines = [
        f'"""{own.__name__} as geta_hf compressed it: `from_pretrained(FOLDER, trust_remote_code=True)`.',
        "",
        "The import of the loader lets the classes read packed weights.",
        '"""',
        "",
        *(f"import {module}" for module in sorted({kind.__module__ for kind in theirs})),
        "",
        *(f"from .{_flat(kind.__module__)} import {kind.__name__}  # noqa: F401" for kind in classes if _is_ours(kind)),
        f"from .{_flat(CARRIED[-1])} import GETALoader  # noqa: F401",
        *_conversions(config.model_type),
    ]
    for kind in theirs:
        body = "pass" if kind is config else f"config_class = {config.__name__}"
        lines += ["", "", f"class {kind.__name__}({kind.__module__}.{kind.__name__}):", f"    {body}"]
    return "\n".join(lines) + "\n"


def _conversions(model_type: str) -> Iterator[str]:
    """Yield lines that register transformers' renaming of tensors, which it does for its own classes only."""
    if get_checkpoint_conversion_mapping(model_type) is None:
        return
    yield "from transformers import conversion_mapping as conversions"
    yield ""
    yield f'mapping = conversions.get_checkpoint_conversion_mapping("{model_type}")'
    yield f'conversions.register_checkpoint_conversion_mapping("{model_type}", mapping, overwrite=True)'
