"""Distillation: a frozen teacher's logits and hidden states as an extra term of the loss.

The teacher is by default the dense model as it was before quantizers came onto it (`dense_copy`). It is held by the
`Distiller`, which is no module: so it is in no optimizer, checkpoint or `state_dict`, no `train()` reaches it, and no
wrapper (DDP, FSDP2, compile) touches it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from geta_hf.errors import GETAError
from geta_hf.training.teachers import check_asks_hidden_states, check_configs, check_numbers, check_tensors, layers_of
from geta_hf.utils.copies import copy_module

IGNORED = -100
"""Hugging Face's label of a position that has no target."""

CHUNK = 1 << 23
"""Logits that are compared at a time: 32 MiB in fp32, of which four or five exist at once."""

SPANS = ("start_logits", "end_logits")
LOGITS = ("logits", *SPANS)
HIDDEN = ("hidden_states", "encoder_hidden_states", "decoder_hidden_states")


def dense_copy(model: nn.Module) -> nn.Module:
    """Copy the model to be the teacher; call it before quantizers are attached.

    The copy takes the memory of the weights once more, on the model's device until `Distiller` moves it.
    """
    copied = copy_module(model)
    # A forward that another trainer has set on the model itself may call the original's, whose copy would still run the
    # student. Accelerate's hooks, which are copied with what they run, need theirs.
    if not hasattr(copied, "_hf_hook"):
        vars(copied).pop("forward", None)
    return copied


class Distiller:
    """Compute the distillation term of a training loss.

    logits · T²·KL(teacher ‖ student) + hidden · relative squared error of the hidden states, both in fp32:

    - KL is the mean over the valid positions: of span logits (B, L) one softmax a row over the positions that
      `attention_mask` keeps, of class logits (B, C) the rows, of token logits (B, L, V) the positions with a label
      (of a causal language model: whose next token is one), without labels those of the attention mask. Where no mask
      fits the logits every position is valid. Several outputs, such as start and end, are averaged. A regression
      head is compared by its mean squared error, multi-label logits by the KL of each label's two outcomes.
    - The error of a hidden state (B, L, H) is mean((s - t)²) / mean(t²) over H, so that a weight means the same for
      every model; it is averaged over unmasked positions, layers (embeddings included), encoder and decoder. It is
      computed for each position, since only then do accumulated batches add up to the full batch.

    Memory: the teacher's weights once more on every process, not sharded; one forward of it without graph; while the
    student's backward waits, one gradient of the logits' size and, for hidden states, those of the teacher and their
    fp32 differences. The KL itself works on `CHUNK` logits at a time, whatever the vocabulary.

    Args:
        student: the model to train, not yet wrapped.
        teacher: another model over the same inputs. Set to eval mode, frozen and moved, in place; its dtype is kept.
        logits: weight of the logits' term, at least 0.
        hidden: weight of the hidden states' term, at least 0.
        temperature: T, above 0, which softens both distributions.
        device: the one that the teacher runs on; None does not move it.
        kept: for a student that lost entire layers: path of the list -> the teacher's layers that the student still
            has. The input of each of these is then compared with its input in the teacher, and the last hidden state
            with the teacher's last.

    Attributes:
        teacher: the frozen teacher.
        terms: the unweighted terms (`logits`, `hidden`) of the last call, 0-d and without graph, to be logged.

    Raises:
        GETAError: no positive weight, a bad temperature; a teacher that is or shares the student, that has no data, or
            that has another vocabulary, label count or (with `hidden`) size.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        logits: float = 0.0,
        hidden: float = 0.0,
        temperature: float = 2.0,
        device: torch.device | str | None = None,
        kept: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        check_numbers(logits, hidden, temperature)
        check_tensors(student, teacher)
        self._kept = layers_of(kept or {}, hidden > 0)
        if isinstance(student, PreTrainedModel) and isinstance(teacher, PreTrainedModel):
            check_configs(student, teacher, hidden > 0, self._kept)
        if hidden:
            check_asks_hidden_states(student, teacher)
        self._weights, self._temperature = {"logits": logits, "hidden": hidden}, temperature
        self.teacher = teacher.eval().requires_grad_(False)
        if device is not None:
            self.teacher.to(device)
        self.terms: dict[str, Tensor] = {}
        # The config itself: Hugging Face fills in `problem_type` on the first batch.
        self._config = student.config if isinstance(student, PreTrainedModel) else None
        self._shifts_labels = _shifts_labels(student)
        self._asked: dict[str, Any] = {"output_hidden_states": True} if hidden else {}
        # A decoder fills its cache for generation by default, which here would only take memory.
        self._uncached = {"use_cache": False} if "use_cache" in inspect.signature(teacher.forward).parameters else {}
        # Without labels the teacher is spared its loss; an encoder-decoder makes its decoder's inputs of them.
        self._unlabelled = isinstance(teacher, PreTrainedModel) and not teacher.config.is_encoder_decoder

    def student_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return a new dict of the student's inputs that asks for hidden states where they are compared."""
        return {**inputs, **self._asked}

    def loss(
        self, inputs: Mapping[str, Any], outputs: Mapping[str, Any], num_items: Tensor | float | None = None
    ) -> Tensor:
        """Return the weighted term of one batch; the teacher runs here, under the caller's autocast.

        Args:
            inputs: what the student was given, labels included; tensors (B, ...) on the teacher's device.
            outputs: what it returned for `student_inputs(inputs)`.
            num_items: labels that count in all batches of this optimizer step (on average per process), as Trainer's
                `num_items_in_batch`. Then the result is this batch's share, and the shares of a step add up to its
                mean; None gives this batch's mean.

        Returns:
            0-d, fp32, with gradient to the student alone.

        Raises:
            GETAError: outputs that can't be compared.
        """
        taught = self._teach(inputs)
        terms = {}
        if self._weights["logits"]:
            terms["logits"] = self._logits_term(inputs, outputs, taught)
        if self._weights["hidden"]:
            terms["hidden"] = _hidden_term(inputs, outputs, taught, self._kept)
        self.terms = {name: term.detach() for name, term in terms.items()}
        total = torch.stack([self._weights[name] * term for name, term in terms.items()]).sum()
        return total if num_items is None else total * self._share(inputs, num_items)

    @torch.no_grad()
    def _teach(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        asked = {**inputs, **self._asked, **self._uncached}
        if self._unlabelled:
            asked.pop("labels", None)
        return self.teacher(**asked)

    def _share(self, inputs: Mapping[str, Any], num_items: Tensor | float) -> Tensor:
        labelled = _label_mask(inputs, self._shifts_labels)
        if labelled is None:
            raise GETAError("num_items counts labels, but the inputs hold none; pass None")
        # The term is a mean over this batch's labels. Times its labels over all labels of the step, the shares add up
        # to the mean over the step, as Trainer's loss does.
        return labelled.sum() / num_items

    def _logits_term(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any], taught: Mapping[str, Any]) -> Tensor:
        terms = []
        for name, student, teacher in _pairs(LOGITS, outputs, taught, "distill_logits"):
            _check_logits(name, student, teacher)
            compare = self._span_kl if name in SPANS else self._class_kl
            terms.append(compare(inputs, student, teacher))
        return torch.stack(terms).mean()

    def _span_kl(self, inputs: Mapping[str, Any], student: Tensor, teacher: Tensor) -> Tensor:
        mask = _fitting(student.shape, _mask(inputs, "attention_mask"))
        if mask is None:
            return kl(student, teacher, None, self._temperature)
        # Padding gets probability 0 in both softmaxes. A row of padding alone has no softmax (NaN), so it is masked.
        student, teacher = (logits.masked_fill(~mask, -math.inf) for logits in (student, teacher))
        return kl(student, teacher, mask.any(-1), self._temperature)

    def _class_kl(self, inputs: Mapping[str, Any], student: Tensor, teacher: Tensor) -> Tensor:
        problem = None if self._config is None else self._config.problem_type
        if problem == "multi_label_classification":  # the sigmoid of z is the softmax of (z, 0)
            student, teacher = (torch.stack((z, torch.zeros_like(z)), -1) for z in (student, teacher))
        labelled = _label_mask(inputs, self._shifts_labels)
        mask = _fitting(student.shape[:-1], labelled, *_padding_masks(inputs))
        # A single output has a softmax of 1 whatever its value, so its KL would always be 0.
        if problem == "regression" or student.shape[-1] == 1:
            return _mean((student.float() - teacher.float()).square().mean(-1), mask)
        return kl(student, teacher, mask, self._temperature)


class _KL(torch.autograd.Function):
    """Sum T²·KL(teacher ‖ student) over the kept rows, with the gradient T·(q - p) computed in the same pass.

    Autograd would keep several fp32 tensors of the logits' size; this keeps the gradient alone, and masks it by
    choice, so that not even NaN in an excluded row gets through.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, student: Tensor, teacher: Tensor, keep: Tensor, temperature: float) -> Tensor:
        total = torch.zeros((), device=student.device)
        gradient = torch.empty_like(student)
        rows = max(1, CHUNK // student.shape[1])
        for start in range(0, student.shape[0], rows):
            part = slice(start, start + rows)
            # In fp32: in half precision the differences of two close distributions are mostly rounding.
            log_q = F.log_softmax(student[part].float() / temperature, -1)
            log_p = F.log_softmax(teacher[part].float() / temperature, -1)
            p = log_p.exp()
            # A class that the teacher rules out (-inf) adds nothing, whatever the student says.
            divergence = torch.where(p > 0, p * (log_p - log_q), 0).sum(-1)
            total += torch.where(keep[part], divergence, 0).sum()
            gradient[part] = torch.where(keep[part, None], log_q.exp() - p, 0) * temperature
        ctx.save_for_backward(gradient)
        return total * temperature**2

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return gradient * upstream, None, None, None


def kl(student: Tensor, teacher: Tensor, mask: Tensor | None, temperature: float) -> Tensor:
    """Return T²·KL(softmax(teacher / T) ‖ softmax(student / T)), averaged over the kept positions.

    T² keeps the gradient's size whatever the temperature (Hinton et al. 2015, section 2).

    Args:
        student: logits (..., V), any float type; computed in fp32, `CHUNK` logits at a time.
        teacher: logits of the same shape; gets no gradient.
        mask: bool (...), the positions that count; None for all. None kept gives 0.
        temperature: T, above 0.

    Returns:
        0-d, fp32, in nats.
    """
    keep = torch.ones_like(student[..., 0], dtype=torch.bool) if mask is None else mask
    classes = student.shape[-1]
    flat = student.reshape(-1, classes), teacher.reshape(-1, classes), keep.reshape(-1)
    return _KL.apply(*flat, temperature) / keep.sum().clamp(min=1)


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return values.mean()
    return torch.where(mask, values, 0).sum() / mask.sum().clamp(min=1)


def _relative_error(student: Tensor, teacher: Tensor, masks: Sequence[Tensor | None]) -> Tensor:
    """Average mean((s - t)²) / mean(t²) over positions; a state that is no sequence is one position a row."""
    if student.dim() != 3:
        student, teacher = student.flatten(1)[:, None], teacher.flatten(1)[:, None]
    mask = _fitting(student.shape[:-1], *masks)
    keep = torch.ones_like(student[..., 0], dtype=torch.bool) if mask is None else mask
    # States of padding may be anything, NaN included, so they are replaced before the division: zero times NaN is
    # NaN.
    teacher = teacher.float()
    difference = torch.where(keep[..., None], student.float() - teacher, 0)
    scale = torch.where(keep, teacher.square().mean(-1), 1).clamp(min=1e-12)
    return _mean(difference.square().mean(-1) / scale, keep)


def _hidden_term(
    inputs: Mapping[str, Any], outputs: Mapping[str, Any], taught: Mapping[str, Any], kept: Sequence[int] = ()
) -> Tensor:
    errors = []
    for name, student, states in _pairs(HIDDEN, outputs, taught, "distill_hidden"):
        teacher = _matching(states, len(student), kept)
        _check_hidden_states(name, student, teacher)
        masks = [_mask(inputs, "attention_mask")]
        if name == "decoder_hidden_states":
            # A decoder's positions are those of the labels, which the model shifts into its inputs by itself.
            masks = [_label_mask(inputs, shifted=False), *_padding_masks(inputs)]
        errors += [_relative_error(s, t, masks) for s, t in zip(student, teacher, strict=True)]
    return torch.stack(errors).mean()


def _matching(states: Sequence[Tensor], count: int, kept: Sequence[int]) -> Sequence[Tensor]:
    """Return the teacher's states that `count` states of a student are compared with.

    These are the inputs of each kept layer, and the last state. Without dropped layers they are all states.
    """
    if not kept or len(states) == count or count != len(kept) + 1 or len(states) <= kept[-1] + 1:
        return states
    return [*(states[place] for place in kept), states[-1]]


# --- masks --------------------------------------------------------------------------------------------------------


def _mask(inputs: Mapping[str, Any], name: str) -> Tensor | None:
    mask = inputs.get(name)
    return mask.bool() if isinstance(mask, Tensor) else None


def _padding_masks(inputs: Mapping[str, Any]) -> list[Tensor | None]:
    # Masks of the last layer's positions: an encoder-decoder fed with its own shifted inputs has the encoder's mask.
    return [_mask(inputs, "decoder_attention_mask"), _mask(inputs, "attention_mask")]


def _label_mask(inputs: Mapping[str, Any], shifted: bool) -> Tensor | None:
    """Mark positions with a target, as Trainer counts them.

    Args:
        shifted: whether position i predicts label i + 1.
    """
    ready = inputs.get("shift_labels")
    labels = inputs.get("labels") if ready is None else ready
    if not isinstance(labels, Tensor):
        return None
    if shifted and ready is None and labels.dim() > 1:
        labels = F.pad(labels[..., 1:], (0, 1), value=IGNORED)
    return labels != IGNORED


def _fitting(shape: torch.Size, *masks: Tensor | None) -> Tensor | None:
    """Return the first mask of this shape; None, which keeps every position, where none fits."""
    return next((mask for mask in masks if mask is not None and mask.shape == shape), None)


def _shifts_labels(model: nn.Module) -> bool:
    """Return whether the model's own loss pairs position i with label i + 1, as in causal language models."""
    if not isinstance(model, PreTrainedModel) or model.config.is_encoder_decoder:
        return False
    # Classes of no known loss (GPT2LMHeadModel) get the causal one, see PreTrainedModel.loss_function.
    return LOSS_MAPPING.get(model.loss_type or "ForCausalLM") is ForCausalLMLoss


# --- checks -------------------------------------------------------------------------------------------------------


def _pairs(
    names: Sequence[str], outputs: Mapping[str, Any], taught: Mapping[str, Any], weight: str
) -> list[tuple[str, Any, Any]]:
    """Pair the named outputs that the student returns with the teacher's: (name, student's, teacher's)."""
    for role, returned in (("student", outputs), ("teacher", taught)):
        if not isinstance(returned, Mapping):
            raise GETAError(
                f"the {role} returns {type(returned).__name__}, not outputs by name; set config.return_dict to True"
            )
    found = [(name, outputs[name], taught.get(name)) for name in names if outputs.get(name) is not None]
    if not found:
        raise GETAError(f"the student returns {sorted(outputs)}, none of {', '.join(names)}; set {weight} to 0")
    for name, _, teacher in found:
        if teacher is None:
            raise GETAError(
                f"the teacher returns no {name}, only {sorted(taught)}; give one of the student's kind, or set "
                f"{weight} to 0"
            )
    return found


def _check_logits(name: str, student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise GETAError(
            f"{name}: the student's are {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}; give a teacher "
            f"with the same vocabulary, labels and positions"
        )
    if student.dim() not in ((2,) if name in SPANS else (2, 3)):
        raise GETAError(
            f"{name} of shape {tuple(student.shape)} are neither (batch, classes) nor (batch, length, classes); set "
            f"distill_logits to 0"
        )


def _check_hidden_states(name: str, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> None:
    ours, theirs = ([tuple(state.shape) for state in states] for states in (student, teacher))
    if ours != theirs:
        raise GETAError(
            f"{name}: the student's are {len(ours)} up to {ours[-1]}, the teacher's {len(theirs)} up to {theirs[-1]}; "
            f"set distill_hidden to 0 to compare logits alone"
        )
