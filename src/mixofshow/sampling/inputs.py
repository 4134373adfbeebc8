"""What a call of the pipeline asks for: checked, and said in our words."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any, Final

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from PIL import Image
from torch import Tensor

from mixofshow.concepts.concept import Concept
from mixofshow.concepts.syntax import tell_of_marks
from mixofshow.errors import RegionError, require, shown
from mixofshow.progress import Progress, as_part
from mixofshow.sampling.controls import require_all_fit
from mixofshow.sampling.denoising import Control
from mixofshow.sampling.settings import ALSO, AUTO, FINDING, Composition, Region, SamplingSettings, without_auto

logger = logging.getLogger(__name__)

MAX_SEED: Final = 2**63
OUTPUTS: Final = ("pil", "np", "pt", "latent")
TENSORS: Final = ("latents",)
"""What `callback_on_step_end` may be given."""
_EMBEDS: Final = "give the prompt itself: it is encoded once for each cross-attention layer"
_STEPS: Final = "give num_inference_steps, or set them in a scheduler of your own (pipeline.scheduler)"
_IP_ADAPTER: Final = "use controls=[make_control(…)], or StableDiffusionPipeline.from_pipe(this)"
_SIZES: Final = "the size of the picture itself is told; enlarge with upscale"
_ONE_PROMPT: Final = "give prompt, which both text encoders read"
REFUSED: Final[Mapping[str, str]] = {
    **dict.fromkeys(("prompt_embeds", "negative_prompt_embeds"), _EMBEDS),
    **dict.fromkeys(("pooled_prompt_embeds", "negative_pooled_prompt_embeds"), _EMBEDS),
    **dict.fromkeys(("timesteps", "sigmas", "denoising_end"), _STEPS),
    **dict.fromkeys(("ip_adapter_image", "ip_adapter_image_embeds"), _IP_ADAPTER),
    **dict.fromkeys(("prompt_2", "negative_prompt_2"), _ONE_PROMPT),
    **dict.fromkeys(("original_size", "target_size", "negative_original_size", "negative_target_size"), _SIZES),
    **dict.fromkeys(("crops_coords_top_left", "negative_crops_coords_top_left"), _SIZES),
    "cross_attention_kwargs": "a LoRA's strength is set by set_adapters(names, weights)",
}
"""Arguments of diffusers' pipelines that are not taken here, and what to do instead."""

Callback = Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any]]
"""diffusers' `callback_on_step_end`: (pipeline, step, timestep, {"latents": …}) to what is to be changed of these."""


@dataclass(frozen=True)
class Inputs:
    """A call, checked. `images` are those to start from, `mask` what of them is drawn anew, `latents` the noise, where given.

    With `auto`, concepts that no region names are given places that are found.
    """

    prompts: Sequence[str]
    negatives: Sequence[str]
    regions: Sequence[Region]
    settings: SamplingSettings
    guidance_scale: float
    generators: Sequence[torch.Generator]
    images: Sequence[Image.Image]
    mask: Image.Image | None
    size: tuple[int, int]
    eta: float
    latents: Tensor | None
    regional_lora: bool | Sequence[Concept]
    auto: bool
    controls: Sequence[Control]
    output_type: str
    callback: Callback | None
    progress: Progress

    @property
    def steps(self) -> tuple[int, int]:
        """The first and last step that are done."""
        return self.settings.steps_done(from_image=bool(self.images))

    @property
    def regional(self) -> bool:
        """Whether regions are drawn by LoRAs of their own."""
        return self.regional_lora is not False or any(region.adapters is not None for region in self.regions)

    @property
    def finds_places(self) -> bool:
        """Whether a region's place is to be found."""
        return self.auto or any(region.auto for region in self.regions)

    def alone(self, number: int) -> Inputs:
        """The same for one of the pictures."""
        count = len(self.generators)

        def one(several: Sequence[Any]) -> list[Any]:
            return list(several) if len(several) < 2 else [several[number * len(several) // count]]

        return replace(
            self,
            prompts=one(self.prompts),
            negatives=one(self.negatives),
            generators=[self.generators[number]],
            images=one(self.images),
            latents=None if self.latents is None else self.latents[number : number + 1],
            progress=as_part(self.progress, number, count),
        )

    @property
    def guided(self) -> bool:
        """Whether there is a negative prompt's side."""
        return self.guidance_scale != 1.0


def check_inputs(pipeline: Any, given: dict[str, Any]) -> Inputs:
    """A call's arguments, by name, as they are meant. Raises SettingsError, RegionError."""
    more = given.pop("settings")
    former = {name: more.pop(name) for name in Composition.former if name in more}
    own = given["regional_lora"] = Composition.renamed(former).get("regional_lora", given["regional_lora"])
    holds = isinstance(own, bool) or (isinstance(own, list | tuple) and all(isinstance(one, Concept) for one in own))
    require(holds, "regional_lora", shown(own), "True, False, or a list of concepts (load_concept reads them)")
    for name, way_out in REFUSED.items():
        value = more.pop(name, None) if name in more else given.pop(name, None)
        empty = value is None or (isinstance(value, tuple | list | dict) and not any(value))
        require(empty, name, type(value).__name__, f"None here; {way_out}")
    chosen = {"num_inference_steps", "guidance_scale", "guidance_rescale", "width", "height", "strength", "clip_skip"}
    named = {name: value for name in chosen if (value := given.pop(name)) is not None}
    settings = SamplingSettings(**{ALSO.get(name, name): value for name, value in (named | more).items()})
    prompts, negatives = _texts(given["prompt"], given["negative_prompt"])
    each = 1 if (asked := given["num_images_per_prompt"]) is None else asked
    require(isinstance(each, Integral) and int(each) >= 1, "num_images_per_prompt", each, "at least 1")
    require(given["output_type"] in OUTPUTS, "output_type", given["output_type"], "one of " + ", ".join(OUTPUTS))
    kind = type(pipeline.scheduler).__name__
    fits = hasattr(pipeline.scheduler, "init_noise_sigma")  # which schedulers of flow matching lack
    require(fits, "scheduler", kind, "one for Stable Diffusion, such as DPMSolverMultistepScheduler")
    require_all_fit(given["controls"], pipeline.unet, settings.steps)
    count = each * len(prompts)
    images = _pictures(given["image"], count)
    width, height = settings.size(pipeline, images[0] if images else None)
    mask = _mask(given["mask_image"], images, (width, height))
    called = "image_strength" if "image_strength" in more else "strength"
    settings.require_possible(from_image=bool(images), masked=mask is not None, called=called)
    require(not images or given["latents"] is None, "latents", "latents and an image", "one of the two")
    inputs = Inputs(
        prompts=prompts,
        negatives=negatives,
        **_regions(given["regions"]),
        settings=settings,
        guidance_scale=pipeline.model.usual_guidance if settings.guidance_scale is None else settings.guidance_scale,
        generators=_generators(given["seed"], given["generator"], count),
        images=images,
        mask=mask,
        size=(width, height),
        eta=_eta(given["eta"], pipeline.scheduler),
        latents=_latents(given["latents"], pipeline, count, width, height),
        regional_lora=given["regional_lora"],
        controls=given["controls"],
        output_type=given["output_type"],
        callback=_callback(given["callback_on_step_end"], given["callback_on_step_end_tensor_inputs"]),
        progress=given["progress"],
    )
    _say_unused(inputs, pipeline.model.concepts)
    return inputs


def _texts(prompt: Any, negative: Any) -> tuple[list[str], list[str]]:
    """Prompts, and a negative prompt for each."""
    prompts = [prompt] if isinstance(prompt, str) else prompt
    holds = isinstance(prompts, list | tuple) and bool(prompts) and all(isinstance(one, str) for one in prompts)
    require(holds, "prompt", shown(prompt), "a text or a list of texts")
    if negative is None or isinstance(negative, str):
        return list(prompts), [negative or ""] * len(prompts)
    holds = isinstance(negative, list | tuple) and all(isinstance(one, str) for one in negative)
    require(holds, "negative_prompt", shown(negative), "a text, or a list of texts")
    require(len(negative) == len(prompts), "negative_prompt", len(negative), f"{len(prompts)}, one for each prompt")
    return list(prompts), list(negative)


def _regions(given: Any) -> dict[str, Any]:
    """The regions, and whether "auto" stands in their place or among them."""
    given, auto = without_auto(given)
    if not isinstance(given, list | tuple):
        raise RegionError(f"regions: expected a list of regions, found {type(given).__name__}; or '{AUTO}'")
    for number, one in enumerate(given):
        if not isinstance(one, Region):
            found = type(one).__name__
            raise RegionError(f"regions[{number}]: expected a Region, found {found}; Region(prompt, (left, top, …))")
    return {"regions": tuple(given), "auto": auto}


def _pictures(given: Any, count: int) -> list[Image.Image]:
    images = [] if given is None else [given] if isinstance(given, Image.Image) else list(given)
    require(len(images) in (0, 1, count), "image", f"{len(images)}", f"1 or {count} pictures")
    for one in images:
        require(isinstance(one, Image.Image), "image", type(one).__name__, "pictures (PIL.Image.Image)")
    return images


def _mask(given: Any, images: Sequence[Image.Image], size: tuple[int, int]) -> Image.Image | None:
    """The mask, grey (L), at the picture's size."""
    if given is None:
        return None
    require(isinstance(given, Image.Image), "mask_image", type(given).__name__, "a picture (PIL.Image.Image)")
    require(bool(images), "mask_image", "no image", "an image beside it, of which black is kept")
    grey: Image.Image = given.convert("L").resize(size, Image.Resampling.BOX)
    require(grey.getbbox() is not None, "mask_image", "black everywhere", "white where the picture is drawn anew")
    return grey


def _generators(seed: Any, given: Any, count: int) -> list[torch.Generator]:
    """One for each picture; without a seed, a random one, as torch's own randomness has it."""
    require(seed is None or given is None, "seed", shown(seed), "None with a generator, which has its own")
    if isinstance(given, torch.Generator):
        return [given] * count
    if given is not None:
        require(len(given) == count, "generator", f"{len(given)}", f"{count}, one for each picture")
        return list(given)
    seed = int(torch.randint(2**62, ())) if seed is None else seed
    holds = isinstance(seed, Integral) and not isinstance(seed, bool) and 0 <= int(seed) < MAX_SEED
    require(holds, "seed", shown(seed), f"a whole number from 0 to {MAX_SEED - 1}")
    return [torch.Generator().manual_seed(int(seed) + number) for number in range(count)]


def _eta(eta: float, scheduler: Any) -> float:
    require(isinstance(eta, Real) and 0 <= eta <= 1, "eta", shown(eta), "0 to 1")
    knows = "eta" in inspect.signature(scheduler.step).parameters
    require(not eta or knows, "eta", eta, f"0: {type(scheduler).__name__} has none; DDIMScheduler does")
    return eta


def _latents(given: Tensor | None, pipeline: Any, count: int, width: int, height: int) -> Tensor | None:
    if given is None:
        return None
    factor = pipeline.vae_scale_factor
    expected = (count, pipeline.vae.config.latent_channels, height // factor, width // factor)
    require(tuple(given.shape) == expected, "latents", tuple(given.shape), f"shape {expected}")
    return given.to(pipeline._execution_device, pipeline.unet.dtype)


def _callback(callback: Any, names: Sequence[str]) -> Callback | None:
    """The callback, which sees the latents and nothing else."""
    if isinstance(callback, PipelineCallback | MultiPipelineCallbacks):
        names = callback.tensor_inputs
    unknown = [name for name in names if name not in TENSORS]
    require(not unknown, "callback_on_step_end_tensor_inputs", shown(", ".join(unknown)), "latents, and nothing else")
    if callback is None or names:
        return callback
    return lambda pipeline, step, timestep, _: callback(pipeline, step, timestep, {})


def _say_unused(inputs: Inputs, concepts: Sequence[Concept]) -> None:
    """Warn of what is asked for and changes nothing in this call, or is read as something else."""
    settings = inputs.settings
    known = concepts if inputs.regional_lora is True else inputs.regional_lora
    alone = not inputs.regions and not inputs.auto
    idle = "without regions" if alone else "without concepts" if not known else ""
    unguided = "" if inputs.guided else "without guidance (`guidance_scale` 1)"
    unused = {
        "negative_prompt": any(inputs.negatives) and unguided,
        "regional_lora": inputs.regional_lora is not False and idle,
    }
    needed = {
        "guidance_rescale": unguided,
        "isolate": len(inputs.regions) < 2 and not inputs.auto and "with fewer than two regions",
        "attend": alone and "without regions",
        "image_strength": not inputs.images and "without a picture to start from (`image`)",
        "upscale_strength": settings.upscale == 1 and "without `upscale`",
        **dict.fromkeys(FINDING, not inputs.finds_places and "where no places are found (`regions` auto)"),
    }
    for name, where in (unused | {name: name in settings.changed and where for name, where in needed.items()}).items():
        if where:
            logger.warning("`%s` changes nothing %s", name, where)
    own = [text for one in inputs.regions for text in (one.prompt, one.negative_prompt or "")]
    tell_of_marks([*inputs.prompts, *inputs.negatives, *own], settings.prompt_syntax)
