"""Mix-of-Show as a community pipeline of diffusers:

    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        custom_pipeline="examples/pipeline_mix_of_show.py",
        trust_remote_code=True,  # it runs this file
    )
    pipe.load_concept("alice.safetensors")
    pipe.load_concept("bob.safetensors")

diffusers takes the one pipeline that it finds here. It needs this package.
"""

from mixofshow import MixOfShowPipeline

__all__ = ["MixOfShowPipeline"]
