"""What regions cost: sampling with regions beside plain diffusers, of the same model, size and steps.

    python benchmarks/sampling.py [--json FILE] [--repeats 5] [--steps 2] [--bases sd15,emojiland] [--shrink 1] [--no-counts]

Three regions cover 75 % of the picture: SD 1.5 at 1024×512, SDXL at 1024×1024, Emojiland at 160×64. All ways draw latents,
with classifier-free guidance, encoding of the prompts included, and take turns; medians count. `three_loras` is with a LoRA
of its own for each region: random ED-LoRAs of rank 4 on the linear layers of attention, as the paper has them;
`three_locons`, on Emojiland, with the three example concepts, which change convolutions and all other layers too. Then
plain regions against their number. Bases that are run by themselves are added to those in the JSON file. `--shrink 4` makes sides
a quarter as long, which flatters nobody: what a LoRA costs grows with the cells, attention with their square. Times are
the processor's where there is no GPU, since those of the clock depend on what else the machine does.

`max_error` is the largest difference between one layer's regional attention and the formula
h[M_i] = softmax(Q(z_i) K_iᵀ/√d) V_i, written out naively on random tensors.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from figures import keep, known
from shapes import BASES, random_concept
from torch import Tensor, nn

from mixofshow.concepts.concept import Concept, load_concept
from mixofshow.concepts.model import ConceptModel, with_words
from mixofshow.sampling.attention import RegionText, regional
from mixofshow.sampling.pipeline import MixOfShowPipeline
from mixofshow.sampling.regions import Region, Shape, cells

SIZES = {"sd15": (1024, 512), "sdxl": (1024, 1024), "emojiland": (160, 64)}
EXAMPLES = Path(__file__).parents[1] / "examples" / "concepts"
CONCEPTS = ("clown", "steamtrain", "robot")
COUNTS = (1, 2, 4, 8, 16)
THIRDS = [(k / 3, 0.125, (k + 1) / 3, 0.875) for k in range(3)]
"""Boxes of three regions that cover 75 % of the picture."""


def main() -> None:
    """Measure, print, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--bases", default="sd15,emojiland")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shrink", type=int, default=1, help="of SD 1.5 and SDXL: sides so many times shorter")
    parser.add_argument("--no-counts", action="store_true", help="only three regions")
    options = parser.parse_args()
    torch.set_flush_denormal(True)
    figures: dict[str, float] = known(options.json)
    figures["max_error"] = max_error()
    print(f"max_error {figures['max_error']:.1e}")
    for base in options.bases.split(","):
        pipeline = BASES[base]().to(options.device)
        shrink = 1 if base == "emojiland" else options.shrink
        width, height = (side // shrink for side in SIZES[base])
        how: dict[str, Any] = {
            "width": width,
            "height": height,
            "num_inference_steps": 10 * options.steps if base == "emojiland" else options.steps,
            "guidance_scale": 5.0,
            "output_type": "latent",
        }
        ways = {
            "plain": plain(pipeline, how),
            "three regions": ours(pipeline, how, THIRDS),
            "three LoRAs": ours(pipeline, how, THIRDS, [random_concept(pipeline, name) for name in CONCEPTS]),
        }
        if base == "emojiland":
            examples = [load_concept(EXAMPLES / f"{name}.safetensors", pipeline) for name in CONCEPTS]
            ways["three LoCons"] = ours(pipeline, how, THIRDS, examples)
        seconds = taking_turns(ways, options.repeats)
        small = f"_at_{width}x{height}" if shrink > 1 else ""
        for way in list(ways)[1:]:
            figures[f"{base}{small}_{way.lower().replace(' ', '_')}"] = seconds[way] / seconds["plain"]
            print(f"{base}{small}: plain {seconds['plain']:.2f} s, {way} × {seconds[way] / seconds['plain']:.3f}", flush=True)
        keep(figures, options.json)
        if options.no_counts:
            continue
        counted = {str(count): ours(pipeline, how, columns_of(count)) for count in COUNTS}
        for count, taken in taking_turns(counted, max(1, options.repeats // 2)).items():
            print(f"  {count:>2} regions × {taken / seconds['plain']:.3f}")
        keep(figures, options.json)


def taking_turns(ways: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each way, after one turn that does not count."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            now = time.perf_counter if torch.cuda.is_available() else time.process_time
            start = now()
            way()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:
                taken[name].append(now() - start)
    return {name: statistics.median(times) for name, times in taken.items()}


def plain(pipeline: Any, how: dict[str, Any]) -> Callable[[], Any]:
    """One picture by plain diffusers."""
    pipeline.set_progress_bar_config(disable=True)
    return lambda: pipeline("a dog", **how)


def ours(
    pipeline: Any, how: dict[str, Any], boxes: Sequence[tuple[float, ...]], concepts: Sequence[Concept] = ()
) -> Callable[[], Any]:
    """The same with regions, and with concepts, each region by the LoRA of its own."""
    draw = MixOfShowPipeline.of(with_words(pipeline, concepts) if concepts else ConceptModel(pipeline))
    prompts = [f"a <{one.info.name}>" for one in concepts] or ["a cat"] * len(boxes)
    regions = [Region(prompt, box) for prompt, box in zip(prompts, boxes, strict=True)]  # type: ignore[arg-type]
    return lambda: draw("a dog", regions=regions, regional_lora=bool(concepts), **how)


def columns_of(count: int) -> list[tuple[float, ...]]:
    """Boxes side by side that cover 75 % of the picture, whatever their number."""
    return [(k / count, 0.125, (k + 1) / count, 0.875) for k in range(count)]


class OneLayer(nn.Module):
    """As much of a UNet as a cross-attention layer needs."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.mid_block = nn.Module()
        self.mid_block.attn2 = Attention(width, dim, heads=8, dim_head=width // 8)
        self.config = argparse.Namespace(block_out_channels=(width,))
        self.dtype = torch.float32


@torch.no_grad()
def max_error(columns: int = 64, rows: int = 32, width: int = 320, dim: int = 768) -> float:
    """Largest difference of our regional attention from the formula, over what it gives at the most, which is about 1."""
    torch.manual_seed(0)
    unet = OneLayer(width, dim)
    layer = unet.mid_block.attn2
    picture, text = torch.randn(2, rows * columns, width), torch.randn(2, 1, 77, dim)
    regions = [RegionText(Shape(box=box), torch.randn(2, 1, 77, dim)) for box in THIRDS]  # type: ignore[arg-type]
    with regional(unet, text, regions, batch=2, columns=columns, rows=rows):
        found = layer(picture, encoder_hidden_states=text)
    expected = naive(layer, picture, text[:, 0])
    for region in regions:
        left, top, right, bottom = cells(region.shape.box, columns=columns, rows=rows)  # type: ignore[arg-type]
        inside = torch.zeros(rows, columns, dtype=torch.bool)
        inside[top:bottom, left:right] = True
        expected[:, inside.flatten()] = naive(layer, picture[:, inside.flatten()], region.text[:, 0])
    return float((found - layer.to_out[0](expected)).abs().max())


def naive(layer: Any, picture: Tensor, text: Tensor) -> Tensor:
    """softmax(Q Kᵀ/√d) V, a head at a time, in double precision."""
    query, key, value = layer.to_q(picture), layer.to_k(text), layer.to_v(text)
    heads = [one.double().chunk(layer.heads, dim=-1) for one in (query, key, value)]
    made = [(q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1) @ v for q, k, v in zip(*heads, strict=True)]
    return torch.cat(made, -1).float()


if __name__ == "__main__":
    main()
