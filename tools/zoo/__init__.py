"""Small pipelines of every family, built in code from the real classes: nothing is downloaded.

`build(StableDiffusionPipeline)` reads the pipeline's own `__init__`, makes each component at a tiny configuration, and returns a real pipeline;
`call_arguments(pipe)` gives the arguments of a tiny call. All text encoders are `WIDTH` wide, so that any of them fits any denoiser.
"""

from zoo.build import NotBuildable, build
from zoo.inputs import call_arguments


__all__ = ["NotBuildable", "build", "call_arguments"]
