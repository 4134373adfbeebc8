"""Fixtures that every test may use: the tiny golden model, its two concepts, and the numbers to meet."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from mixofshow.bases.loading import fingerprint, load_base
from mixofshow.concepts.changes import DOWN, UP, LowRank
from mixofshow.concepts.concept import EMBEDDINGS, Concept, ConceptInfo, vocabulary
from mixofshow.concepts.model import ConceptModel
from mixofshow.tuning.settings import TuningSettings, make_settings

GOLDENS = Path(__file__).parent / "goldens"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

# A shell lets what it starts in the background ignore Ctrl-C, and so would the commands that tests send it to.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pictures_in(folder: Path, *colours: str, size: tuple[int, int] = (64, 64)) -> Path:
    """The folder, with a picture of each colour in it: 0.png, 1.png …"""
    folder.mkdir(exist_ok=True)
    for number, colour in enumerate(colours):
        Image.new("RGB", size, colour).save(folder / f"{number}.png")
    return folder


def short_run(data: Path, **usual: Any) -> Callable[..., TuningSettings]:
    """`short_run(data, **usual)(**{key: value, …})`: settings of tuning on the golden base, the usual ones or as given."""
    table = {"name": "thing", "class_word": "man", "base": str(GOLDENS / "pipeline"), "data": data, **usual}
    return lambda **changed: make_settings({**table, **changed})


@dataclasses.dataclass(frozen=True)
class Golden:
    """One golden file: its numbers, and the prompts and settings they were made with."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]


@pytest.fixture(autouse=True)
def _same_every_time() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.set_flush_denormal(False)  # as some commands, which tests call in this process, leave it


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Golden]:
    """`golden("a_text")` reads the file a_text.safetensors and what a_text.json says about it."""

    def read(name: str) -> Golden:
        values = json.loads((GOLDENS / f"{name}.json").read_text(encoding="utf-8")).get("values", {})
        return Golden(load_file(GOLDENS / f"{name}.safetensors"), values)

    return read


@pytest.fixture(scope="session")
def relative_error() -> Callable[[Tensor, Tensor], float]:
    """`relative_error(found, expected)`: the norm of the difference over the norm of what was expected."""

    def error(found: Tensor, expected: Tensor) -> float:
        assert found.shape == expected.shape
        return float((found - expected).detach().double().norm() / expected.detach().double().norm())

    return error


@pytest.fixture(scope="session")
def golden_pipeline() -> Any:
    """The tiny SD-1.x-shaped base of the goldens, with the scheduler that all of them were made with."""
    from diffusers import DPMSolverMultistepScheduler

    pipeline = load_base(GOLDENS / "pipeline")
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="linspace", final_sigmas_type="sigma_min"
    )
    return pipeline


@pytest.fixture(scope="session")
def golden_concepts(golden_pipeline: Any) -> tuple[Concept, Concept]:
    """`<dogx1> <dogx2>` and `<manx1> <manx2>`, LoRA scale 1; concepts.json has the scales used for fusion."""
    first, second = json.loads((GOLDENS / "concepts" / "concepts.json").read_text(encoding="utf-8"))
    return _concept(golden_pipeline, first), _concept(golden_pipeline, second)


def _concept(pipeline: Any, entry: dict[str, Any]) -> Concept:
    tensors = load_file(GOLDENS / "concepts" / entry["file"])
    info = ConceptInfo(
        name=Path(entry["file"]).stem,
        words=entry["words"],
        class_word="object",
        initializers=("<rand-0.013>", "object"),
        layers=tensors[EMBEDDINGS].shape[1],
        family="stable-diffusion",
        base="golden",
        base_fingerprint=fingerprint(pipeline),
        settings={"steps": 1000, "lr": 1e-4, "flip": False, "mask": None, "schedule": "linear"},
    )
    layers = [name.removesuffix(DOWN) for name in tensors if name.endswith(DOWN)]
    return Concept(
        info, tensors[EMBEDDINGS], {layer: LowRank(tensors[layer + DOWN], tensors[layer + UP]) for layer in layers}
    )


@pytest.fixture(scope="session")
def golden_fused(
    golden: Callable[[str], Golden], golden_pipeline: Any, golden_concepts: tuple[Concept, Concept]
) -> ConceptModel:
    """The base with the weights that the reference fused from both concepts."""
    weights = {
        name.removesuffix(".weight"): weight
        for name, weight in golden("e_fused").tensors.items()
        if name.endswith(".weight")
    }
    return ConceptModel(golden_pipeline, vocabulary(golden_concepts), weights)


@pytest.fixture(scope="session")
def fused(golden_fused: ConceptModel, golden_concepts: tuple[Concept, Concept]) -> ConceptModel:
    """The same as `fuse` gives it: it has its concepts at hand, and says how it was made."""
    return dataclasses.replace(golden_fused, concepts=golden_concepts, settings={"method": "gradient"})


@pytest.fixture
def draw(golden_pipeline: Any, golden_concepts: tuple[Concept, Concept]) -> Any:
    """The golden base as a pipeline of ours that knows both concepts' words and has their LoRAs at hand."""
    from mixofshow import MixOfShowPipeline

    return MixOfShowPipeline.of(ConceptModel(golden_pipeline, vocabulary(golden_concepts), concepts=golden_concepts))


@pytest.fixture
def xl_pipeline(golden_pipeline: Any) -> Any:
    """A tiny random base with the topology of SDXL: 28 cross-attention layers in 11 blocks, two text encoders."""
    return tiny_xl(golden_pipeline.tokenizer)


@pytest.fixture
def v_pipeline(golden_pipeline: Any) -> Any:
    """A tiny random base with the topology of SD 2.x: v-prediction, another text encoder, linear projections."""
    return tiny_v(golden_pipeline.tokenizer)


def tiny_xl(tokenizer: Any) -> Any:
    """Untrained, from one seed."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    second = copy.deepcopy(tokenizer)
    second.pad_token = "!"
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 3),
        attention_head_dim=(1, 2, 2),
        norm_num_groups=4,
        cross_attention_dim=16 + 24,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 12,
    )
    pipeline = StableDiffusionXLPipeline(
        vae=_autoencoder(0.13025),
        text_encoder=CLIPTextModel(_text_config(tokenizer, hidden_size=16, hidden_act="quick_gelu")),
        text_encoder_2=CLIPTextModelWithProjection(_text_config(tokenizer, hidden_size=24, projection_dim=12)),
        tokenizer=tokenizer,
        tokenizer_2=second,
        unet=unet,
        scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        add_watermarker=False,
    )
    return _ready(pipeline)


def tiny_v(tokenizer: Any) -> Any:
    """Untrained, from one seed."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8, 16, 16),
        attention_head_dim=(1, 1, 2, 2),
        norm_num_groups=4,
        cross_attention_dim=48,
        use_linear_projection=True,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )
    pipeline = StableDiffusionPipeline(
        vae=_autoencoder(0.18215),
        text_encoder=CLIPTextModel(_text_config(tokenizer, hidden_size=48)),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return _ready(pipeline)


def _text_config(tokenizer: Any, **changed: Any) -> Any:
    from transformers import CLIPTextConfig

    given = {"num_hidden_layers": 3, "num_attention_heads": 2, "hidden_act": "gelu", **changed}
    # 2 is what SDXL's own text encoders say, and is no token's that ends a prompt.
    return CLIPTextConfig(
        vocab_size=len(tokenizer), intermediate_size=2 * given["hidden_size"], bos_token_id=0, eos_token_id=2, **given
    )


def _autoencoder(scaling_factor: float) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(4, 4, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=scaling_factor,
    )


def _ready(pipeline: Any) -> Any:
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No cache, and an error for whoever reaches for the network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "no-cache"))

    def refuse(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's Chromium, without a window. Skips where there is none: `make browser` installs it where it may."""
    if CHROMIUM is None:
        pytest.skip("no Chromium here")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()
