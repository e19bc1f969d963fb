"""The parts of the check: what each needs, how long it may take, and the function that it runs."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_MODEL = ("torch", "transformers", "PIL", "pydantic")  # what vlv_model.captioner imports
_STAGE_2 = (*_MODEL, "upath")  # and the trainings' settings
_STAGE_1 = (*_STAGE_2, "diffusers")
_JOBS = (*_STAGE_1, "pyarrow", "ray")
_DISTRIBUTIONS = {"PIL": "Pillow", "upath": "universal_pathlib"}  # where pip has another name


@dataclass(frozen=True)
class Part:
    """A part, which runs in a process of its own."""

    name: str
    function: str  # "module:name" in benchmarks.gpu; takes the check's Setting, returns figures
    needs: tuple[str, ...]  # modules that must be installed
    seconds: float  # time limit
    cuda: bool = False  # needs a CUDA device

    def lacking(self, device: str) -> str | None:
        """Why the part cannot run here; None: it can."""
        missing = [name for name in self.needs if importlib.util.find_spec(name) is None]
        if missing:
            return f"pip install {' '.join(_DISTRIBUTIONS.get(name, name) for name in missing)}"
        if self.cuda and device != "cuda":
            return "needs a CUDA device"
        return None

    def load(self) -> Callable[..., dict[str, Any]]:
        module, name = self.function.split(":")
        function: Callable[..., dict[str, Any]] = getattr(
            importlib.import_module(f"benchmarks.gpu.{module}"), name
        )
        return function


# The parts that tell most come first, in case the time ends.
PARTS = {
    part.name: part
    for part in (
        Part("device", "device:device", ("torch",), 40),
        Part("stage 2 step", "steps:stage2", _STAGE_2, 100),
        Part("stage 1 step", "steps:stage1", _STAGE_1, 100),
        Part("captions, greedy", "captions:greedy", _MODEL, 70),
        Part("captions, beam 4", "captions:beams", _MODEL, 80),
        Part("stage 2 bfloat16", "precision:stage2", _STAGE_2, 60),
        Part("stage 1 bfloat16", "precision:stage1", _STAGE_1, 60),
        Part("NCCL", "distributed:all_reduce", ("torch",), 40),
        Part("DeepSpeed", "distributed:deepspeed_step", (*_STAGE_1, "deepspeed"), 70),
        Part("make gpu", "suite:gpu_tests", (*_JOBS, "pytest", "hypothesis"), 90, cuda=True),
        Part("vLLM", "engines:compare", (*_JOBS, "vllm"), 150, cuda=True),
    )
}
