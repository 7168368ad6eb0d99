"""GETA for Hugging Face: structured pruning and quantization learned together while a model is fine-tuned.

Importing the package lets `AutoModelForX.from_pretrained` read folders that it exported.

- Train and compress: `GETATrainer`, with `GETAConfig` or `SearchConfig`.
- Compress without training: `compress`, with `OneShotConfig`.
- Write and share: `export`, `convert`, `write_card`, `write_report`, `push_to_hub`.
- Run fast: `prepare_for_inference`.
- Score: `evaluate`, `perplexity`, `measure_costs`.
- Look ahead: `PruningSpace`, `build_space`, `dry_run`, `plan_memory`, `Plan`.
- Parts for a training loop of your own: `attach_quantizers`, `QASSO`, `Schedule`.

What users can mend raises `GETAError`. From a terminal the same is `geta-hf --help`.
"""

from geta_hf.compress import compress
from geta_hf.config import GETAConfig
from geta_hf.convert import convert
from geta_hf.costs.model_costs import Costs, measure_costs
from geta_hf.errors import GETAError
from geta_hf.evaluation import Evaluation, evaluate, perplexity
from geta_hf.export import export
from geta_hf.inference import prepare_for_inference
from geta_hf.methods.one_shot.config import OneShotConfig
from geta_hf.methods.qasso.optimizer import QASSO
from geta_hf.methods.qasso.schedule import Schedule
from geta_hf.methods.search.config import SearchConfig
from geta_hf.qadg import PruningSpace, apply_policy, verify_space
from geta_hf.quantization import attach_input_quantizers, attach_quantizers, detach_quantizers
from geta_hf.recipes import cifar_models  # noqa: F401 - registers models that its folders may hold
from geta_hf.reporting.html_report import write_report
from geta_hf.reporting.hub import push_to_hub
from geta_hf.reporting.model_card import write_card
from geta_hf.surgery.build_space import build_space
from geta_hf.surgery.verify import verify_surgery
from geta_hf.training.memory import DryRun, MemoryPlan, dry_run, plan_memory
from geta_hf.training.plan import Plan
from geta_hf.training.trainer import GETATrainer
from geta_hf.utils.former_modules import offer_former_modules
from geta_hf.utils.version import __version__ as __version__

offer_former_modules()

__all__ = [
    "QASSO",
    "Costs",
    "DryRun",
    "Evaluation",
    "GETAConfig",
    "GETAError",
    "GETATrainer",
    "MemoryPlan",
    "OneShotConfig",
    "Plan",
    "PruningSpace",
    "Schedule",
    "SearchConfig",
    "apply_policy",
    "attach_input_quantizers",
    "attach_quantizers",
    "build_space",
    "compress",
    "convert",
    "detach_quantizers",
    "dry_run",
    "evaluate",
    "export",
    "measure_costs",
    "perplexity",
    "plan_memory",
    "prepare_for_inference",
    "push_to_hub",
    "verify_space",
    "verify_surgery",
    "write_card",
    "write_report",
]
