"""Check that the weights which a model ties are those that its class and config tie when it is loaded."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from geta_hf.errors import GETAError


def check_ties(model: nn.Module) -> None:
    """Check that a folder of this model would load with the ties that the model has now.

    Of tied weights a folder holds one, and loading ties the others again as the model's class and config declare.
    transformers is asked for that declaration. A module that is used in several places is loaded once and is no tie.

    Args:
        model: before or after training.

    Raises:
        GETAError: a tie that is declared but not there, or is there but not declared.
    """
    declared = model.get_expanded_tied_weights_keys(all_submodels=True) if isinstance(model, PreTrainedModel) else {}
    # With all names of a shared parameter; by default named_parameters gives only the first.
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for target, source in declared.items():
        if parameters.get(target) is not parameters.get(source):
            raise GETAError(
                f"{target} and {source} are not tied, though the config says so, and would be one weight once loaded; "
                f"call model.tie_weights(), or set model.config.tie_word_embeddings = False"
            )
    # Ties that were made by hand: two names of one parameter that lead to different sources in the declaration.
    first: dict[int, str] = {}
    for path, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{leaf}" if path else leaf
            other = first.setdefault(id(parameter), name)
            if declared.get(name, name) != declared.get(other, other):
                raise GETAError(
                    f"{name} is tied to {other}, but {type(model).__name__} would not load so under its config; set "
                    f"model.config.tie_word_embeddings = True if that ties them, or give each a weight of its own"
                )
