"""Calls of a model by kept plans: rehearsed, looked up, and run without a capture where nothing they depend on differs.

The first call of each kind is rehearsed on tensors without data (`zgraph.capture.rehearsal`), which takes a fraction of
what a capture takes, and says what the call computes. With the model, the options and the versions that makes its key.

    a plan is kept under the key       it is checked, linked, and runs: nothing is captured
    there is none                      the model is captured; its plan is kept, if torch traced what was rehearsed
    the call cannot be rehearsed       the model is captured as without a cache, and a line says why

Of several ranks, the first captures where none has the plan, and the others take its plan, as do those that lack it
where some have it. Later calls compare their arguments, torch's settings and the Python state that the functions read
with those of the rehearsal. Where one differs, the call is rehearsed again: by Dynamo's guards it would be captured.
"""

from __future__ import annotations

import base64
import hashlib
import json
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from zgraph.bridge.aten import FROM_TORCH, TO_TORCH
from zgraph.bridge.private_rehearsal import storage_of
from zgraph.capture import Frontend
from zgraph.capture.rehearsal import NoRehearsal, Rehearsal, rehearse
from zgraph.certify.certificate import Certifier
from zgraph.compiler.compiled_model import CompiledModel
from zgraph.compiler.observer import CAPTURE, FAILED, Observer
from zgraph.compiler.plan_cache import PlanCache
from zgraph.compiler.reuse_key import NoKey, signature_of
from zgraph.environment import environment
from zgraph.errors import PlanCacheWarning, RunFileError, ZgraphError, in_one_line
from zgraph.ir import Graph, InputKind, OutputKind, Phase
from zgraph.runfile.kept import Kept, arguments, load_kept
from zgraph.runtime.reused import Binding, Halves, bound, buffers_of, constant_of

MOST_KINDS = 8
"""Kinds of calls that are rehearsed; a model with more has sizes that change from call to call, and is captured."""

MOST_AGAIN = 8
"""Rehearsals of one kind of call, as Python state that it may depend on has changed, before it is captured for good."""

WAITS = 6
"""How often ZGRAPH_TIMEOUT a rank waits for the first one's capture. Whether it lives is asked all the while."""

KeyOf = Callable[[tuple[Any, ...], str], str]
"""From the signature of a call and the text of its rehearsal to its key."""


@dataclass(frozen=True)
class _Call:
    """A call: its arguments, their leaves, and how these are nested."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    leaves: list[Any]
    spec: Any


@dataclass
class _Kind:
    """A kind of call: one that torch.compile has captured here and guards, or one that a kept plan runs.

    Args:
        key: of the plan.
        rehearsal: that was last found to have this key.
        run: from the leaves of the arguments to the outputs of the plan; None if the call is captured.
        kept: the plan.
        num_again: how often it was rehearsed again.
    """

    key: str = ""
    rehearsal: Rehearsal | None = None
    run: Callable[[Sequence[Any]], Sequence[Any]] | None = None
    kept: Kept | None = None
    num_again: int = 0


@dataclass(frozen=True)
class _Prepared:
    """A call that was rehearsed: its key, and the plan that is kept under it with its last graph, if there is one.

    Where it could not be rehearsed, `why` says so, and the key is empty.
    """

    key: str = ""
    why: str = ""
    rehearsal: Rehearsal | None = None
    kept: Kept | None = None
    final: Graph | None = None


class Reuse:
    """The calls of one model, by kept plans where there are some.

    Args:
        model: the model.
        compiled: its state.
        frontend: captures it.
        capture: the model's forward, captured at its first call and where its guards fail.
        forward: the model's own.
        cache: of plans.
        key_of: makes keys.
    """

    def __init__(
        self,
        model: nn.Module,
        compiled: CompiledModel,
        frontend: Frontend,
        capture: Callable[..., Any],
        forward: Callable[..., Any],
        cache: PlanCache,
        key_of: KeyOf,
    ) -> None:
        self.model, self.compiled, self.frontend, self.capture = model, compiled, frontend, capture
        self.forward, self.cache, self.key_of, self.session = forward, cache, key_of, compiled.session
        self.buffers = buffers_of(model)
        self._kinds: list[tuple[tuple[Any, ...], _Kind]] = []
        self._met: set[tuple[bool, bool]] = set()
        self._reasons: list[str] = []
        self._report()

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """A call of the model."""
        call = _Call(args, kwargs, *pytree.tree_flatten((args, kwargs)))
        signature: tuple[Any, ...] | None = None
        why = ""
        try:
            signature = *signature_of(call.leaves, call.spec, training=self.model.training), self._trained()
        except NoKey as error:
            why = str(error)
        kind = next((kind for known, kind in self._kinds if known == signature), None)
        mode = self.model.training, torch.is_grad_enabled()
        if not self.session.is_alone and mode not in self._met:
            self._met.add(mode)
            return self._together(signature, call, self._prepared(signature, call, why))
        if kind is not None and kind.run is not None and self._is_as_rehearsed(kind, call):
            return self._run(kind, call)
        if signature is None:
            self._left(why)
        is_one_more = kind is None and len(self._kinds) >= MOST_KINDS
        if signature is None or is_one_more or (kind is not None and (kind.run is None or kind.num_again > MOST_AGAIN)):
            return self.capture(*args, **kwargs)
        prepared = self._prepared(signature, call, why)
        if kind is not None and prepared.key == kind.key:
            kind.rehearsal, kind.num_again = prepared.rehearsal, kind.num_again + 1
            return self._run(kind, call)
        if prepared.kept is not None:
            return self._reused(signature, call, prepared)
        return self._captured(signature, call, prepared)

    def forget(self) -> None:
        """Forget all that was rehearsed: the model's hooks are others."""
        self._kinds.clear()

    def restart(self) -> None:
        """Forget all, on all ranks: they meet again."""
        self._kinds.clear()
        self._met.clear()

    def _trained(self) -> tuple[bool, ...]:
        """Which parameters are trained, as it is now."""
        return tuple([slot.placeholder.requires_grad for slot in self.session.store.slots.values()])

    # --- what a call is ----------------------------------------------------------------------------------------

    def _prepared(self, signature: tuple[Any, ...] | None, call: _Call, why: str) -> _Prepared:
        """The call, rehearsed, with the plan that is kept for it."""
        if signature is None:
            return _Prepared(why=why)
        try:
            rehearsal = rehearse(self.model, self.forward, call.leaves, call.spec)
            key = self.key_of(signature, rehearsal.text)
        except (NoRehearsal, NoKey) as error:
            return _Prepared(why=str(error))
        prepared = _Prepared(key, "", rehearsal)
        if any(kind.key == key and kind.run is not None for _, kind in self._kinds):
            return prepared  # it is linked
        if (kept := self.cache.find(key)) is None:
            return prepared
        try:
            return self._checked(prepared, kept, call)
        except ZgraphError as error:
            self.cache.refuse(key, error)
            return prepared

    def _checked(self, prepared: _Prepared, kept: Kept, call: _Call) -> _Prepared:
        """A plan that is kept, or was given by another rank, as far as it can be checked.

        Raises:
            ZgraphError: it breaks a rule.
        """
        assert prepared.rehearsal is not None
        ours, final = self.compiled.context, kept.final
        costs = kept.run.context.costs if self.compiled.tunes else ours.costs
        if replace(kept.run.context, hints={}) != replace(ours, hints={}, costs=costs):
            raise RunFileError("the passes knew something else")
        kept.check_program(final, len(call.leaves), len(prepared.rehearsal.results))
        self._check_types(kept, final, prepared.rehearsal, call)
        if environment().verify:
            certifier = Certifier(kept.captured, kept.run.context, thorough=environment().verify == 2)
            for name, graph, _ in kept.run.steps[1:]:
                certifier.add(name.partition("(")[0], graph)
            certifier.finish()
        return replace(prepared, kept=kept, final=final)

    def _check_types(self, kept: Kept, final: Graph, rehearsal: Rehearsal, call: _Call) -> None:
        """Raise RunFileError unless the program takes and makes tensors of the model's and the call's types."""
        slots = self.session.store.slots
        for constant in kept.reuse.constants:
            try:
                constant_of(constant.data, TO_TORCH[constant.dtype], constant.shape)
            except ValueError as error:
                raise RunFileError(f"a constant is damaged: {error}") from None
        for bound_, entry in zip(kept.reuse.inputs, arguments(final), strict=True):
            known = slots[bound_.target].placeholder if bound_.target in slots else None
            given = (
                known
                if bound_.kind == "param"
                else self.buffers(bound_.target)
                if bound_.kind == "buffer"
                else call.leaves[int(bound_.target)]
            )
            if not isinstance(given, torch.Tensor):
                raise RunFileError(f"the program takes {bound_.kind} {bound_.target[:60]!r}, which is no tensor here")
            if FROM_TORCH[given.dtype] is not entry.value.tensor.dtype:
                raise RunFileError(f"the program takes another dtype of {bound_.kind} {bound_.target[:60]!r}")
            if bound_.kind != "param" and tuple(given.shape) != tuple(entry.value.tensor.shape):
                raise RunFileError(f"the program takes another shape of {bound_.kind} {bound_.target[:60]!r}")
        made = [o.value for o in final.outputs if o.phase is Phase.forward and o.kind is OutputKind.output]
        for result, index in zip(rehearsal.results, kept.reuse.outputs, strict=True):
            value = made[index] if index is not None else None
            if (index is None) != (result.input is not None):
                raise RunFileError("the result has other arguments in it")
            if index is not None and (
                value is None
                or (value.tensor.dtype, tuple(value.tensor.shape)) != (FROM_TORCH[result.dtype], result.shape)
            ):
                raise RunFileError("the result has tensors of other types")

    def _is_as_rehearsed(self, kind: _Kind, call: _Call) -> bool:
        """Whether nothing that a call depends on has changed since its rehearsal."""
        assert kind.kept is not None
        assert kind.rehearsal is not None
        if kind.rehearsal.state.changed():
            return False
        written = [self.buffers(name.partition(" ")[2]) for name in kind.rehearsal.written]
        if written:
            given = {storage_of(leaf) for leaf in call.leaves if isinstance(leaf, torch.Tensor)}
            return given.isdisjoint(map(storage_of, written))
        return True

    # --- ways to run it ----------------------------------------------------------------------------------------

    def _run(self, kind: _Kind, call: _Call) -> Any:
        assert kind.run is not None
        assert kind.kept is not None
        assert kind.rehearsal is not None
        made = kind.run(call.leaves)
        places = zip(kind.kept.reuse.outputs, kind.rehearsal.results, strict=True)
        return kind.rehearsal.template.filled(
            [made[index] if index is not None else call.leaves[result.input or 0] for index, result in places]
        )

    def _reused(self, signature: tuple[Any, ...] | None, call: _Call, prepared: _Prepared) -> Any:
        """The call by its plan, from now on."""
        assert signature is not None
        assert prepared.kept is not None
        assert prepared.final is not None
        began, kept = time.perf_counter(), prepared.kept
        compiled = self.compiled.link_kept(kept, prepared.final)
        requires_grad = kept.reuse.requires_grad
        halves = Halves(compiled.plan, compiled.forward, compiled.backward, requires_grad, self.buffers)
        binding = [Binding(InputKind(b.kind), b.target) for b in kept.reuse.inputs]
        run = bound(halves, binding, self.session)
        kind = _Kind(prepared.key, prepared.rehearsal, run, kept)
        self._set(signature, kind)
        self._report()
        self.compiled.narrator.reused(len(prepared.final.nodes), time.perf_counter() - began, str(self.cache.folder))
        return self._run(kind, call)

    def _captured(
        self,
        signature: tuple[Any, ...] | None,
        call: _Call,
        prepared: _Prepared,
        tell: Callable[[str], None] | None = None,
        *,
        keeps: bool = True,
    ) -> Any:
        """The call, captured, and its plan kept where it can be.

        Args:
            signature: of the call.
            call: the call.
            prepared: the same, rehearsed.
            tell: is given the plan for the other ranks, which wait for it.
            keeps: whether this rank plans by itself, so that the plan can be kept.
        """
        if signature is not None:
            self._set(signature, _Kind(prepared.key))
        if prepared.rehearsal is None or not keeps:
            self._left(prepared.why)
            return self.capture(*call.args, **call.kwargs)
        observer = Observer(self.model, prepared.rehearsal, prepared.key, call.leaves, self.cache, tell)
        self.frontend.observe, self.compiled.keeper = observer.saw, observer
        try:
            return self.capture(*call.args, **call.kwargs)
        except Exception:
            observer.failed()
            raise
        finally:
            self.frontend.observe = self.compiled.keeper = None
            self._left(observer.why)

    def _together(self, signature: tuple[Any, ...] | None, call: _Call, prepared: _Prepared) -> Any:
        """The first call of its kind on several ranks, of which at most one captures."""
        peers, number = self.session.peers, len(self._met)
        digest = hashlib.sha256(prepared.key.encode()).hexdigest() if prepared.key else ""
        own = {"key": digest, "has": prepared.kept is not None, "why": prepared.why}
        words = [json.loads(word) for word in peers.exchange(f"kept plan {number}", json.dumps(own))]
        if not digest or any(word["key"] != digest for word in words):
            why = next((word["why"] for word in words if word["why"]), "the ranks' calls differ")
            return self._captured(signature, call, replace(prepared, why=prepared.why or why), keeps=False)
        give, what = partial(self._exchanged, number), f"given plan {number}"
        having = [rank for rank, word in zip(peers.ranks, words, strict=True) if word["has"]]
        if len(having) == len(words):
            return self._reused(signature, call, prepared)
        if not having and peers.rank == peers.ranks[0]:
            return self._captured(signature, call, prepared, tell=give)
        giver = having[0] if having else peers.ranks[0]
        held = (
            base64.b64encode(prepared.kept.to_bytes()).decode()
            if having and peers.rank == giver and prepared.kept
            else ""
        )
        word = peers.exchange(what, held, num_limits=WAITS)[peers.ranks.index(giver)]
        if prepared.kept is None and word not in (CAPTURE, FAILED):
            prepared = self._received(prepared, word, call)
        if prepared.kept is not None:
            return self._reused(signature, call, prepared)
        return self._captured(signature, call, prepared, keeps=word != CAPTURE)

    def _exchanged(self, number: int, word: str) -> None:
        """Give the others the first rank's plan, or a word in its place."""
        self.session.peers.exchange(f"given plan {number}", word, num_limits=WAITS)

    def _received(self, prepared: _Prepared, word: str, call: _Call) -> _Prepared:
        """A plan that another rank has given, checked like one from the folder, and kept there."""
        try:
            held = base64.b64decode(word, validate=True)
            found = self._checked(prepared, load_kept(held, prepared.key), call)
        except (ZgraphError, ValueError) as error:
            warnings.warn(
                f"another rank's plan is not used: {in_one_line(error)}. This rank captures the model",
                PlanCacheWarning,
                stacklevel=2,
            )
            return prepared
        self.cache.keep(prepared.key, held)
        return found

    # --- what is told ------------------------------------------------------------------------------------------

    def _set(self, signature: tuple[Any, ...], kind: _Kind) -> None:
        self._kinds = [(known, old) for known, old in self._kinds if known != signature]
        self._kinds.append((signature, kind))

    def _left(self, why: str) -> None:
        """Tell why a plan is not kept, once for each reason."""
        if why and why not in self._reasons:
            self._reasons.append(why)
            self.compiled.narrator.remark(f"its plan is not kept, and the next run captures it again: {why}")
        self._report()

    def _report(self) -> None:
        captured, reused = self.compiled.num_captured, self.compiled.num_reused
        found = [f"{captured} graph{'s' * (captured != 1)} captured, {reused} reused from {self.cache.folder}"]
        self.compiled.reuse = "; ".join([*found, *(f"not kept: {why}" for why in self._reasons)])


def both(first: Callable[[], None], second: Callable[[], None]) -> Callable[[], None]:
    """Two functions as one."""

    def run() -> None:
        first()
        second()

    return run
