"""Controls: a picture that says what lies where, by ControlNet (Zhang et al., 2023) or T2I-Adapter (Mou et al., 2023).

The networks are diffusers' own. A control is one of them with its picture, and says for every step of sampling what
is added inside the UNet, as keyword arguments for it; `denoise` adds up those of several controls. A further kind of
control is one class in CONTROLS.
"""

from __future__ import annotations

import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from diffusers import ControlNetModel, T2IAdapter
from einops import einsum, repeat
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from mixofshow.bases.configs import check_config
from mixofshow.bases.loading import EMBEDDED_CONTROLS
from mixofshow.bases.strangers import quiet, strangers_model
from mixofshow.errors import BadInputError, SettingsError, nearest, require, shown
from mixofshow.reading import parse_json, read_bytes
from mixofshow.sampling.pictures import PictureSource, read_picture
from mixofshow.sampling.settings import MAX_STRENGTH

logger = logging.getLogger(__name__)

StrengthMap = PictureSource | np.ndarray[Any, Any] | Tensor
"""How strongly a control counts where, laid over the whole picture: (rows, columns) of numbers, or white to black."""

XL_ADAPTER: Final = "full_adapter_xl"
CONFIG: Final = "config.json"


class PictureControl(ABC):
    """A network, its picture, and how strongly, when and where it counts.

    `strength` multiplies all that is added; 0 is nothing. `start` and `end` are shares of the steps, as in
    diffusers: step k of n, from 1, is controlled if start <= (k - 1)/n and k/n <= end. `strength_map` multiplies place by
    place. Raises SettingsError, and BadInputError for a picture that cannot be read.
    """

    def __init__(
        self,
        network: Any,
        picture: PictureSource,
        *,
        strength: float = 1.0,
        start: float = 0.0,
        end: float = 1.0,
        strength_map: StrengthMap | None = None,
    ) -> None:
        check_extent(strength, start, end)
        self.network, self.strength, self.start, self.end = network, strength, start, end
        self.picture = read_picture(picture, "RGB")
        self.strength_map = None if strength_map is None else _as_map(strength_map)
        self._fitted: tuple[Any, Tensor] | None = None

    def residuals(
        self,
        latents: Tensor,
        timestep: Tensor,
        text: Tensor,
        step: int,
        steps: int,
        *,
        told: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Keyword arguments for the UNet in step `step` of `steps`, from 1; none where the control does not count.

        `latents` (rows, channels, height, width) is the model's input; `text` (prompts, layers, tokens, dim), of
        which equal parts of the rows share one; `told` what the UNet is told beside the text, see `conditions`.
        """
        if self.strength == 0 or not self.holds(step, steps):
            return {}
        return self._added(latents, timestep, text, told or {})

    def holds(self, step: int, steps: int) -> bool:
        """Whether step `step` of `steps`, from 1, lies between start and end."""
        return self.start <= (step - 1) / steps and step / steps <= self.end

    @abstractmethod
    def _added(self, latents: Tensor, timestep: Tensor, text: Tensor, told: Mapping[str, Any]) -> dict[str, Any]:
        """What is added in a step in which the control counts."""

    def _fitted_picture(self, latents: Tensor, *, factor: int, channels: int) -> Tensor:
        """The picture as the network sees it, (1, channels, height, width) in [0, 1], `factor` times the latents' size."""
        rows, columns = latents.shape[-2:]
        key = (rows, columns, latents.dtype, latents.device)
        if self._fitted is None or self._fitted[0] != key:
            with quiet():  # diffusers warns of nothing, in so many words
                self.network.to(latents.device, latents.dtype)
            fitted = _fit(self.picture, width=columns * factor, height=rows * factor, channels=channels)
            self._fitted = key, fitted.to(latents)
        return self._fitted[1]

    def _weighed(self, residual: Tensor) -> Tensor:
        """A residual (rows, channels, height, width) of any level, times what it counts in each cell."""
        if self.strength_map is None:
            return residual * self.strength
        return residual * (self.strength * at_level(self.strength_map, *residual.shape[-2:])).to(residual)


class AdapterControl(PictureControl):
    """A T2I-Adapter: it sees the picture alone, so that its features are computed once and not in every step."""

    _features: tuple[Tensor, list[Tensor]] | None = None

    def _added(self, latents: Tensor, timestep: Tensor, text: Tensor, told: Mapping[str, Any]) -> dict[str, Any]:
        config = self.network.config
        # SDXL's UNet adds the first feature behind its first level, where the latents have half their size.
        factor = self.network.downscale_factor // (2 if config.adapter_type == XL_ADAPTER else 1)
        picture = self._fitted_picture(latents, factor=factor, channels=config.in_channels)
        if self._features is None or self._features[0] is not picture:
            self._features = picture, [self._weighed(feature) for feature in self.network(picture)]
        # The UNet empties the list that it is given.
        features = [feature.expand(len(latents), -1, -1, -1) for feature in self._features[1]]
        return {"down_intrablock_additional_residuals": features}


class ControlNetControl(PictureControl):
    """A ControlNet: it sees latents, time and text too, and runs in every step.

    diffusers' ControlNet takes one text for all of its layers: it gets that of the first cross-attention layer.
    """

    def _added(self, latents: Tensor, timestep: Tensor, text: Tensor, told: Mapping[str, Any]) -> dict[str, Any]:
        config = self.network.config
        # Every convolution of the condition's embedding after the first halves its size.
        factor = 2 ** (len(config.conditioning_embedding_out_channels) - 1)
        picture = self._fitted_picture(latents, factor=factor, channels=config.conditioning_channels)
        picture = picture.expand(len(latents), -1, -1, -1)
        words = repeat(text[:, 0].to(latents), "prompts ... -> (prompts same) ...", same=len(latents) // len(text))
        down, mid = self.network(latents, timestep, words, picture, return_dict=False, **told)
        return {
            "down_block_additional_residuals": tuple(self._weighed(residual) for residual in down),
            "mid_block_additional_residual": self._weighed(mid),
        }


CONTROLS: Final[dict[str, tuple[Any, type[PictureControl]]]] = {
    "T2IAdapter": (T2IAdapter, AdapterControl),
    "ControlNetModel": (ControlNetModel, ControlNetControl),
}
"""By the class that a network's config.json names: diffusers' class, and ours that steers with it."""


def load_control(source: str | Path, *, unet: Any = None, dtype: torch.dtype = torch.float32) -> Any:
    """A control's network, frozen, from a diffusers folder or by an embedded name such as "emojiland-controlnet".

    With a `unet`, also checks that it fits. Raises SettingsError.
    """
    folder, name = _found(source)
    network = _network(CONTROLS[name][0], folder, f"control '{shown(source)}'", dtype)
    if unet is not None:
        require_fit(network, unet, str(source))
    return network.requires_grad_(False).eval()


def network_hash(source: str | Path) -> str:
    """Hex digits of a control's network as it lies on disk, its config.json and weights. Raises SettingsError."""
    folder, _ = _found(source)
    digest = hashlib.sha256()
    for path in (folder / CONFIG, *sorted(folder.glob("*.safetensors"))):
        try:
            with path.open("rb") as file:
                digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise SettingsError(f"control '{shown(source)}': {path.name} cannot be read ({error.strerror})") from error
    return digest.hexdigest()


def _found(source: str | Path) -> tuple[Path, str]:
    """The folder of a control's network, and the class in CONTROLS that it says it is. Raises SettingsError."""
    folder = Path(EMBEDDED_CONTROLS.get(str(source), source))
    try:
        config = parse_json(read_bytes(folder / CONFIG), str(source), finite=False)
        name = str(config["_class_name"])
    except (BadInputError, KeyError, TypeError) as error:
        known = ", ".join(EMBEDDED_CONTROLS)
        raise SettingsError(
            f"control '{shown(source)}': no folder with the config.json of a network; known by name are {known}"
            + nearest(str(source), EMBEDDED_CONTROLS)
        ) from error
    if name not in CONTROLS:
        raise SettingsError(f"control '{shown(source)}': expected {' or '.join(CONTROLS)}, found {shown(name)}")
    check_config(config, CONTROLS[name][0], f"control '{shown(source)}': {CONFIG}", SettingsError)
    return folder, name


def _network(kind: Any, folder: Path, name: str, dtype: torch.dtype) -> Any:
    with strangers_model(f"{name}: could not be loaded", SettingsError):
        # Only safetensors: a pickle could run code.
        network, report = kind.from_pretrained(
            folder, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    # diffusers only warns of tensors that are not there, and leaves them random.
    missing = [*report["missing_keys"], *report["unexpected_keys"]]
    require(not missing, f"{name}: tensors missing or unknown", shown(", ".join(missing)), "none")
    broken = [key for key, value in network.state_dict().items() if not torch.isfinite(value).all()]
    require(not broken, f"{name}: tensors with numbers that are not finite", shown(", ".join(broken)), "none")
    return network


def make_control(network: Any, picture: PictureSource, **settings: Any) -> PictureControl:
    """A control of the network's kind; `settings` are PictureControl's. Raises SettingsError, BadInputError."""
    name = type(network).__name__
    require(name in CONTROLS, "control", name, " or ".join(CONTROLS))
    return CONTROLS[name][1](network, picture, **settings)


def require_fit(network: Any, unet: Any, source: str = "control") -> None:
    """Raise SettingsError unless the network was made for UNets such as this one."""
    for name, found, expected in _facts(network, unet):
        require(found == expected, f"{shown(source)}: {name}", found, f"the base model's {expected}")


def require_all_fit(controls: Sequence[Any], unet: Any, steps: int) -> None:
    """The same for those of some controls that have a network, called by their numbers; each must count in some step."""
    for number, control in enumerate(controls):
        if isinstance(control, PictureControl):
            require_fit(control.network, unet, f"controls[{number}]")
            counts = control.strength == 0 or any(control.holds(step, steps) for step in range(1, steps + 1))
            extent = f"{control.start:g} to {control.end:g}"
            require(counts, f"controls[{number}]: start, end", extent, f"a whole step of {steps} between them")


def _facts(network: Any, unet: Any) -> Iterator[tuple[str, object, object]]:
    """What a network and a UNet must agree in: its name, as the network has it, and as the UNet needs it."""
    config, base = network.config, unet.config
    widths = list(base.block_out_channels)
    if isinstance(network, T2IAdapter):
        # Where the first level has no attention, as in SDXL, features go behind the levels and to the middle.
        behind = "Attn" not in base.down_block_types[0]
        yield "channels of its levels", list(config.channels), [*widths, widths[-1]] if behind else widths
        yield "adapter for SDXL", config.adapter_type == XL_ADAPTER, behind
        return
    yield "channels of its levels", list(config.block_out_channels), widths
    yield "in_channels", config.in_channels, base.out_channels  # an inpainting base's UNet is given more than latents
    for key in ("cross_attention_dim", "addition_embed_type"):
        yield key, config.get(key), base.get(key)


def check_extent(strength: float, start: float, end: float) -> None:
    """Raise SettingsError unless a control may count so much, for this share of the steps."""
    require(0 <= strength <= MAX_STRENGTH, "strength", strength, f"0 to {MAX_STRENGTH:g}")
    require(0 <= start < end <= 1, "start, end", f"{start}, {end}", "0 <= start < end <= 1")


def map_of_regions(regions: Sequence[tuple[Tensor, float]], *, outside: float = 1.0) -> Tensor:
    """Strengths of regions as one map. Pairs of a coverage (rows, columns) in [0, 1] and a strength -> (rows, columns).

    Where regions overlap, the average by coverage; what no region covers has the strength `outside`.
    """
    coverage = torch.stack([covered for covered, _ in regions])
    strengths = torch.tensor([strength for _, strength in regions]).to(coverage)
    total = coverage.sum(0)
    inside = einsum(coverage, strengths, "region row column, region -> row column")
    return inside / total.clamp(min=1) + outside * (1 - total).clamp(min=0)


def at_level(strength_map: Tensor, rows: int, columns: int) -> Tensor:
    """The map over a feature map's cells, each the mean of its area: (height, width) -> (rows, columns)."""
    return F.interpolate(strength_map[None, None], size=(rows, columns), mode="area")[0, 0]


def _as_map(given: StrengthMap) -> Tensor:
    if isinstance(given, Image.Image | str | Path):
        values = torch.from_numpy(np.array(read_picture(given, "L"))).float() / 255
    else:
        values = torch.as_tensor(given).float()
    require(values.ndim == 2 and values.numel() > 0, "strength_map", tuple(values.shape), "rows and columns")
    allowed = bool(((values >= 0) & (values <= MAX_STRENGTH)).all())
    require(allowed, "strength_map", f"{values.min():g} to {values.max():g}", f"numbers from 0 to {MAX_STRENGTH:g}")
    return values


def _fit(picture: Image.Image, *, width: int, height: int, channels: int) -> Tensor:
    if picture.size != (width, height):
        found = f"{picture.width} x {picture.height}"
        logger.warning("the control's picture of %s pixels is resized to %d x %d", found, width, height)
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    values = torch.from_numpy(np.array(picture.convert("L" if channels == 1 else "RGB"))).float() / 255
    return values.reshape(1, height, width, -1).permute(0, 3, 1, 2)
