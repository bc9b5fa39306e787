"""Student and teacher as one module, whose forward gives the losses of both.

    model = zgraph.distill(student, teacher, temperature=2.0, alpha=0.5, stage=3)
    loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss

The teacher computes without gradients, in eval mode. Its parameters are frozen and sharded, by a stage of their own if
that is asked for, and an optimizer needs only `model.student.parameters()`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from zgraph.api import compile as compile_model
from zgraph.codegen.distillation import DIVERGENCES
from zgraph.distillation.kept import KEPT, check_kept
from zgraph.distillation.layers import attention_loss, check_attentions, hidden_loss, pairs_of, projections
from zgraph.distillation.projection import check_projection, output_weight
from zgraph.errors import UsageError

IGNORED = -100
"""The label of a token that counts for nothing, as in torch and transformers."""


class Distilled(NamedTuple):
    """Losses of a step, [].

    Args:
        loss: `alpha * hard_loss + (1 - alpha) * temperature ** 2 * soft_loss + hidden_weight * hidden_loss
            + attention_weight * attention_loss`.
        hard_loss: the cross-entropy with the labels, the mean over the tokens that count.
        soft_loss: the divergence from the teacher at the temperature, the mean over the same tokens.
        hidden_loss: the mean squared difference of the hidden states that were paired, over the tokens that
            attention_mask [B, S] has, and over the pairs; 0 where none were.
        attention_loss: the squared differences of the attention probabilities that were paired, summed over the keys,
            the mean over heads, the same tokens and the pairs; 0 where none were.
    """

    loss: torch.Tensor
    hard_loss: torch.Tensor
    soft_loss: torch.Tensor
    hidden_loss: torch.Tensor
    attention_loss: torch.Tensor


class Distillation(nn.Module):
    """A student that learns from a teacher. See `distill`."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        *,
        loss: str = "forward_kl",
        temperature: float = 1.0,
        alpha: float = 0.5,
        beta: float = 0.5,
        logits: str = "blocks",
        hidden: Mapping[int, int] | None = None,
        hidden_weight: float = 1.0,
        attention: Mapping[int, int] | None = None,
        attention_weight: float = 1.0,
        shift: bool | None = None,
    ) -> None:
        super().__init__()
        _check_options(loss, temperature, alpha, beta, logits)
        if teacher is None and (loss != "forward_kl" or hidden or attention):
            raise UsageError(
                'without a teacher loss must be "forward_kl", with no hidden= or attention=: its logits alone were kept'
            )
        _check_trained(student)
        for model, who in ((student, "student"), (teacher, "teacher")):
            _check_loaded(model, who)
        if teacher is not None:
            _check_apart(student, teacher)
        self.divergence, self.temperature, self.alpha, self.beta = loss, temperature, alpha, beta
        self.logits, self.hidden_weight, self.attention_weight = logits, hidden_weight, attention_weight
        self.pairs, self.attention_pairs = pairs_of(hidden, "hidden"), pairs_of(attention, "attention")
        self.shift = _is_causal(student) if shift is None else shift
        if logits == "blocks":
            check_projection(student, "student")
            if teacher is not None:
                check_projection(teacher, "teacher")
                _check_vocabularies(len(output_weight(student)), len(output_weight(teacher)))
        self.student = student
        self.teacher = None if teacher is None else teacher.requires_grad_(False)
        self.projections = nn.ModuleList(projections(self.pairs, student, teacher))
        check_attentions(self.attention_pairs, student, teacher)
        self.training = student.training
        if teacher is not None:
            teacher.eval()

    @property
    def config(self) -> Any:
        """The student's configuration."""
        return self.student.config

    def gradient_checkpointing_enable(self, *args: Any, **options: Any) -> None:
        """Have the student computed again in the backward, as transformers' models do."""
        self.student.gradient_checkpointing_enable(*args, **options)  # type: ignore[operator]

    def train(self, mode: bool = True) -> Distillation:
        """Set the student's mode; the teacher stays in eval mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def forward(self, labels: torch.Tensor, **inputs: Any) -> Distilled:
        """The losses of a batch.

        Args:
            labels: [B, S], the tokens to predict, as transformers' models take them: a causal model's are shifted
                here. -100 counts for nothing.
            inputs: what both models take: input_ids [B, S], attention_mask. Without a teacher also what was kept of
                one: teacher_logits and teacher_words, [B, S, K].

        Raises:
            UsageError: the loss of routers is asked for, which is none of blocks; or what was kept of a teacher is not
                given, or given beside one.
        """
        if self.logits == "blocks" and inputs.get("output_router_logits"):
            raise UsageError('the loss of routers is the model\'s own: pass logits="whole" to zgraph.distill')
        if self.pairs:
            inputs["output_hidden_states"] = True
        if self.attention_pairs:
            inputs["output_attentions"] = True
        kept: tuple[Any, Any] = (None, None)
        if self.teacher is None or KEPT & inputs.keys():
            check_kept(self.teacher is not None, inputs)
            hard, soft = self._of_kept(labels, inputs)
        elif self.logits == "blocks":
            hard, soft, kept = self._in_blocks(labels, inputs, self.teacher)
        else:
            hard, soft, kept = self._whole(labels, inputs, self.teacher)
        mask = inputs.get("attention_mask")
        total = self.alpha * hard + (1 - self.alpha) * self.temperature**2 * soft
        states, attentions = torch.zeros_like(hard), torch.zeros_like(hard)
        if self.pairs:
            states = hidden_loss(self.pairs, self.projections, *kept, mask)
            total = total + self.hidden_weight * states
        if self.attention_pairs:
            attentions = attention_loss(self.attention_pairs, *kept, mask)
            total = total + self.attention_weight * attentions
        return Distilled(total, hard.detach(), soft.detach(), states.detach(), attentions.detach())

    def _of_kept(self, labels: torch.Tensor, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        taught, words = inputs.pop("teacher_logits"), inputs.pop("teacher_words").long()
        log_q = (taught.float() / self.temperature).log_softmax(-1)
        if self.logits == "blocks":
            made, weight = self.student.base_model(**inputs).last_hidden_state, output_weight(self.student)  # type: ignore[operator]
            labels, x, words, log_q = self._aligned(labels, made, words, log_q)
            read = (x.flatten(0, -2), weight.to(x.dtype), labels.flatten(), words.flatten(0, -2), log_q.flatten(0, -2))
            hard, soft, _, _ = torch.ops.zgraph.linear_topk_distillation(*read, self.temperature, IGNORED)
            return hard, soft
        own = self.student(**inputs, labels=labels)
        labels, logits, words, log_q = self._aligned(labels, own.logits, words, log_q)
        log_p = (logits.float() / self.temperature).log_softmax(-1).gather(-1, words)
        counts = labels != IGNORED
        soft = torch.where(counts, (log_q.exp() * (log_q - log_p)).sum(-1), 0.0).sum() / counts.sum().clamp_min(1)
        return own.loss.to(soft.dtype), soft

    def _in_blocks(
        self, labels: torch.Tensor, inputs: dict[str, Any], teacher: Any
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[Any, Any]]:
        own = self.student.base_model(**inputs)  # type: ignore[operator]
        with torch.no_grad():
            others = teacher.base_model(**inputs)
        labels, x, teacher_x = self._aligned(labels, own.last_hidden_state, others.last_hidden_state)
        weight, teacher_weight = output_weight(self.student), output_weight(teacher)
        hard, soft, _, _ = torch.ops.zgraph.linear_distillation(
            x.flatten(0, -2),
            weight.to(x.dtype),
            teacher_x.flatten(0, -2),
            teacher_weight.to(teacher_x.dtype),
            labels.flatten(),
            self.divergence,
            self.beta,
            self.temperature,
            IGNORED,
        )
        return hard, soft, (own, others)

    def _whole(
        self, labels: torch.Tensor, inputs: dict[str, Any], teacher: Any
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[Any, Any]]:
        own = self.student(**inputs, labels=labels)
        if getattr(teacher.config, "is_encoder_decoder", False):
            inputs = {**inputs, "labels": labels}  # of which it makes its decoder's input
        with torch.no_grad():
            others = teacher(**inputs)
        _check_vocabularies(own.logits.shape[-1], others.logits.shape[-1])
        labels, made, taught = self._aligned(labels, own.logits, others.logits)
        each = divergence(made, taught, self.divergence, self.temperature, self.beta)
        counts = labels != IGNORED
        soft = torch.where(counts, each, 0.0).sum() / counts.sum().clamp_min(1)
        return own.loss.to(soft.dtype), soft, (own, others)

    def _aligned(self, labels: torch.Tensor, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Labels, and for each what predicts it."""
        return (labels[:, 1:], *(v[:, :-1] for v in values)) if self.shift else (labels, *values)


def distill(
    student: nn.Module,
    teacher: nn.Module | None,
    *,
    loss: str = "forward_kl",
    temperature: float = 1.0,
    alpha: float = 0.5,
    beta: float = 0.5,
    logits: str = "blocks",
    hidden: Mapping[int, int] | None = None,
    hidden_weight: float = 1.0,
    attention: Mapping[int, int] | None = None,
    attention_weight: float = 1.0,
    shift: bool | None = None,
    stage: int | Callable[[str], int] = 3,
    teacher_stage: int | None = None,
    **options: Any,
) -> Distillation:
    """Compile a student with its teacher, as one step.

    Args:
        student: trained. Transformers' language models, or any module with a `base_model` and
            `get_output_embeddings()`.
        teacher: frozen, and set to eval mode. It has the student's vocabulary. None where batches bring what
            `keep_logits` kept of one.
        loss: the divergence: "forward_kl" (Hinton et al., 2015), "reverse_kl" (Gu et al., "MiniLLM", 2024) or "jsd"
            (Agarwal et al., "On-policy distillation", 2024).
        temperature: divides the logits of both in the divergence, which is multiplied by its square.
        alpha: the share of the cross-entropy with the labels; the divergence has the rest.
        beta: the teacher's share of the mixture of "jsd".
        logits: "blocks" never has the logits of either whole in memory; "whole" does, for models whose logits are more
            than one product, and takes the student's own loss for the hard one.
        hidden: maps indices of the student's `hidden_states` to the teacher's; 0 is the embedding. Where widths differ,
            a linear layer of `projections` is between, whose parameters an optimizer must be given too.
        hidden_weight: of the loss of these.
        attention: maps layers of the student, from 0, to the teacher's, whose attention probabilities they learn (Jiao
            et al., "TinyBERT", 2020). Both models must be loaded with attn_implementation="eager". Where the numbers of
            heads differ, the means over heads are compared.
        attention_weight: of the loss of these.
        shift: whether a position predicts the next label; by default as the student's `can_generate()` says.
        stage: as in `zgraph.compile`; names begin with "student." and "teacher.".
        teacher_stage: stage of the teacher; by default the student's.
        options: passed to `zgraph.compile`.

    Returns:
        A compiled module, whose forward returns `Distilled`.

    Raises:
        UsageError: the models do not fit each other, or an option does not fit them.
    """
    model = Distillation(
        student,
        teacher,
        loss=loss,
        temperature=temperature,
        alpha=alpha,
        beta=beta,
        logits=logits,
        hidden=hidden,
        hidden_weight=hidden_weight,
        attention=attention,
        attention_weight=attention_weight,
        shift=shift,
    )

    def of(name: str) -> int:
        if teacher_stage is not None and name.startswith("teacher."):
            return teacher_stage
        return stage(name) if callable(stage) else stage

    return compile_model(model, stage=stage if teacher_stage is None else of, **options)


def divergence(
    logits: torch.Tensor, teacher_logits: torch.Tensor, kind: str, temperature: float, beta: float
) -> torch.Tensor:
    """The divergence of each token, [...], from whole logits [..., V], in fp32 at least."""
    made = torch.promote_types(logits.dtype, torch.float32)
    log_p = (logits.to(made) / temperature).log_softmax(-1)
    log_q = (teacher_logits.to(made) / temperature).log_softmax(-1)
    if kind == "forward_kl":
        return (log_q.exp() * (log_q - log_p)).sum(-1)
    if kind == "reverse_kl":
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    log_m = torch.logaddexp(log_q + math.log(beta), log_p + math.log1p(-beta))
    return beta * (log_q.exp() * (log_q - log_m)).sum(-1) + (1 - beta) * (log_p.exp() * (log_p - log_m)).sum(-1)


def _check_options(loss: str, temperature: float, alpha: float, beta: float, logits: str) -> None:
    if loss not in DIVERGENCES:
        raise UsageError(f"loss must be one of {', '.join(DIVERGENCES)}, not {loss!r}")
    if logits not in ("blocks", "whole"):
        raise UsageError(f'logits must be "blocks" or "whole", not {logits!r}')
    if not 0 < temperature < float("inf"):
        raise UsageError(f"temperature must be above 0, not {temperature}")
    if not 0 <= alpha <= 1:
        raise UsageError(f"alpha, the share of the labels' loss, must be from 0 to 1, not {alpha}")
    if not 0 < beta < 1:
        raise UsageError(f"beta, the teacher's share of the mixture, must be between 0 and 1, not {beta}")


def _check_apart(student: nn.Module, teacher: nn.Module) -> None:
    theirs = {id(p) for p in teacher.parameters()}
    if both := [name for name, p in student.named_parameters() if id(p) in theirs]:
        raise UsageError(
            f"student and teacher share the parameter {both[0]}, which would be frozen: give one of them a copy, by "
            "copy.deepcopy say"
        )


def _check_trained(student: nn.Module) -> None:
    if not any(p.requires_grad for p in student.parameters()):
        raise UsageError("no parameter of the student requires a gradient: call student.requires_grad_() first")


def _check_vocabularies(student: int, teacher: int) -> None:
    if student != teacher:
        raise UsageError(
            f"the student has {student:,} words and the teacher {teacher:,}: distillation compares the same words. If "
            "their tokenizer is the same and one is padded, call resize_token_embeddings on it"
        )


def _check_loaded(model: nn.Module | None, who: str) -> None:
    if model is not None and any(p.is_meta for p in model.parameters()):
        raise UsageError(f"the {who}, {type(model).__name__}, is on the meta device: load its weights first")


def _is_causal(model: Any) -> bool:
    if not hasattr(model, "can_generate"):
        raise UsageError(
            f"{type(model).__name__} does not say whether a position predicts the next label: pass shift=True or False"
        )
    return bool(model.can_generate()) and not getattr(model.config, "is_encoder_decoder", False)
