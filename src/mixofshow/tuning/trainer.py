"""The client's training loop: pictures of one concept to a Concept."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from mixofshow.bases.families import family_of
from mixofshow.bases.layers import cross_attentions
from mixofshow.bases.loading import fingerprint
from mixofshow.concepts.concept import Concept, ConceptInfo
from mixofshow.concepts.prompts import encode_ids, layerwise
from mixofshow.concepts.words import Vocabulary, token_ids
from mixofshow.progress import Progress, silent
from mixofshow.tuning.dataset import Example, as_tensor, read_folder, with_placeholder
from mixofshow.tuning.losses import denoising_target, masked_mse, offset_noise
from mixofshow.tuning.methods import initial_words, lora_injected, low_rank
from mixofshow.tuning.settings import TuningSettings

logger = logging.getLogger(__name__)

DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Preview = Callable[[Concept, int], None]
"""Called with the concept so far and the step."""


@dataclass(frozen=True)
class Batches:
    """The data set as tensors: latent means and spreads, (pictures, channels, height, width), and token ids."""

    mean: Tensor
    spread: Tensor
    ids: Tensor

    def draw(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """`size` pictures, each once before any comes twice: (size, channels, height, width) and (size, tokens)."""
        rounds = [torch.randperm(len(self.mean), generator=generator) for _ in range(-(-size // len(self.mean)))]
        chosen = torch.cat(rounds)[:size]
        noise = torch.randn(self.mean[chosen].shape, generator=generator).to(self.mean)
        return self.mean[chosen] + self.spread[chosen] * noise, self.ids[chosen]


def tune(
    settings: TuningSettings, pipeline: Any, *, progress: Progress = silent, preview: Preview | None = None
) -> Concept:
    """Tune a concept on a folder of pictures; the pipeline is left as it was.

    Ctrl-C ends early with what has been learned. Raises DatasetError, TokenError.
    """
    examples = read_folder(
        settings.data,
        instance_prompt=settings.instance_prompt or f"a photo of a {settings.placeholder}",
        skip_bad=settings.skip_bad,
    )
    generator = torch.Generator().manual_seed(settings.seed)
    batches = encode_examples(examples, settings, pipeline)
    layers = len(cross_attentions(pipeline.unet))
    words = nn.Parameter(
        initial_words(pipeline, settings.class_word, layers=layers, sigma=settings.random_sigma, generator=generator)
    )
    info = _describe(settings, pipeline, layers)  # before the layers are wrapped: the fingerprint is of the base
    with _seeded(settings.seed), lora_injected(pipeline, settings) as wrappers:
        trainer = _Trainer(settings, pipeline, batches, words=words, wrappers=wrappers, generator=generator, info=info)
        trainer.run(progress, preview)
        return trainer.concept()


@torch.no_grad()
def encode_examples(examples: Sequence[Example], settings: TuningSettings, pipeline: Any) -> Batches:
    """Encode pictures once; mean and spread are kept, so that sampling the latents stays random."""
    side = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    pictures = as_tensor([example.image for example in examples], width=side, height=side)
    posteriors = [
        pipeline.vae.encode(part.to(pipeline.vae.device, pipeline.vae.dtype)).latent_dist for part in pictures.split(8)
    ]
    scale = pipeline.vae.config.scaling_factor
    known = Vocabulary(dict.fromkeys(settings.words, torch.empty(0)), {settings.placeholder: settings.words})
    table = pipeline.text_encoder.get_input_embeddings().num_embeddings
    length = pipeline.text_encoder.config.max_position_embeddings
    captions = [
        with_placeholder(example.caption, settings.placeholder, settings.words, settings.class_word)
        for example in examples
    ]
    ids = [token_ids(caption, pipeline.tokenizer, known, table, length) for caption in captions]
    return Batches(
        scale * torch.cat([one.mean for one in posteriors]),
        scale * torch.cat([one.std for one in posteriors]),
        torch.tensor(ids, device=pipeline.text_encoder.device),
    )


def _describe(settings: TuningSettings, pipeline: Any, layers: int) -> ConceptInfo:
    return ConceptInfo(
        name=settings.name,
        words=settings.words,
        class_word=settings.class_word,
        initializers=("random", settings.class_word),
        layers=layers,
        family=family_of(pipeline).name,
        base=settings.base.rstrip("/").rsplit("/", 1)[-1],
        base_fingerprint=fingerprint(pipeline),
        method=settings.method,
        rank=settings.rank,
        alpha=settings.alpha,
        settings=settings.for_file(),
        license=settings.license,
        author=settings.author,
    )


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Inside, torch's global randomness (which peft starts its matrices from) is seeded; afterwards it is as before."""
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


class _Trainer:
    """State of one run: what is trained, the optimizer, and whether the words may still move."""

    def __init__(
        self,
        settings: TuningSettings,
        pipeline: Any,
        batches: Batches,
        *,
        words: nn.Parameter,
        wrappers: dict[str, nn.Module],
        generator: torch.Generator,
        info: ConceptInfo,
    ) -> None:
        self.settings, self.pipeline, self.batches, self.info = settings, pipeline, batches, info
        self.words, self.wrappers, self.generator = words, wrappers, generator
        self.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
        self.words_move, self.step = True, 0
        text, unet = self._matrices("text_encoder"), self._matrices("unet")
        groups = [
            {"params": [words], "lr": settings.embedding_rate},
            {"params": text, "lr": settings.text_encoder_rate},
            {"params": unet, "lr": settings.unet_rate},
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), weight_decay=settings.weight_decay)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: max(0.0, 1 - step / settings.steps)
        )

    def _matrices(self, part: str) -> list[nn.Parameter]:
        return [
            parameter
            for name, wrapper in self.wrappers.items()
            if name.startswith(f"{part}.")
            for parameter in wrapper.parameters()
            if parameter.requires_grad
        ]

    def run(self, progress: Progress, preview: Preview | None) -> None:
        """All steps, or as many as Ctrl-C leaves."""
        settings, started = self.settings, time.monotonic()
        try:
            with layerwise(self.pipeline.unet):
                while self.step < settings.steps:
                    loss = self._one_step()
                    self.step += 1
                    speed = self.step / (time.monotonic() - started)
                    progress(self.step, settings.steps, {"loss": loss, "steps/s": speed})
                    if preview and settings.preview_every and self.step % settings.preview_every == 0:
                        with self._taken_off():
                            preview(self.concept(), self.step)
        except KeyboardInterrupt:
            logger.warning("stopped at step %d of %d; what was learned so far is kept", self.step, settings.steps)

    @contextlib.contextmanager
    def _taken_off(self) -> Iterator[None]:
        """Inside, the pipeline is the base model: a preview puts the concept on by itself."""
        for wrapper in self.wrappers.values():
            wrapper.enable_adapters(False)  # type: ignore[operator]
        try:
            yield
        finally:
            for wrapper in self.wrappers.values():
                wrapper.enable_adapters(True)  # type: ignore[operator]

    def _one_step(self) -> float:
        latents, ids = self.batches.draw(self.settings.batch_size, self.generator)
        noise = offset_noise(latents, self.settings.noise_offset, self.generator)
        count = self.scheduler.config.num_train_timesteps
        timesteps = torch.randint(count, (len(latents),), generator=self.generator).to(latents.device)
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        with torch.autocast(
            latents.device.type, DTYPES[self.settings.precision], enabled=self.settings.precision != "fp32"
        ):
            made = self.pipeline.unet(noisy, timesteps, self._text(ids)).sample
        loss = masked_mse(made, denoising_target(self.scheduler, latents, noise, timesteps))
        loss.backward()
        trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        nn.utils.clip_grad_norm_(trained, self.settings.max_grad_norm)
        if not self.words_move:
            self.words.grad = None
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        if self.words.detach().norm(dim=-1).mean() >= self.settings.norm_limit:
            self.words_move = False
        return float(loss.detach())

    def _text(self, ids: Tensor) -> Tensor:
        """Each distinct caption of the batch encoded once, for all layers: (batch, layers, tokens, dim)."""
        distinct, place = torch.unique(ids, dim=0, return_inverse=True)
        return encode_ids(self.pipeline.text_encoder, distinct, self.words)[place]

    @torch.no_grad()
    def concept(self) -> Concept:
        """What has been learned so far."""
        info = self.info.model_copy(update={"settings": {**self.info.settings, "steps": self.step}})
        words = self.words.detach().cpu().transpose(0, 1).contiguous().half().float()
        return Concept(
            info, words, {name: low_rank(wrapper, self.settings.alpha) for name, wrapper in self.wrappers.items()}
        )
