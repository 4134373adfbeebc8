"""Sampling: a prompt and regions to pictures. Encode, denoise, decode are three functions."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Final, Self

import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import StableDiffusionLoraLoaderMixin, StableDiffusionXLLoraLoaderMixin
from PIL import Image
from torch import Tensor

from mixofshow.bases.families import family_of
from mixofshow.bases.parts import exclusive
from mixofshow.concepts.concept import Concept
from mixofshow.concepts.model import ConceptModel, load_model, with_concept
from mixofshow.concepts.words import Vocabulary
from mixofshow.errors import SettingsError
from mixofshow.progress import Progress, silent
from mixofshow.sampling.attend import attend_and_excite
from mixofshow.sampling.controls import require_all_fit
from mixofshow.sampling.denoising import Control, Predicting, denoise, shared_weights
from mixofshow.sampling.encoding import EncodedPrompt, encode
from mixofshow.sampling.latents import decode, initial_latents, picture_latents
from mixofshow.sampling.own_weights import own_models
from mixofshow.sampling.own_weights import own_weights as predicting_own
from mixofshow.sampling.regions import Region
from mixofshow.sampling.settings import Drawing, make_drawing

MAX_SEED: Final = 2**63
OUTPUTS: Final = ("pil", "np", "pt", "latent")

Callback = Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any]]
"""diffusers' `callback_on_step_end`: (pipeline, step, timestep, {"latents": …}) to what is to be changed of these."""


class Pictures(list[Any]):
    """Pictures as a list; as `images` too, which is where diffusers' pipelines put theirs."""

    @property
    def images(self) -> Pictures:
        """The list itself."""
        return self


@dataclass(frozen=True)
class _Asked:
    """What is asked for beside prompts and regions."""

    drawing: Drawing
    guidance_scale: float
    generators: Sequence[torch.Generator]
    images: Sequence[Image.Image]
    size: tuple[int, int]

    @property
    def steps(self) -> tuple[int, int]:
        """The first and last step that are done, from 1: those from a picture begin later."""
        steps = self.drawing.steps
        share = self.drawing.image_strength if self.images else 1.0
        return min(steps - min(int(steps * share), steps) + 1, steps), steps

    @property
    def guided(self) -> bool:
        """Whether there is a negative prompt's side."""
        return self.guidance_scale != 1.0


class MixOfShowPipeline(DiffusionPipeline, StableDiffusionLoraLoaderMixin):  # type: ignore[misc]
    """Draws pictures with a model that knows concepts; in all else a pipeline of diffusers.

    `MixOfShowPipeline.of(model)` takes a ConceptModel; `.from_pretrained(name)` an embedded base, a base folder, a
    fused folder or a delta file; `.single(pipeline, concept)` a base with one concept file. Modules are shared with the
    model, not copied. A base of another family than SD 1.x and 2.x makes a pipeline of that one's class, see KINDS.

        draw = MixOfShowPipeline.from_pretrained("out/fused")
        draw("a photo of a castle", regions=[Region("a <reddog>", (0, 0, 80, 64))], width=160, height=64)[0].save("a.png")

    The constructor is diffusers' own, of the five parts; a pipeline made by it knows no concept.
    """

    base_class: ClassVar = "StableDiffusionPipeline"
    model_cpu_offload_seq = "text_encoder->unet->vae"
    _callback_tensor_inputs: Final = ["latents"]

    def __init__(self, vae: Any, text_encoder: Any, tokenizer: Any, unet: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler)
        self._prepare(vae)

    def _prepare(self, vae: Any) -> None:
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self.model = ConceptModel(self)
        """The words and weights that it draws with, on its own modules."""
        self._given = self.model

    @classmethod
    def of(cls, model: ConceptModel) -> Self:
        """From a model that is loaded already."""
        base = model.pipeline
        kind = KINDS[family_of(base).pipeline_class]
        parts, settings = kind._get_signature_keys(kind)
        made = kind(**{part: getattr(base, part) for part in parts}, **{key: base.config[key] for key in settings})
        made.register_to_config(_name_or_path=base.config.get("_name_or_path"))
        made.set_progress_bar_config(disable=True)
        made.model, made._given = replace(model, pipeline=made), model
        return made

    @classmethod
    def from_pretrained(cls, name: str | Path, **options: Any) -> Self:
        """From an embedded base's name, a diffusers folder, a fused folder or a delta file; options of `load_model`."""
        if "torch_dtype" in options:
            options["dtype"] = options.pop("torch_dtype")
        return cls.of(load_model(name, **options))

    @classmethod
    def load(cls, name: str | Path, **options: Any) -> Self:
        """The same as `from_pretrained`."""
        return cls.from_pretrained(name, **options)

    @classmethod
    def single(cls, pipeline: Any, concept: Concept, *, strength: float = 1.0) -> Self:
        """From a base model and one concept; strength 0 keeps only its words, 1 is as tuned."""
        return cls.of(with_concept(pipeline, concept, unet=strength, text_encoder=strength))

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:
        """Write a fused folder, which plain diffusers loads too."""
        self._given.save(Path(save_directory))

    def fuse_lora(self, *_: Any, **__: Any) -> None:
        """Refused: a concept's weights would take the place of the fused ones. Raises SettingsError."""
        raise SettingsError(
            "fuse_lora: what a concept changes would come out without the LoRA; leave it loaded beside the concept, or "
            "convert it to a concept and fuse the two"
        )

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        regions: Sequence[Region] = (),
        negative_prompt: str = "",
        image: Image.Image | Sequence[Image.Image] | None = None,
        num_images_per_prompt: int = 1,
        seed: int = 0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        own_weights: bool | Sequence[Concept] = False,
        controls: Sequence[Control] = (),
        output_type: str = "pil",
        callback_on_step_end: Callback | None = None,
        progress: Progress = silent,
        **settings: Any,
    ) -> Pictures:
        """Pictures of each prompt in turn, RGB; picture k is the one that `seed + k` gives alone (up to rounding).

        The `settings` are those of Drawing: `width`, `height`, `num_inference_steps`, `guidance_scale` and so on. With an
        `image` (or one for each picture), drawing starts from it and goes as far as `strength` says. Instead of a seed, a
        `generator` may be given, for all pictures or one for each. `own_weights` draws every region with its concept's
        own weights, un-fused (the concepts may be given). What `controls` add is summed; see `make_control`.
        `callback_on_step_end` is diffusers', and may change the latents; `progress` is told (step, steps, {}).
        `output_type` is pil, np, pt or latent. Raises RegionError, TokenError, SettingsError, BadInputError.
        """
        drawing, prompts = make_drawing(settings), [prompt] if isinstance(prompt, str) else list(prompt)
        _require(num_images_per_prompt >= 1, "num_images_per_prompt", num_images_per_prompt, "at least 1")
        _require(bool(prompts), "prompt", prompts, "at least one")
        _require(output_type in OUTPUTS, "output_type", output_type, "one of " + ", ".join(OUTPUTS))
        _require(not (own_weights and drawing.attend), "attend", drawing.attend, "0 with own_weights")
        require_all_fit(controls, self.unet)
        generators = _generators(seed, generator, num_images_per_prompt * len(prompts))
        asked = self._asked(drawing, generators, image)
        encoding = partial(self._encode, prompts, negative_prompt, regions, asked)
        with contextlib.ExitStack() as stack, exclusive(self):
            predicting = self._predicting(own_weights, regions, encoding, drawing.isolated_steps)
            stack.enter_context(self.model.active())
            run = partial(
                self._denoise,
                encoding(self.model.vocabulary),
                asked,
                controls=controls,
                predicting=predicting,
                step_end=partial(self._step_end, callback_on_step_end),
            )
            latents = self._passes(run, asked, progress)
            pictures = latents if output_type == "latent" else decode(self, latents, output_type)
        self.maybe_free_model_hooks()
        return Pictures(pictures)

    def _asked(self, drawing: Drawing, generators: Sequence[torch.Generator], image: Any) -> _Asked:
        scale = self.model.usual_guidance if drawing.guidance_scale is None else drawing.guidance_scale
        images = [] if image is None else [image] if isinstance(image, Image.Image) else list(image)
        _require(len(images) in (0, 1, len(generators)), "image", f"{len(images)}", f"1 or {len(generators)} pictures")
        size = drawing.size(self, images[0] if images else None)
        return _Asked(drawing, scale, generators, images, size)

    def _encode(
        self,
        prompts: Sequence[str],
        negative_prompt: str,
        regions: Sequence[Region],
        asked: _Asked,
        vocabulary: Vocabulary,
    ) -> EncodedPrompt:
        model, (width, height) = replace(self.model, vocabulary=vocabulary), asked.size
        how: dict[str, Any] = {"width": width, "height": height, "guided": asked.guided, "steps": asked.steps}
        return encode(model, prompts, negative_prompt, regions, **how)

    def _predicting(
        self,
        own_weights: bool | Sequence[Concept],
        regions: Sequence[Region],
        encoding: Callable[[Vocabulary], EncodedPrompt],
        isolate: int,
    ) -> Predicting:
        if own_weights is False:
            return partial(shared_weights, isolate=isolate)
        concepts = self.model.concepts if own_weights is True else own_weights
        return predicting_own(own_models(self.model, concepts, regions, encoding), isolate=isolate)

    def _passes(self, run: Callable[..., Tensor], asked: _Asked, progress: Progress) -> Tensor:
        """The picture, and if asked for, the same enlarged and drawn over."""
        (width, height), drawing = asked.size, asked.drawing
        start = self._latents_of(asked.images, asked, (width, height)) if asked.images else None
        latents = run((width, height), start=start, strength=drawing.image_strength, progress=progress)
        if drawing.upscale > 1:
            larger = drawing.enlarged(self, width, height)
            start = self._latents_of(decode(self, latents), asked, larger)
            latents = run(larger, start=start, strength=drawing.upscale_strength, progress=progress)
        return latents

    def _latents_of(self, images: Sequence[Image.Image], asked: _Asked, size: tuple[int, int]) -> Tensor:
        return picture_latents(self, images, asked.generators, width=size[0], height=size[1])

    def _denoise(
        self,
        encoded: EncodedPrompt,
        asked: _Asked,
        size: tuple[int, int],
        *,
        start: Tensor | None,
        progress: Progress,
        **how: Any,
    ) -> Tensor:
        drawing = asked.drawing
        noise = initial_latents(self, asked.generators, width=size[0], height=size[1])
        with self.progress_bar(total=drawing.steps) as bar:

            def told(step: int, total: int, info: Any) -> None:
                bar.total = total
                bar.update()
                progress(step, total, info)

            return denoise(
                self,
                noise,
                encoded,
                num_inference_steps=drawing.steps,
                guidance_scale=asked.guidance_scale,
                guidance_rescale=drawing.guidance_rescale,
                start=start,
                generators=asked.generators,
                correct=attend_and_excite(drawing.attend) if drawing.attend else None,
                progress=told,
                **how,
            )

    def _step_end(self, callback: Callback | None, step: int, timestep: Tensor, latents: Tensor) -> Tensor:
        changed = callback(self, step, timestep, {"latents": latents}) if callback else {}
        return (changed or {}).get("latents", latents)


class MixOfShowXLPipeline(StableDiffusionXLLoraLoaderMixin, MixOfShowPipeline):  # type: ignore[misc]
    """The same for bases of the SDXL family."""

    base_class: ClassVar = "StableDiffusionXLPipeline"
    model_cpu_offload_seq = "text_encoder->text_encoder_2->unet->vae"

    def __init__(
        self,
        *,
        vae: Any,
        text_encoder: Any,
        text_encoder_2: Any,
        tokenizer: Any,
        tokenizer_2: Any,
        unet: Any,
        scheduler: Any,
        force_zeros_for_empty_prompt: bool = True,
    ) -> None:
        DiffusionPipeline.__init__(self)
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            text_encoder_2=text_encoder_2,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            unet=unet,
            scheduler=scheduler,
        )
        self.register_to_config(force_zeros_for_empty_prompt=force_zeros_for_empty_prompt)
        self._prepare(vae)


KINDS: Final = {kind.base_class: kind for kind in (MixOfShowPipeline, MixOfShowXLPipeline)}
"""The pipeline for each class of base."""


def _generators(
    seed: int, given: torch.Generator | Sequence[torch.Generator] | None, count: int
) -> list[torch.Generator]:
    """One for each picture."""
    if isinstance(given, torch.Generator):
        return [given] * count
    if given is not None:
        _require(len(given) == count, "generator", f"{len(given)}", f"{count}, one for each picture")
        return list(given)
    _require(0 <= seed < MAX_SEED, "seed", seed, f"0 to {MAX_SEED - 1}")
    return [torch.Generator().manual_seed(seed + number) for number in range(count)]


def _require(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise SettingsError(f"{name}: expected {expected}, found {value}")
