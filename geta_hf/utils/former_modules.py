"""Let modules be imported under their paths of before the package had rooms; to be removed in the next version."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import ModuleType
from typing import Any

FORMER = {
    "card": "reporting.model_card",
    "causal": "evaluation.causal_lm",
    "checkpoints": "training.checkpoints",
    "cost": "costs.model_costs",
    "depth": "surgery.drop_layers",
    "distillation": "training.distillation",
    "export.config_view": "surgery.config_view",
    "export.embeddings": "serialization.embeddings",
    "export.equations": "surgery.size_equations",
    "export.fixes": "surgery.fixes",
    "export.folder": "serialization.atomic_folder",
    "export.gate": "surgery.verify",
    "export.hf_quantizer": "serialization.hf_quantizer",
    "export.loader": "serialization.loader",
    "export.packed": "serialization.packed_layers",
    "export.packing": "serialization.bitpack",
    "export.readable": "serialization.validate",
    "export.record": "surgery.record",
    "export.rehearsal": "surgery.trial_cut",
    "export.remote_code": "serialization.remote_code",
    "export.saving": "serialization.encode",
    "export.sizes": "serialization.sizes",
    "export.solve": "surgery.solve_attributes",
    "export.stored": "serialization.decode",
    "export.surgery": "surgery.slice",
    "export.tagged": "surgery.symbolic_int",
    "export.ties": "serialization.tied_weights",
    "export.trace": "surgery.size_trace",
    "export.verify": "surgery.compare_outputs",
    "facts": "reporting.folder_summary",
    "fakes": "training.fake_tensors",
    "files": "utils.files",
    "hooks": "utils.accelerate_hooks",
    "hub": "reporting.hub",
    "lora": "training.lora",
    "memory": "training.memory",
    "memory_report": "training.memory_report",
    "page": "reporting.graph_page",
    "picture": "reporting.structure_svg",
    "plan": "training.plan",
    "preparation": "training.preparation",
    "qadg.build": "qadg.space",
    "qadg.capture": "qadg.tracing.record_forward",
    "qadg.depth": "qadg.residual_blocks",
    "qadg.example": "qadg.tracing.dummy_inputs",
    "qadg.flow": "qadg.propagation.flow",
    "export.formats.executorch": "export.formats.experimental.executorch",
    "export.formats.openvino": "export.formats.experimental.openvino",
    "qadg.graph": "qadg.tracing.graph",
    "qadg.groups": "qadg.space",
    "qadg.kinds": "qadg.families.classify",
    "qadg.merge": "qadg.tracing.merge",
    "qadg.outputs": "qadg.families.output_layers",
    "qadg.propagate": "qadg.propagation.propagate",
    "qadg.recorder": "qadg.tracing.recorder",
    "qadg.rules_compute": "qadg.propagation.rules_compute",
    "qadg.rules_conv": "qadg.propagation.rules_conv",
    "qadg.rules_index": "qadg.propagation.rules_index",
    "qadg.rules_shape": "qadg.propagation.rules_shape",
    "qadg.rules_zeros": "qadg.propagation.rules_zeros",
    "qadg.slots": "qadg.families.partition",
    "qadg.staying": "qadg.propagation.keep_masks",
    "qadg.terms": "qadg.propagation.element_ids",
    "qasso": "methods.qasso",
    "qasso.checks": "methods.qasso.checks",
    "qasso.cuts": "qadg.group_labels",
    "qasso.finish": "costs.bit_allocation",
    "qasso.forgetting": "methods.qasso.equations",
    "qasso.frozen": "methods.qasso.frozen",
    "qasso.health": "methods.qasso.checks",
    "qasso.ledger": "costs.ledger",
    "qasso.optimizer": "methods.qasso.optimizer",
    "qasso.projection": "methods.qasso.equations",
    "qasso.redundant": "methods.qasso.joint_step",
    "qasso.saliency": "methods.qasso.equations",
    "qasso.schedule": "methods.qasso.schedule",
    "qasso.selection": "costs.selection",
    "qasso.sensitivity": "costs.sensitivity",
    "qasso.shards": "utils.shards",
    "qasso.slices": "methods.qasso.slices",
    "qasso.standing": "methods.qasso.metrics",
    "qasso.state": "methods.qasso.state",
    "qasso.target": "costs.targets",
    "qasso.widths": "costs.quantizer_table",
    "quantization.kinds": "quantization.layer_types",
    "report": "reporting.comparison",
    "report_page": "reporting.html_report",
    "shorten": "surgery.shorter_config",
    "support": "training.support",
    "teachers": "training.teachers",
    "temporarily": "utils.module_state",
    "told": "utils.loading",
    "trainer": "training.trainer",
}
"""Former path -> present path, both within `geta_hf`."""


class FormerModules(MetaPathFinder, Loader):
    """Find a former path and give the present module under it, with a DeprecationWarning."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return a spec for a former path; None for any other."""
        package, _, name = fullname.partition(".")
        if package != "geta_hf" or name not in FORMER:
            return None
        return spec_from_loader(fullname, self)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Import the present module."""
        present = f"geta_hf.{FORMER[spec.name.partition('.')[2]]}"
        warnings.warn(
            f"{spec.name} is now {present}; the former path will be removed in the next version", DeprecationWarning, 2
        )
        module = importlib.import_module(present)
        # The import system sets __spec__ of what is returned here, which is the present module itself.
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Give the module its own spec back, which the import under another path has replaced."""
        module.__spec__ = self._spec


def offer_former_modules() -> None:
    """Add the finder, before those that search folders: a former package's folder may hold modules of the same name."""
    if not any(isinstance(finder, FormerModules) for finder in sys.meta_path):
        sys.meta_path.insert(0, FormerModules())


def former_names(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """Make a module's `__getattr__`, which gives names that have moved, with a DeprecationWarning.

    Args:
        module: the module's own path.
        names: former name -> where it is now, such as `geta_hf.costs.ledger.Ledger`.
    """

    def getattribute(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        present, _, attribute = names[name].rpartition(".")
        warnings.warn(f"{module}.{name} is now {names[name]}", DeprecationWarning, 2)
        return getattr(importlib.import_module(present), attribute)

    return getattribute
