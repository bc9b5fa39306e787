"""Batches for the models of benchmarks/zoo_models.py by what their forward takes, and losses of what it returns."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo_models import SEED, Architecture, build, parts
from benchmarks.zoo_sizes import IMAGE, VARIANTS, Variant, value_of
from benchmarks.zoo_torch import MODELS, TorchInputs

Batch = dict[str, Any]

LENGTH = 16
ROWS = 2
SAMPLES = 1600


def _find(config: Any, *names: str, otherwise: Any = None) -> Any:
    """The first of these fields that the configuration or a part of it has."""
    for name in names:
        for part in parts(config):
            if (value := value_of(part, name)) is not None:
                return value
    return otherwise


class Inputs:
    """Makes batches for a model by what its forward takes.

    Args:
        model: it.
        task: what it is for.
        num_image_tokens: places of a sequence that an image takes, where that is known.
        images: what is done to images; see `Variant`.
    """

    def __init__(self, model: nn.Module, task: str, num_image_tokens: int = 4, images: str = "") -> None:
        self.config: Any = model.config
        self.task, self.num_image_tokens, self.images = task, num_image_tokens, images
        self.dtype = torch.float32
        self.names = set(inspect.signature(model.forward).parameters)
        self.main = str(getattr(model, "main_input_name", "input_ids"))

    def batch(self, seed: int) -> Batch:
        """A batch drawn with this seed."""
        self.random = torch.Generator().manual_seed(seed)
        made: Batch = {}
        for name, make in self._makers().items():
            if name in self.names and (value := make()) is not None:
                made[name] = value
        if "attention_mask" in self.names and "input_ids" in made:
            made["attention_mask"] = torch.ones_like(made["input_ids"])
        elif self.task == "CTC" and "attention_mask" in self.names and "input_features" in made:
            made["attention_mask"] = torch.ones(made["input_features"].shape[:2], dtype=torch.int64)
        if self.main not in made and self.main in ("input_values", "input_features"):
            made[self.main] = self._sound(self.main)
        if "labels" in self.names and (labels := self._labels(made)) is not None:
            made["labels"] = labels
        return {name: self._cast(value) for name, value in made.items()}

    def _cast(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._cast(one) for one in value]
        return value.to(self.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    def _makers(self) -> dict[str, Callable[[], Any]]:
        return {
            "input_ids": self._ids,
            "pixel_values": self._image,
            "pixel_values_videos": lambda: self._image() if self.task == "video classification" else None,
            "high_res_pixel_values": self._image,
            "qformer_input_ids": lambda: self._words(LENGTH),
            "image_embeds_position_mask": lambda: self._kinds(),
            "image_grid_thw": lambda: torch.tensor([[1, 4, 4]] * ROWS),
            "input_features": lambda: self._sound("input_features"),
            "input_values": lambda: self._sound("input_values"),
            "pixel_mask": lambda: None,
            "return_loss": lambda: True if self.task == "CLIP-like" else None,
            "bool_masked_pos": self._masked,
            "decoder_input_ids": lambda: None if "labels" in self.names else self._words(LENGTH),
            "mm_token_type_ids": self._kinds,
            "token_type_ids": self._kinds if self.task == "vision-language" else lambda: None,
            "image_sizes": self._image_sizes,
            "bbox": lambda: torch.zeros(ROWS, LENGTH, 4, dtype=torch.int64),
            "task_inputs": lambda: self._words(LENGTH),
            "spatial_shapes": lambda: torch.tensor([[4, 4]] * ROWS),
            "pixel_attention_mask": lambda: (
                torch.ones(ROWS, 16, dtype=torch.int64) if "spatial_shapes" in self.names else None
            ),
        }

    def _text(self) -> bool:
        return "input_ids" in self.names and self.task not in ("speech seq2seq", "CTC", "audio classification")

    def _words(self, length: int) -> Tensor:
        return torch.randint(3, 70, (ROWS, length), generator=self.random)

    def _ids(self) -> Tensor | None:
        if not self._text():
            return None
        ids = self._words(LENGTH)
        if self.task == "vision-language":
            image = _find(self.config, "image_token_id", "image_token_index", otherwise=90)
            ids = torch.cat([ids[:, :4], torch.full((ROWS, self.num_image_tokens), int(image)), ids[:, 4:]], 1)
        eos = getattr(self.config, "eos_token_id", None)
        if self.task in ("CLIP-like", "seq2seq") and isinstance(eos, int):
            ids[:, -1] = eos
        return ids

    def _kinds(self) -> Tensor | None:
        ids = torch.zeros(ROWS, LENGTH + self.num_image_tokens, dtype=torch.int64)
        ids[:, 4 : 4 + self.num_image_tokens] = 1
        return ids if self.task == "vision-language" else None

    def _image_sizes(self) -> Tensor | None:
        wanted = self.task == "vision-language" and self.images != "no sizes"
        return torch.tensor([[IMAGE, IMAGE]] * ROWS) if wanted else None

    def _image(self) -> Tensor:
        channels = int(_find(self.config, "num_channels", "in_channels", "in_chans", otherwise=3))
        size = _find(self.config, "image_size", otherwise=IMAGE)
        high, wide = (size, size) if isinstance(size, int) else tuple(size)[-2:]
        if "image_grid_thw" in self.names or "spatial_shapes" in self.names:
            patch = int(_find(self.config, "patch_size", otherwise=8))
            times = int(_find(self.config, "temporal_patch_size", otherwise=1))
            if "spatial_shapes" in self.names:
                return torch.randn(ROWS, 16, channels * patch * patch, generator=self.random)
            return torch.randn(ROWS * 16, channels * times * patch * patch, generator=self.random)
        if self.task == "video classification":
            return torch.randn(
                ROWS,
                int(_find(self.config, "num_frames", "frames_per_clip", otherwise=4)),
                channels,
                high,
                wide,
                generator=self.random,
            )
        images = torch.randn(ROWS, channels, high, wide, generator=self.random)
        return images[:, None] if self.images == "in a list" else images

    def _sound(self, name: str) -> Tensor | None:
        if self.main != name and self._text():
            return None
        if name == "input_values" and "spectrogram" not in str(type(self.config)).lower():
            return torch.randn(ROWS, SAMPLES, generator=self.random)
        mels = int(
            _find(
                self.config,
                "num_mel_bins",
                "input_feat_per_channel",
                "feature_projection_input_dim",
                "num_mel_banks",
                otherwise=16,
            )
        )
        length = int(_find(self.config, "max_length", otherwise=64)) if name == "input_values" else 128
        shape = (
            (ROWS, mels, length)
            if self.task == "speech seq2seq" and "num_mel_bins" in vars(self.config)
            else (ROWS, length, mels)
        )
        return torch.randn(shape, generator=self.random)

    def _masked(self) -> Tensor:
        size, patch = (int(_find(self.config, n, otherwise=o)) for n, o in (("image_size", IMAGE), ("patch_size", 8)))
        return torch.arange((size // patch) ** 2).remainder(2).bool().expand(ROWS, -1).clone()

    def _labels(self, made: Batch) -> Tensor | None:
        if self.task.endswith("classification"):
            return torch.randint(0, 5, (ROWS,), generator=self.random)
        if self.task == "segmentation":
            size = tuple(made["pixel_values"].shape[-2:])
            return torch.randint(0, 5, (ROWS, *size), generator=self.random)
        if self.task in ("segmentation without labels", "depth", "backbone", "masked image", "CLIP-like"):
            return None
        if self.task == "seq2seq" and not getattr(self.config, "is_encoder_decoder", True):
            return made["input_ids"].clone() if "input_ids" in made else None
        if self.task in ("CTC", "seq2seq", "speech seq2seq"):
            return self._words(LENGTH if self.task == "seq2seq" else 6)
        return made["input_ids"].clone() if "input_ids" in made else None


def loss_of(output: Any) -> Tensor:
    """The loss that the model computed, or else the mean square of what it returned."""
    loss = getattr(output, "loss", None)
    if loss is not None:
        return loss.sum()  # type: ignore[no-any-return]
    tensors = [t for t in _tensors(output) if t.is_floating_point() and t.requires_grad]
    if not tensors:
        raise ValueError("the model returned nothing to train on")
    return torch.stack([t.float().square().mean() for t in tensors]).sum()


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)


WANTED_TOKENS = re.compile(r"tokens[:=]?\s*(\d+)[^\d]*features[:=]?\s*(?:torch\.Size\(\[)?(\d+)", re.IGNORECASE)


def runnable(architecture: Architecture) -> tuple[nn.Module, Inputs | TorchInputs]:
    """A model that runs eagerly and what makes its batches.

    Raises:
        Exception: what the usual variant of it raises, if no variant runs.
    """
    if architecture.task == "torch":
        torch.manual_seed(SEED)
        own = MODELS[architecture.name]().train()
        return own, TorchInputs(own)
    variant, num_image_tokens = _fitting(architecture)
    model = build(architecture, variant)
    return model, Inputs(model, architecture.task, num_image_tokens, variant.images)


@functools.lru_cache
def _fitting(architecture: Architecture) -> tuple[Variant, int]:
    """The first variant of an architecture that runs, and the number of image tokens that the model says it wants."""
    first: Exception | None = None
    for variant in VARIANTS:
        try:
            return variant, _run_once(architecture, variant)
        except ImportError:
            raise
        except Exception as error:
            first = first or error
    raise first or ValueError("there are no variants")


def _run_once(architecture: Architecture, variant: Variant) -> int:
    model = build(architecture, variant)
    num_image_tokens = 4
    for _ in range(2):
        inputs = Inputs(model, architecture.task, num_image_tokens, variant.images)
        torch.manual_seed(SEED)
        try:
            loss_of(model(**inputs.batch(0)))
        except (ValueError, RuntimeError) as error:
            found = WANTED_TOKENS.search(str(error)) if architecture.task == "vision-language" else None
            wanted = int(found[2]) // ROWS if found else num_image_tokens
            if wanted in (0, num_image_tokens) or wanted > 600:
                raise
            num_image_tokens = wanted
        else:
            return num_image_tokens
    raise ValueError("the model wants another number of image tokens each time")
