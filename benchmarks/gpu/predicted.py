"""What `--dry-run` predicts for the memory of a step of the check."""

from __future__ import annotations

from benchmarks.gpu.setting import Setting
from benchmarks.training.steps import StageName
from pipelines.estimate.memory import Memory

_QWEN = "Qwen/Qwen2.5-{}"


def training_memory_of(setting: Setting, stage: StageName, variant: str) -> Memory | None:
    """Memory of a job's worker with the rows, precision and latents of a variant.

    None for sizes that are not published, and without the packages that the estimate needs.
    """
    if setting.size_name != "full":
        return None
    try:
        from pipelines.cli.config import load
        from pipelines.training.config import Stage1Config, Stage2Config
        from pipelines.training.dry_run import training_memory
    except ModuleNotFoundError:
        return None
    rows = setting.size.batch[stage == "stage2"]
    exact = "float32" in variant or not setting.on_cuda
    settings = ["data.input=/images", "run_dir=/run", f"train.global_batch_size={rows}"]
    settings += [f"train.precision={'float32' if exact else 'bfloat16'}"]
    settings += [f"train.use_gpu={str(setting.on_cuda).lower()}"]
    if stage == "stage1":
        settings += ["data.latents=/latents"] * ("latents" in variant)
        return training_memory(load(Stage1Config, None, settings))
    settings += [f"model.language_model={_QWEN.format(setting.language_model)}"]
    return training_memory(load(Stage2Config, None, settings))


def training_gb(setting: Setting, stage: StageName, variant: str) -> float | None:
    """The same without DeepSpeed's buckets, in GB (10^9 bytes), to compare with what torch allocates."""
    memory = training_memory_of(setting, stage, variant)
    return memory and round((memory.allocated - memory.buckets) / 1e9, 2)
