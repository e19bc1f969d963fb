"""Checks at the start of a training: memory, by the closed form alone, and a few images.

Where even all of the weights' files would fit if they were trained, nothing else is asked: the numbers
of parameters come from the models' classes, whose libraries take seconds to import.
"""

from __future__ import annotations

import os
import sys
from itertools import chain
from pathlib import Path

import numpy as np

from pipelines.estimate.memory import Memory
from pipelines.estimate.words import memory_words, worker_words
from pipelines.execution.connection import has_gpu
from pipelines.images.external import UndecodableImage, is_listing
from pipelines.images.random_access import Decode, RowIndex, RowReader
from pipelines.training.config import Stage1Config, Stage2Config, TrainConfig
from pipelines.training.memory import Parameters, states
from vlv_model.checkpoints.digests import opened_files
from vlv_model.checkpoints.files import WEIGHTS_FILE, read_chain
from vlv_model.checkpoints.layouts import base_parts
from vlv_model.checkpoints.sources import part_source
from vlv_model.errors import DataError, ModelError, RunError, one_line
from vlv_model.squares import Square

_IMAGES = 16  # tried before the start

_NEW_PARAMETERS = 20_000_000  # more than the queries and a projector between the published widths


def check_before_start(config: Stage1Config | Stage2Config) -> None:
    """Raise RunError when weights, gradients and optimiser alone exceed a known GPU.

    Known are the GPU of `estimate.machine` and one that this process sees, if the job starts its own
    Ray. Of a cluster's GPU only a line is printed, and its workers check; of a CPU's memory a warning.
    """
    train = config.train
    if train.use_gpu is False and (config.ray.cluster or _fits_by_far(config)):
        return

    from pipelines.training.dry_run import training_states

    try:
        memory, _ = training_states(config)
    except ModelError:
        return  # a model that has yet to be downloaded: its workers check
    if train.use_gpu is False:
        _warn_of_host(memory, train.least_workers)
    elif machine := config.estimate.found_machine():
        check_fits(memory, machine.gpu.memory, machine.gpu.name, train, train.most_workers)
    elif (seen := _seen_gpu()) and not config.ray.cluster:
        check_fits(memory, *seen, train, train.most_workers)
    else:
        print(
            f"weights, gradients and optimiser take {memory_words(memory.least)} of each GPU: "
            "estimate.machine is not set, so the workers compare it with theirs",
            file=sys.stderr,
        )


def check_images(files: list[Path], rows: RowIndex, decode: Decode, square: Square) -> None:
    """Raise DataError when none of a few images of a listing `files` can be used.

    A wrong setting spoils all images; a training leaves out single broken ones.
    """
    if not is_listing(files[0]):
        return
    reader, errors = RowReader(rows, decode=decode), []
    for position in np.linspace(0, len(rows) - 1, min(_IMAGES, len(rows))).astype(int):
        try:
            reader.square(int(position), square)
            return
        except UndecodableImage as error:
            errors.append(error)
    raise DataError(
        f"{one_line(errors[0])} (none of {len(errors)} images that were tried can be used)"
    )


def check_fits(memory: Memory, capacity: int, gpu: str, train: TrainConfig, workers: int) -> None:
    """Raise RunError when weights, gradients and optimiser alone exceed `capacity` bytes."""
    if memory.least > capacity:
        raise RunError(
            f"weights, gradients and optimiser take {memory_words(memory.least)} of each GPU, and "
            f"{gpu} has {memory_words(capacity)}: {_advice(train, workers)}"
        )


def _fits_by_far(config: Stage1Config | Stage2Config) -> bool:
    """Whether this machine could train every weight that the files of the models may hold."""
    model, checkpoint = config.model.find()
    stage = "stage2" if isinstance(config, Stage2Config) else "stage1"
    folders = [part_source(model, part).folder() for part in base_parts(stage, model)]
    files = [opened_files(folder) if folder else [] for folder in folders]
    if not all(files):
        return False  # a model that has yet to be downloaded
    trained = [folder / WEIGHTS_FILE for folder, _ in read_chain(checkpoint)] if checkpoint else []
    size = sum(file.stat().st_size for file in chain(*files, trained))
    # Weights are stored in two bytes at least; a new projector is in no file.
    number = size // 2 + _NEW_PARAMETERS
    least = states(config.train, Parameters(number, 0, number), config.train.least_workers).least
    return least * config.train.least_workers <= _host_memory()


def _host_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _seen_gpu() -> tuple[int, str] | None:
    """Memory and name of this process's first GPU."""
    if not has_gpu():
        return None
    import torch

    seen = torch.cuda.get_device_properties(0)
    return seen.total_memory, seen.name


def _warn_of_host(memory: Memory, workers: int) -> None:
    needed = memory.least * workers
    there = _host_memory()
    if needed > there:
        print(
            f"warning: weights, gradients and optimiser of {worker_words(workers)} take "
            f"{memory_words(needed)}, and this machine has {memory_words(there)}: use fewer workers, "
            "smaller models or GPUs",
            file=sys.stderr,
        )


def _advice(train: TrainConfig, workers: int) -> str:
    """The settings that would save memory and are not set yet."""
    advice = []
    if train.precision == "float32":
        advice.append("train.precision=bfloat16")
    if workers > 1 and train.zero_stage < 3:
        advice.append(f"train.zero_stage={max(2, train.zero_stage + 1)}")
    if train.zero_stage and not train.offload_optimizer:
        advice.append("train.offload_optimizer=true")
    return ", or ".join([*(f"set {setting}" for setting in advice), "use larger or more GPUs"])
