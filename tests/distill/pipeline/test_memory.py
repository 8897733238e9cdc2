"""The memory of a run's stages, and a student that does not fit on its device."""

from __future__ import annotations

from dataclasses import replace

import pytest

from distill.base_models.new_student_memory import memory_of_new
from distill.config.loading import parse_config
from distill.errors import UserError
from distill.pipeline.memory import (
    CAPTURE,
    EVALUATION,
    EXPORT,
    TRAINING,
    Models,
    stage_peaks,
)
from distill.pipeline.resolve import Resolved, require_memory
from distill.runtime.progress import Console
from students.model.build import student_config
from students.model.config import SO8TConfig
from students.model.shape import parse_size
from tests.support.pretended_gpu import DEVICE, MEMORY, training_on_gpu
from tests.support.teachers import BigramTeacher

GB = 10**9
VOCAB = 32_000


def shape_of(size: str) -> SO8TConfig:
    return student_config(
        parse_size(size), vocab_size=VOCAB, context_length=512, tie_embeddings=True
    )


def test_stages_on_a_device() -> None:
    """Training and the teacher never lie on the device together, unless the teacher scores what
    the student writes; main memory holds the student once it has left the device."""
    config = parse_config({"student": {"size": "1024x16"}})
    training = memory_of_new(shape_of("1024x16"), config, DEVICE)
    models = Models(
        process=GB // 2,
        teacher=GB,
        on_device=5 * GB,
        worker=GB // 2,
        training=training,
        exported=training.base_numbers,
        vocab_size=VOCAB,
        longest=256,
        scored=2560,
    )
    peaks = stage_peaks(models, config)
    assert peaks[TRAINING].device == training.total
    assert peaks[CAPTURE].device == 5 * GB <= peaks[EVALUATION].device < 5 * GB + training.trained
    assert peaks[EXPORT].device < training.total
    assert peaks[EVALUATION].main > training.trained + models.teacher
    assert peaks[TRAINING].main == GB // 2 + training.snapshots + training.trained
    policy = config.model_copy(update={"train": config.train.model_copy(update={"on_policy": 0.5})})
    assert stage_peaks(models, policy)[TRAINING].device == training.total + 5 * GB
    alone = stage_peaks(replace(models, training=replace(training, on_cpu=True)), config)
    assert all(peak.device == 0 for peak in alone.values())
    assert alone[TRAINING].main > training.total


def test_a_student_that_does_not_fit_is_refused_by_the_device() -> None:
    """Named, with what it has and what to change; followed, the advice makes it fit."""
    info = replace(BigramTeacher(8, 8).info, vocab_size=VOCAB, parameters=8 * GB)
    train = {"batch_size": 64, "gradient_checkpointing": False}
    config = parse_config({"student": {"size": "1024x16"}, "train": train})
    large = Resolved(config, shape_of("1024x16"), None)
    with training_on_gpu():
        with pytest.raises(UserError) as error:
            require_memory(large, info, 512, Console(quiet=True))
        text = str(error.value)
        assert f"{DEVICE} has {MEMORY / GB:.2f} GB" in text
        assert "train.gradient_checkpointing=true saves" in text
        followed = config.train.model_copy(update={"gradient_checkpointing": True})
        smaller = replace(large, config=config.model_copy(update={"train": followed}))
        require_memory(smaller, info, 512, Console(quiet=True))
