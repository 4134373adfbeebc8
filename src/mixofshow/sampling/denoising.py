"""Denoising: from noise, or from a picture with noise on it, to clean latents."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Protocol

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import Tensor

from mixofshow.bases.families import conditions
from mixofshow.progress import Progress, silent
from mixofshow.sampling.attention import RegionalAttention, regional
from mixofshow.sampling.conditioning import EncodedPrompt
from mixofshow.sampling.latents import require_finite
from mixofshow.sampling.regional_lora import regional_lora


class Control(Protocol):
    """Something that steers the UNet beside the prompts, such as a ControlNet."""

    def residuals(
        self, latents: Tensor, timestep: Tensor, text: Tensor, step: int, steps: int, *, told: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """Keyword arguments for the UNet in this step (from 1), of which those of several controls are added.

        `latents` are what the UNet is given, (sides · pictures, channels, height, width), `text` is
        (sides · prompts, layers, tokens, dim), and `told` are the UNet's other arguments, as `conditions` has them.
        """


@dataclass(frozen=True)
class StepContext:
    """A step, counted from 1, out of `steps`; `batched` makes of latents, and the timestep, what `predict` takes."""

    predict: NoisePredictor
    timestep: Tensor
    step: int
    steps: int
    batched: Callable[[Tensor, Tensor], Tensor]


class Relay(Protocol):
    """After the first steps of a picture, has other regions drawn from there."""

    begin: int
    """The step, from 1, that is the first to read them."""

    def next(self, latents: Tensor, timestep: Tensor, beside: Tensor | None) -> EncodedPrompt:
        """What is read from this step on, of what the UNet is given: of one side, with what is `beside`; none is in use."""


LatentCallback = Callable[[StepContext, Tensor], Tensor]
"""Moves the latents before a step: (pictures, channels, height, width) to the same."""
StepEnd = Callable[[int, Tensor, Tensor], Tensor]
"""Told of a step, from 0, its timestep and the latents after it; gives the latents to go on with."""


class NoisePredictor:
    """The UNet's predictions; `told` is what it is told beside the text, `attention` what it reads in which places.

    `beside` are channels that it is given beside the latents.
    """

    def __init__(
        self,
        unet: Any,
        text: Tensor,
        attention: RegionalAttention,
        told: Mapping[str, Any] | None = None,
        *,
        beside: Tensor | None = None,
    ) -> None:
        self.unet, self.text, self.attention, self.told, self.beside = unet, text, attention, told or {}, beside

    def __call__(self, latents: Tensor, timestep: Tensor, step: int, more: Mapping[str, Any]) -> Tensor:
        """In a step, from 1, with `more` keyword arguments: (sides · pictures, channels, height, width) to the same."""
        self.attention.at(step)
        # The UNet empties the lists that it is given, and a step may have several predictions.
        more = {name: [*value] if isinstance(value, list) else value for name, value in more.items()}
        latents = latents if self.beside is None else torch.cat([latents, self.beside], dim=1)
        return self.unet(latents, timestep, self.text, return_dict=False, **self.told, **more)[0]


@contextlib.contextmanager
def noise_predictor(
    pipeline: Any,
    encoded: EncodedPrompt,
    latents: Tensor,
    *,
    isolate: int = 0,
    tiny: str = "nearest",
    beside: Tensor | None = None,
) -> Iterator[NoisePredictor]:
    """For latents of this size, while the UNet reads the regions' texts; `isolate` and `tiny` are those of `regional`.

    `beside`, (pictures, channels, rows, columns), is given to it with the latents of each side.
    """
    batch, (rows, columns) = len(latents), latents.shape[-2:]
    text, told = encoded.text.to(latents), conditions(pipeline, encoded.pooled, latents)
    how: dict[str, Any] = {"columns": columns, "rows": rows, "isolate": isolate, "tiny": tiny}
    with (
        regional(pipeline.unet, text, encoded.regions, batch=batch, **how) as attention,
        regional_lora(pipeline, attention),
    ):
        both = None if beside is None else beside.repeat(batch // len(beside), 1, 1, 1)
        yield NoisePredictor(pipeline.unet, text, attention, told, beside=both)


def denoise(
    pipeline: Any,
    noise: Tensor,
    encoded: EncodedPrompt,
    *,
    num_inference_steps: int,
    guidance_scale: float,
    guidance_rescale: float = 0.0,
    eta: float = 0.0,
    start: Tensor | None = None,
    strength: float = 1.0,
    mask: Tensor | None = None,
    beside: Tensor | None = None,
    generators: Sequence[torch.Generator] = (),
    controls: Sequence[Control] = (),
    isolate: int = 0,
    tiny: str = "nearest",
    correct: LatentCallback | None = None,
    relay: Relay | None = None,
    step_end: StepEnd | None = None,
    interrupted: Callable[[], bool] = bool,
    progress: Progress = silent,
) -> Tensor:
    """Noise to clean latents with the pipeline's own scheduler and classifier-free guidance. Raises MixOfShowError.

    With clean latents to `start` from, only the last steps are done, a share `strength` of all; where `mask`, (rows,
    columns), is 0, `start` comes back after each; for `beside` see `masked_channels`. Noise that a scheduler draws (DDIM:
    `eta`) is picture k's from generator k. `isolate`, `tiny` are `regional`'s. Raises MixOfShowError for what is not finite.
    """
    scheduler, timesteps, latents = _begin(pipeline, noise, num_inference_steps, start, strength)
    skipped, how = len(scheduler.timesteps) - len(timesteps), _for_step(scheduler, generators, eta)
    sides, guidance = (2, (guidance_scale, guidance_rescale)) if encoded.guided else (1, ())

    def batched(latents: Tensor, timestep: Tensor) -> Tensor:
        return scheduler.scale_model_input(torch.cat([latents] * sides), timestep)

    reading = _reading(pipeline, encoded, batched, relay, isolate=isolate, tiny=tiny, beside=beside)
    with reading as predictor:
        for done, timestep in takewhile(lambda _: not interrupted(), enumerate(timesteps)):
            step = min((skipped + done) // scheduler.order + 1, num_inference_steps)
            context = StepContext(predictor(step, latents, timestep), timestep, step, num_inference_steps, batched)
            latents = correct(context, latents) if correct else latents
            prediction = _predicted(context, latents, controls, guidance)
            latents = scheduler.step(prediction, timestep, latents, **how, return_dict=False)[0]
            if mask is not None and start is not None:
                latents = torch.lerp(_noised(scheduler, start, noise, timesteps[done + 1 :]), latents, mask)
            latents = step_end(done, timestep, latents) if step_end else latents
            require_finite(latents, f"step {step} of {num_inference_steps}")
            progress(done + 1, len(timesteps), {})
    return latents


@contextlib.contextmanager
def _reading(
    pipeline: Any,
    encoded: EncodedPrompt,
    batched: Callable[[Tensor, Tensor], Tensor],
    relay: Relay | None,
    *,
    beside: Tensor | None,
    **how: Any,
) -> Iterator[Callable[[int, Tensor, Tensor], NoisePredictor]]:
    """Inside, what predicts in a step, from 1, for latents and their timestep; a relay changes what it reads."""
    with contextlib.ExitStack() as stack:
        there: list[NoisePredictor] = []

        def predictor(step: int, latents: Tensor, timestep: Tensor) -> NoisePredictor:
            relayed = relay is not None and step >= relay.begin
            if len(there) < 1 + relayed:
                both, read = batched(latents, timestep), encoded
                if there and relay:
                    stack.close()
                    read = relay.next(both[: len(latents)], timestep, beside)
                there.append(stack.enter_context(noise_predictor(pipeline, read, both, beside=beside, **how)))
            return there[-1]

        yield predictor


def _predicted(
    context: StepContext, latents: Tensor, controls: Sequence[Control], guidance: Sequence[float]
) -> Tensor:
    """The UNet's prediction, steered by the controls, and guided with these numbers: (pictures, channels, height, width)."""
    seen = (context.batched(latents, context.timestep), context.timestep)
    told, text = context.predict.told, context.predict.text
    steering = added([one.residuals(*seen, text, context.step, context.steps, told=told) for one in controls])
    prediction = context.predict(*seen, context.step, steering)
    return guided(prediction, *guidance) if guidance else prediction


def _noised(scheduler: Any, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Clean latents with the noise that they have before the first of the timesteps; after the last one there is none."""
    return scheduler.add_noise(latents, noise, timesteps[:1].expand(len(latents))) if len(timesteps) else latents


def _for_step(scheduler: Any, generators: Sequence[torch.Generator], eta: float) -> dict[str, Any]:
    """What the scheduler's step takes beside prediction, timestep and latents."""
    known = inspect.signature(scheduler.step).parameters
    how = {"generator": list(generators)} if generators and "generator" in known else {}
    return how | ({"eta": eta} if eta and "eta" in known else {})


def _begin(
    pipeline: Any, noise: Tensor, steps: int, start: Tensor | None, strength: float
) -> tuple[Any, Tensor, Tensor]:
    """The pipeline's scheduler, ready for use, the timesteps to do, and the latents before them."""
    scheduler = copy.deepcopy(pipeline.scheduler)
    scheduler.set_timesteps(steps, device=noise.device)
    if start is None:
        return scheduler, scheduler.timesteps, noise * scheduler.init_noise_sigma
    begin = (steps - min(int(steps * strength), steps)) * scheduler.order
    timesteps = scheduler.timesteps[begin:]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    return scheduler, timesteps, _noised(scheduler, start, noise, timesteps)


def guided(prediction: Tensor, scale: float, rescale: float = 0.0) -> Tensor:
    """Classifier-free guidance of a batch of which the first half is without the prompt; `rescale` is Lin et al.'s φ."""
    without, with_prompt = prediction.chunk(2)
    found = without + scale * (with_prompt - without)
    return rescale_noise_cfg(found, with_prompt, guidance_rescale=rescale) if rescale else found


def added(tables: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Keyword arguments of several controls as one table: tensors, and tensors in sequences, are added."""

    def plus(one: Any, other: Any) -> Any:
        if isinstance(one, Tensor):
            return one + other
        return type(one)(plus(*levels) for levels in zip(one, other, strict=True))

    total: dict[str, Any] = {}
    for table in tables:
        total |= {key: plus(total[key], value) if key in total else value for key, value in table.items()}
    return total
