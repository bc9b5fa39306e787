"""Every error that zgraph raises on purpose: one class a kind of mistake, each message naming its remedy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


def nearest(name: str, known: Iterable[str], most: int = 1) -> list[str]:
    """Suggestions for a mistyped name: known names that begin with it, then similar ones.

    >>> nearest("a100", ["h100", "a100-80"])
    ['a100-80']
    """
    names = [*known]
    begun = [other for other in names if name and other.startswith(name)]
    return [*dict.fromkeys([*begun, *get_close_matches(name, names, most)])][:most]


def did_you_mean(name: str, known: Iterable[str], otherwise: str, most: int = 1) -> str:
    """The remedy for a mistyped name, or what to say where nothing known is near."""
    near = nearest(name, known, most)
    return f"did you mean {', '.join(near)}?" if near else otherwise


def in_one_line(error: BaseException, most: int = 240) -> str:
    """The kind of an error and its words on one line. Compilers say at length where, and at the end what: of many words
    the first and the last are left.

    >>> in_one_line(ValueError("at 3:1:\\n  x = y"))
    'ValueError: at 3:1: x = y'
    """
    words = " ".join(str(error).split())
    if len(words) > most:
        words = f"{words[: most // 2]} ... {words[-most // 2 :]}"
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


class ZgraphError(Exception):
    """The base of all of zgraph's errors, so that `except ZgraphError` catches what zgraph means to say."""


class UsageError(ZgraphError, ValueError):
    """An argument of a public function has a value that means nothing (a stage outside 0..3, say)."""


class DtypeError(UsageError):
    """A dtype option has a value that is no dtype, or none to compute in. The message lists the accepted ones."""


class ConfigError(UsageError):
    """A configuration in which something is wrong.

    Args:
        problems: all that is wrong, each with its place and what would be right.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        count = "a problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__("\n  ".join([f"the configuration has {count}:", *self.problems]))

    def __reduce__(self) -> tuple[type[ConfigError], tuple[tuple[str, ...]]]:
        return type(self), (self.problems,)  # between processes


class AbsentError(UsageError, AttributeError):
    """A name that DeepSpeed has and zgraph has not. The message says what to do instead."""


class AbsentImportError(UsageError, ImportError):
    """The same of a name in `from zgraph.deepspeed... import name`, where Python keeps no other error's message."""


class PlacementError(UsageError):
    """A parameter cannot be cut as was asked, or a model cannot be computed in parts along a model axis."""


class BatchMismatchError(ZgraphError):
    """Ranks that compute one op together were given different batches, or draw different random numbers."""


class AlreadyCompiledError(UsageError):
    """`zgraph.compile` was called on a model that is compiled already, or holds a part that is."""


class ShardError(UsageError, RuntimeError):
    """An op outside of the compiled model met this rank's shard of a parameter or gradient, and needs all of it."""


class TextError(ZgraphError, ValueError):
    """Text that does not parse. The message shows the line and a caret under the place.

    Args:
        message: what is wrong, and what would be right.
        text: the line at fault, or "" where there is none to show.
        column: 0-based column of the fault in `text`.
        line: 1-based number of the line, or 0 for a text of one line.
    """

    def __init__(self, message: str, text: str = "", column: int = 0, line: int = 0) -> None:
        self.column, self.line = column, line
        where = f"line {line}: " if line else ""
        shown = text if len(text) <= 160 else text[max(0, column - 80) : column + 80]
        caret = column if len(text) <= 160 else min(column, 80)
        super().__init__(f"{where}{message}" + (f"\n  {shown}\n  {' ' * caret}^" if text else ""))


class RecipeError(TextError):
    """A recipe (a pipeline of passes written as text) that does not parse, or names what does not exist."""


class CodecError(TextError, UsageError):
    """A codec's text does not parse, or names what there is not."""


class ZirError(TextError):
    """A `.zir` text that does not parse."""


class UnknownOpError(ZgraphError, LookupError):
    """A graph names an op that is none, or that this process does not know."""


class RunFileError(ZgraphError, ValueError):
    """A run file that cannot be read or is damaged, or a graph that is not in it."""


class RecordError(ZgraphError, ValueError):
    """A folder that is no record of a training, or one without what it was asked for."""


class GraphNameError(RunFileError, UsageError):
    """A run file has no graph of that name."""


class ContractError(ZgraphError):
    """The passes of a recipe do not fit together: one needs what none before it provides."""


class VerifyError(ZgraphError):
    """A graph breaks a rule of the IR. The message names the rule, the op, its source and the pass that made it."""


class HardwareError(ZgraphError):
    """There is no such hardware profile, or it does not fit what is asked of it."""


class BudgetError(ZgraphError):
    """A plan does not fit the memory budget. The message says which is the smallest that it fits.

    Args:
        message: what is said.
        needed_bytes: the budget that it takes; 0 where that is not known.
        where: the node that takes the most, or what else does.
    """

    def __init__(self, message: str, needed_bytes: int = 0, where: str = "") -> None:
        super().__init__(message)
        self.needed_bytes, self.where = needed_bytes, where


class OffloadError(ZgraphError):
    """Offloaded tensors do not fit where they are to go. Nothing was moved."""


class SimulationError(ZgraphError):
    """A plan that would deadlock, or whose lanes touch a buffer in no order. The message names the instructions."""


class InterpretError(ZgraphError):
    """The reference interpreter was given inputs that do not fit the graph."""


class CheckError(UsageError):
    """A graph cannot be compared with others on this machine: it has an op of another device, say."""


class CaptureError(ZgraphError):
    """The model cannot be captured as zgraph needs it."""


class GraphBreakError(CaptureError):
    """The model's forward cannot be captured as one graph. The message points at the line that breaks it."""


class PlanMismatchError(ZgraphError):
    """The ranks compiled different programs. Raised on every rank before any of them runs."""


class PeerError(ZgraphError):
    """Another rank failed or is gone; this rank cannot go on without it."""


class BackwardTwiceError(ZgraphError, RuntimeError):
    """A second backward through a graph whose saved values the first one has freed."""


class StaleParametersError(ZgraphError, RuntimeError):
    """A backward came after its forward's parameters had been changed."""


class EscapedParameterError(ZgraphError):
    """The forward returned a parameter, or a view of one, whose gathered memory is gone after the call."""


class StateDictError(ZgraphError, RuntimeError):
    """A state dict that does not fit the model. Nothing was loaded."""


class CheckpointError(ZgraphError, RuntimeError):
    """A checkpoint that cannot be written or read, or does not fit; raised on every rank, with what went wrong where.
    What was saved before is still there."""


class CacheError(ZgraphError):
    """A folder of the cache is not this user's own, or cannot be written. The message says what to do."""


class KeptPlanWarning(UserWarning):
    """A kept plan was damaged or is not right, or could not be kept: the passes run, as without it."""


class KernelError(ZgraphError, ValueError):
    """A kernel's specification does not parse or does not hold together."""


class InferenceError(ZgraphError):
    """A model cannot be run for inference as it is, or gave numbers that are none."""


class ContextLengthError(UsageError):
    """A prompt and the tokens asked for are longer than the cache."""


class OverloadError(ZgraphError):
    """A server has no room for more requests, or is stopping. Ask again later."""


class QuantisationError(UsageError):
    """A layer's weight cannot be kept in the integers asked for."""
