"""The generators of random numbers of a rank: Python's, numpy's and torch's."""

from __future__ import annotations

import base64
import hashlib
import random

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict

from zgraph.errors import CheckpointError


class Randomness(BaseModel):
    """The states of all generators; torch's as bytes in base64."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    python: tuple[int, tuple[int, ...], float | None]
    numpy: tuple[str, tuple[int, ...], int, int, float]
    torch: str
    cuda: str | None

    @classmethod
    def here(cls) -> Randomness:
        """Those of this process, now."""
        version, numbers, gauss = random.getstate()
        kind, keys, *rest = np.random.get_state(legacy=True)
        cuda = _packed(torch.cuda.get_rng_state()) if torch.cuda.is_available() else None
        return cls(
            python=(version, numbers, gauss),
            numpy=(kind, tuple(keys.tolist()), *rest),  # type: ignore[union-attr]
            torch=_packed(torch.get_rng_state()),
            cuda=cuda,
        )

    def restore(self) -> None:
        """Go on as that process would have.

        Raises:
            CheckpointError: these are no states.
        """
        try:
            random.setstate(self.python)
            kind, keys, *rest = self.numpy
            np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))  # type: ignore[arg-type]
            torch.set_rng_state(_unpacked(self.torch))
            if self.cuda is not None and torch.cuda.is_available():
                torch.cuda.set_rng_state(_unpacked(self.cuda))
        except (ValueError, TypeError, RuntimeError, OverflowError) as error:
            raise CheckpointError(f"the states of the generators of random numbers are damaged: {error}") from None


def start_anew(seed: int, step: int, rank: int) -> None:
    """Seed all generators of a rank that was not there before."""
    digest = hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()
    number = int.from_bytes(digest[:4], "little")
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def _packed(state: torch.Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode()


def _unpacked(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text, validate=True)), dtype=torch.uint8)
