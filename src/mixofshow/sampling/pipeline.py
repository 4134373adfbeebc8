"""Sampling: a prompt and regions to pictures. Encode, denoise, decode are three functions."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Final, Protocol, Self

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.auto_pipeline import SUPPORTED_TASKS_MAPPINGS
from diffusers.schedulers import KarrasDiffusionSchedulers
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from mixofshow.bases.families import clip_skipped, family_of, takes_masks
from mixofshow.bases.parts import exclusive
from mixofshow.concepts.adapters import silenced
from mixofshow.concepts.concept import Concept
from mixofshow.concepts.interchange.importing import as_concept
from mixofshow.concepts.model import ConceptModel, load_model, with_concept
from mixofshow.errors import BadInputError, SettingsError, shown
from mixofshow.progress import Progress, silent
from mixofshow.sampling.attend import attend_and_excite
from mixofshow.sampling.conditioning import EncodedPrompt, OwnText, RegionAdapters, adapters_of, encode
from mixofshow.sampling.denoising import Control, Relay, denoise
from mixofshow.sampling.finding import Layout, PlaceFinder, with_wanted
from mixofshow.sampling.inputs import Callback, Inputs, check_inputs
from mixofshow.sampling.latents import at_size, cells_of, decode, initial_latents, masked_channels, picture_latents
from mixofshow.sampling.loaders import ConceptLoaderMixin, loading_options
from mixofshow.sampling.regional_lora import own_texts
from mixofshow.sampling.settings import Region


class PipelineOutput(list[Any]):
    """Pictures as a list; `images` is what diffusers' pipelines have there: with "np", "pt", "latent" all in one array.

    `layouts` has the places that were found in each of them, with regions "auto".
    """

    nsfw_content_detected = None
    """No safety checker is run."""

    def __init__(self, images: Any, layouts: Sequence[Layout] = ()) -> None:
        super().__init__(images)
        self.images = self if isinstance(images, list) else images
        self.layouts = list(layouts)


def joined(outputs: Sequence[PipelineOutput]) -> PipelineOutput:
    """Pictures that were drawn one by one, as one output."""
    images: list[Any] = [one.images for one in outputs]
    layouts = [layout for one in outputs for layout in one.layouts]
    if isinstance(images[0], Tensor):
        return PipelineOutput(torch.cat(images), layouts)
    if isinstance(images[0], np.ndarray):
        return PipelineOutput(np.concatenate(images), layouts)
    return PipelineOutput([image for of_one in images for image in of_one], layouts)


class HasModel(Protocol):
    """What `fuse` gives."""

    @property
    def model(self) -> ConceptModel:
        """The fused model."""


class _Pipeline(ConceptLoaderMixin, DiffusionPipeline):  # type: ignore[misc]
    """What a pipeline of diffusers' becomes when its model knows concepts."""

    base_class: ClassVar[str]
    _callback_tensor_inputs: ClassVar = ["latents"]

    def _prepare(self, parts: Mapping[str, Any], **config: Any) -> None:
        """As diffusers' own constructor, which would also change old configurations of modules that we only borrow."""
        DiffusionPipeline.__init__(self)
        self.register_modules(**parts)
        self.register_to_config(**config)
        self.vae_scale_factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self.model = ConceptModel(self)
        self._interrupt = False

    @classmethod
    def of(cls, model: ConceptModel | HasModel) -> Self:
        """From a model that is loaded already, or from what `fuse` gave."""
        model = getattr(model, "model", model)
        if not isinstance(model, ConceptModel):
            raise BadInputError(f"of: expected what fuse or load_model gives, found {shown(type(model).__name__)}")
        base = model.pipeline
        kind: Any = KINDS[family_of(base).pipeline_class]
        parts, settings = kind._get_signature_keys(kind)
        config = {key: base.config[key] for key in settings if key in base.config}
        made: Self = kind(**{part: getattr(base, part, None) for part in parts}, **config)
        made.register_to_config(_name_or_path=base.config.get("_name_or_path"))
        made.set_progress_bar_config(disable=True)
        made.model = replace(model, pipeline=made)
        return made

    @classmethod
    def from_pipe(cls, pipeline: Any, **options: Any) -> Self:
        """As diffusers': a pipeline on the modules of another. Concepts that the other knows are known here too."""
        made = super().from_pipe(pipeline, **options)
        known = getattr(pipeline, "model", None)
        if isinstance(known, ConceptModel):
            made.model, made._strengths = replace(known, pipeline=made), getattr(pipeline, "_strengths", None)
        return made

    @classmethod
    def from_pretrained(cls, name: str | Path, **options: Any) -> Self:
        """From an embedded base's name, a diffusers folder, a fused folder or a delta file; options of `load_model`.

        Of diffusers' options `torch_dtype`, `local_files_only`, one device as `device_map` and parts of the pipeline
        (`scheduler=…`) are taken too. Raises SettingsError for others.
        """
        parts = {part: options.pop(part) for part in ("vae", "scheduler", "unet") if part in options}
        made = cls.of(load_model(name, **loading_options(options)))
        made.register_modules(**parts)
        return made

    load = from_pretrained

    @classmethod
    def from_single_file(cls, pretrained_model_link_or_path: str | Path, **options: Any) -> Self:
        """The same as `from_pretrained` for a base or a delta in one file, without the network."""
        return cls.from_pretrained(pretrained_model_link_or_path, **options)

    @classmethod
    def single(cls, pipeline: Any, concept: Concept | str | Path, *, strength: float = 1.0) -> Self:
        """From a base model and one concept, or its file; strength 0 keeps only its words, 1 is as tuned."""
        return cls.of(with_concept(pipeline, as_concept(concept, pipeline), strength))

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **others: Any,
    ) -> None:
        """Write a fused folder, which plain diffusers loads too. Raises SettingsError for what cannot be done here."""
        if not safe_serialization:
            raise SettingsError("safe_serialization: expected True, a pickle can run code; found False")
        if push_to_hub or others:
            asked = ", ".join(["push_to_hub"] * push_to_hub + [*others])
            raise SettingsError(f"save_pretrained: {shown(asked)}: not done here; save a folder and upload that")
        self.model.save(save_directory, variant=variant, max_shard_size=max_shard_size)

    def fuse_lora(self, *_: Any, **__: Any) -> None:
        """Refused: a concept's weights would take the place of the fused ones. Raises SettingsError."""
        raise SettingsError(
            "fuse_lora: what a concept changes would come out without the LoRA; leave it loaded beside the concept, or "
            "convert it to a concept and fuse the two"
        )

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int | None = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: list[Tensor] | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        guidance_rescale: float = 0.0,
        clip_skip: int | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006  as diffusers has it; only read
        *,
        regions: Sequence[Region | str] | str = (),
        image: Image.Image | Sequence[Image.Image] | None = None,
        mask_image: Image.Image | None = None,
        strength: float = 0.8,
        seed: int | None = None,
        regional_lora: bool | Sequence[Concept] = False,
        controls: Sequence[Control] = (),
        progress: Progress = silent,
        **settings: Any,
    ) -> Any:
        """Pictures of each prompt in turn, RGB; see `Inputs` and docs/sampling.md. What diffusers has too is as there.

        But `guidance_scale` None is what suits the base. With `regions` prompts hold in places, which are found where they,
        or one of them, are "auto"; what was found is in the output's `layouts`. With a `seed`, picture k is the one that
        `seed + k` gives alone (up to rounding). From an `image`, drawing goes as far as `strength` says,
        and with a `mask_image` only where that is white; what is black there stays bit for bit.
        `settings` are those of SamplingSettings. Raises RegionError, TokenError, SettingsError, BadInputError.
        """
        given = {name: value for name, value in locals().items() if name not in ("self", "return_dict")}
        pictures = self._draw(check_inputs(self, given))
        return pictures if return_dict else (pictures.images, pictures.nsfw_content_detected)

    def _draw(self, inputs: Inputs) -> PipelineOutput:
        """The picture, and if asked for, the same enlarged and drawn over."""
        settings, (width, height) = inputs.settings, inputs.size
        if inputs.finds_places and len(inputs.generators) > 1:
            return joined([self._draw(inputs.alone(number)) for number in range(len(inputs.generators))])
        self._interrupt = False
        self._guidance_scale, self._guidance_rescale = inputs.guidance_scale, settings.guidance_rescale
        with contextlib.ExitStack() as stack, exclusive(self):
            stack.enter_context(clip_skipped(self, settings.clip_skip))
            if inputs.finds_places:
                words = self._words_for(inputs)
                inputs = replace(inputs, regions=with_wanted(words, inputs.prompts[0], inputs.regions, inputs.auto))
            model, own = self._model_for(inputs)
            stack.enter_context(silenced(self, [name for one in own for name, _ in one]))
            stack.enter_context(model.active())
            how: dict[str, Any] = {"width": width, "height": height, "guided": inputs.guided, "steps": inputs.steps}
            finder = PlaceFinder(self, model, inputs, own) if inputs.finds_places else None
            texts = (model, inputs.prompts, inputs.negatives, inputs.regions)
            encoded = finder.encoded() if finder else encode(*texts, own=own, **how)
            afresh = takes_masks(self) and settings.image_strength == 1  # of the picture there is what the mask leaves
            start = self._latents_of(inputs.images, inputs, inputs.size) if inputs.images and not afresh else None
            noise = self._noise(inputs, inputs.size) if inputs.latents is None else inputs.latents
            latents = self._denoise(encoded, inputs, noise, start, settings.image_strength, finder)
            if settings.upscale > 1 and not self._interrupt:
                larger = settings.enlarged(self, width, height)
                start = self._latents_of(decode(self, latents), inputs, larger)
                encoded = finder.encoded(finder.layout.regions) if finder else encoded
                latents = self._denoise(encoded, inputs, self._noise(inputs, larger), start, settings.upscale_strength)
            pictures = self._decoded(latents, inputs)
        self.maybe_free_model_hooks()
        return PipelineOutput(pictures, [finder.layout] if finder and not self._interrupt else [])

    def _model_for(self, inputs: Inputs) -> tuple[ConceptModel, Mapping[RegionAdapters, OwnText]]:
        """The model that draws the whole picture, without the loaded concepts that regions draw by themselves; and those."""
        model = self._words_for(inputs)
        if not inputs.regional:
            return model, {}
        there = {name for region in inputs.regions for name, _ in adapters_of(model, region)}
        model = self._without(model, there)
        concepts = model.concepts if isinstance(inputs.regional_lora, bool) else inputs.regional_lora
        return model, own_texts(model, concepts, inputs.regions)

    def _words_for(self, inputs: Inputs) -> ConceptModel:
        """The model, which reads prompts in the syntax that is asked for."""
        words = replace(self.model.vocabulary, syntax=inputs.settings.prompt_syntax)
        return replace(self.model, vocabulary=words)

    def _noise(self, inputs: Inputs, size: tuple[int, int]) -> Tensor:
        return initial_latents(self, inputs.generators, width=size[0], height=size[1])

    def _latents_of(self, images: Sequence[Image.Image], inputs: Inputs, size: tuple[int, int]) -> Tensor:
        return picture_latents(self, images, inputs.generators, width=size[0], height=size[1])

    def _denoise(
        self,
        encoded: EncodedPrompt,
        inputs: Inputs,
        noise: Tensor,
        start: Tensor | None,
        strength: float,
        relay: Relay | None = None,
    ) -> Tensor:
        settings, masked = inputs.settings, takes_masks(self)

        def step_end(step: int, timestep: Tensor, latents: Tensor) -> Tensor:
            changed = inputs.callback(self, step, timestep, {"latents": latents}) if inputs.callback else None
            return (changed or {}).get("latents", latents)

        with self.progress_bar(total=settings.steps) as bar:

            def progress(step: int, total: int, info: Any) -> None:
                bar.total = self._num_timesteps = total
                bar.update()
                inputs.progress(step, total, info)

            return denoise(
                self,
                noise,
                encoded,
                num_inference_steps=settings.steps,
                guidance_scale=inputs.guidance_scale,
                guidance_rescale=settings.guidance_rescale,
                eta=inputs.eta,
                start=start,
                strength=strength,
                mask=None if inputs.mask is None or masked else cells_of(inputs.mask, noise),
                beside=masked_channels(self, inputs.images, inputs.mask, inputs.generators, noise) if masked else None,
                generators=inputs.generators,
                controls=inputs.controls,
                isolate=settings.isolated_steps,
                correct=attend_and_excite(settings.attend) if settings.attend else None,
                relay=relay,
                step_end=step_end,
                interrupted=lambda: self._interrupt,
                progress=progress,
            )

    def _decoded(self, latents: Tensor, inputs: Inputs) -> Any:
        """Pictures as they are asked for; with a mask, those that they began from where it is black."""
        if inputs.output_type == "latent":
            return latents
        if not inputs.mask:
            return decode(self, latents, inputs.output_type)
        begun = at_size(inputs.images, inputs.size)
        begun = begun * len(latents) if len(begun) == 1 else begun
        made = decode(self, latents)
        pictures = [Image.composite(new, old, inputs.mask) for new, old in zip(made, begun, strict=True)]
        if inputs.output_type == "pil":
            return pictures
        values = self.image_processor.pil_to_numpy(pictures)
        return values if inputs.output_type == "np" else self.image_processor.numpy_to_pt(values)


class MixOfShowPipeline(_Pipeline, StableDiffusionPipeline):  # type: ignore[misc]
    """Draws pictures with a model that knows concepts; in all else a pipeline of diffusers.

    `MixOfShowPipeline.of(model)` takes a ConceptModel; `.from_pretrained(name)` an embedded base, a base folder, a
    fused folder or a delta file; `.single(pipeline, concept)` a base with one concept file. Modules are shared with the
    model, not copied. A base of another family than SD 1.x and 2.x makes a pipeline of that one's class, see KINDS.

        draw = MixOfShowPipeline.from_pretrained("out/fused")
        draw("a photo of a castle", regions=[Region("a <clown>", (0, 0, 80, 64))], width=160, height=64)[0].save("a.png")

    The constructor is diffusers' own, but that no safety checker is needed, nor run; a pipeline made by it, or by
    `from_pipe`, knows no concept.
    """

    base_class: ClassVar = "StableDiffusionPipeline"

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        safety_checker: Any = None,
        feature_extractor: Any = None,
        image_encoder: Any = None,
        requires_safety_checker: bool = False,
    ) -> None:
        parts = {name: value for name, value in locals().items() if name not in ("self", "requires_safety_checker")}
        parts.pop("__class__", None)
        self._prepare(parts, requires_safety_checker=requires_safety_checker)
        self._is_unet_config_sample_size_int = isinstance(unet.config.sample_size, int)


class MixOfShowXLPipeline(_Pipeline, StableDiffusionXLPipeline):  # type: ignore[misc]
    """The same for bases of the SDXL family."""

    base_class: ClassVar = "StableDiffusionXLPipeline"

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        text_encoder_2: CLIPTextModelWithProjection,
        tokenizer: CLIPTokenizer,
        tokenizer_2: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        image_encoder: Any = None,
        feature_extractor: Any = None,
        force_zeros_for_empty_prompt: bool = True,
        add_watermarker: bool | None = None,
    ) -> None:
        parts = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        del parts["force_zeros_for_empty_prompt"], parts["add_watermarker"]  # no mark is put into pictures
        self._prepare(parts, force_zeros_for_empty_prompt=force_zeros_for_empty_prompt)
        self.default_sample_size, self.watermark = unet.config.sample_size, None


KINDS: Final = {kind.base_class: kind for kind in (MixOfShowPipeline, MixOfShowXLPipeline)}
"""The pipeline for each class of base."""
# So that AutoPipelineFor….from_pipe knows what ours are.
SUPPORTED_TASKS_MAPPINGS.append(
    OrderedDict({"stable-diffusion": MixOfShowPipeline, "stable-diffusion-xl": MixOfShowXLPipeline})
)
