"""The worker: what it scores is right, and what kills llama.cpp does not kill the parent."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from contextlib import closing
from itertools import product
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from teachers.errors import RequestRefused, TeacherError, WorkerDefect
from teachers.llama_cpp.first_decode import REFERENCE
from teachers.llama_cpp.teacher import GGUFTeacher
from teachers.llama_cpp.wire import pack_ragged
from teachers.llama_cpp.worker import Worker
from teachers.llama_cpp.worker_process import WorkerProcess
from teachers.targets.distributions import CompactTargets
from teachers.targets.recipe import NODES, Recipe
from teachers.targets.stored_arrays import typed
from teachers.tokenizer.chat_template import ChatTemplateError, render_chat
from tests.support.teachers import rewrite, sequences_of
from tests.support.tiny_models import Tiny, stored, write_tiny

ONE_TEXT = {"texts": ["a"], "add_special": False, "parse_special": False}


def test_scores_equal_the_dense_logits(tiny_teacher: GGUFTeacher) -> None:
    """Compact targets are the exact top-k and tail masses of the very logits llama.cpp computes."""
    sequences = sequences_of(tiny_teacher, [5, 40, 2, 17])
    dense = tiny_teacher.logits(sequences)
    recipe = Recipe(num_topk=6)
    targets = typed(
        tiny_teacher.score(sequences, recipe, {}), recipe, tiny_teacher.info.vocab_size, None, None
    )
    assert isinstance(targets, CompactTargets)
    assert len(targets.topk_ids) == len(dense) == sum(len(s) - 1 for s in sequences)
    ids = np.argsort(-dense, axis=1, kind="stable")[:, :6]
    assert np.array_equal(targets.topk_ids.numpy(), ids)
    rest = dense - dense.max(axis=1, keepdims=True)
    kept = np.take_along_axis(rest, ids, axis=1).astype(np.float16)  # in half precision
    assert np.array_equal(targets.topk_logits.numpy(), kept)
    np.put_along_axis(rest, ids, -np.inf, axis=1)
    masses = np.exp(rest.astype(np.float64)[..., None] * np.array(NODES)).sum(axis=1)
    assert targets.tail.numpy() == pytest.approx(np.log(masses), abs=1e-5)


def test_batching_does_not_change_a_sequence(tiny_teacher: GGUFTeacher) -> None:
    """Many sequences in one batch, also more than fit at once, score as each does alone."""
    sequences = sequences_of(tiny_teacher, [60] * 50 + [3, 200, 100], seed=1)
    ends = np.cumsum([len(tokens) - 1 for tokens in sequences])
    together = tiny_teacher.logits(sequences, exact=True)
    assert ends[-1] == len(together)
    for place in (0, 10, 20, 30, 40, 49, 50, 51, 52):
        alone = tiny_teacher.logits([sequences[place]], exact=True)
        rows = together[ends[place] - len(alone) : ends[place]]
        assert np.abs(rows - alone).max() < 1e-4, place


def test_text_round_trip(tiny_teacher: GGUFTeacher) -> None:
    """Tokens turn back into the text, Japanese and odd characters included."""
    texts = ["Order 7 boxes.", "会議室を予約したい。", "tab\tnew\nline ☃ é"]
    tokens = tiny_teacher.tokenize(texts, add_special=False, parse_special=False)
    assert tiny_teacher.detokenize(tokens) == texts


@pytest.mark.skipif(sys.platform == "win32", reason="names of files are Unicode there")
def test_a_name_that_is_no_utf8(tiny_teacher_path: Path, tmp_path: Path) -> None:
    """Linux takes any bytes for a name: the file is loaded, and named in an error."""
    path = tmp_path / os.fsdecode(b"caf\xe9.gguf")
    try:
        path.symlink_to(tiny_teacher_path)
    except (OSError, UnicodeError):
        pytest.skip("the file system takes no such name")
    with GGUFTeacher(path, threads=1) as teacher:
        assert teacher.tokenize(["Hello"], add_special=False, parse_special=False)[0].size
    path.unlink()
    path.write_bytes(tiny_teacher_path.read_bytes()[:2000])
    with pytest.raises(TeacherError) as refused:
        Worker(path, threads=1)
    assert str(path) in str(refused.value)


def test_a_killed_worker_becomes_one_clear_error(tiny_teacher_path: Path) -> None:
    """The parent survives its child's death and says how it died; later calls say so too."""
    teacher = GGUFTeacher(tiny_teacher_path, threads=1)
    os.kill(teacher.worker.process_id, signal.SIGKILL)
    for _ in range(2):
        with pytest.raises(TeacherError, match=r"died.*SIGKILL"):
            teacher.tokenize(["x"], add_special=False, parse_special=False)
    teacher.close()


IMPOSSIBLE: list[dict[str, object]] = [
    {"llama.block_count": 0},
    {"llama.block_count": 1000},
    {"llama.attention.head_count": 7},
    {"llama.embedding_length": 128},
    {"tokenizer.ggml.model": "unheard-of"},
]


@pytest.mark.parametrize("changes", IMPOSSIBLE, ids=str)
def test_headers_that_llama_cpp_refuses_or_dies_of(
    tiny_teacher_path: Path, tmp_path: Path, changes: dict[str, object]
) -> None:
    """A well-formed file with impossible settings: one error that names the file, no crash."""
    path = rewrite(tiny_teacher_path, tmp_path / "odd.gguf", **changes)
    with pytest.raises(TeacherError, match=r"odd\.gguf"), GGUFTeacher(path, threads=1) as teacher:
        teacher.logits(sequences_of(teacher, [8]))


def test_a_teacher_with_broken_weights_is_refused(tiny_teacher_path: Path, tmp_path: Path) -> None:
    """One NaN weight makes every logit NaN; capture must not store that, in no kind of targets."""
    path = tmp_path / "nan.gguf"
    data = bytearray(tiny_teacher_path.read_bytes())
    tensors = gguf.GGUFReader(tiny_teacher_path).tensors
    norm = next(tensor for tensor in tensors if tensor.name == "output_norm.weight")
    data[norm.data_offset : norm.data_offset + 4] = np.float32("nan").tobytes()
    path.write_bytes(data)
    with GGUFTeacher(path, threads=1) as teacher:
        for recipe in (Recipe(num_topk=4), Recipe("hidden"), Recipe("dense")):
            with pytest.raises(TeacherError) as refused:
                teacher.score(sequences_of(teacher, [8]), recipe, {})
            assert re.search(r"nan\.gguf.*not finite", str(refused.value)), recipe.kind


def test_compact_targets_refuse_non_finite_logits() -> None:
    """The refusal itself, without llama.cpp."""
    logits = torch.zeros(2, 5)
    logits[1, 3] = float("inf")
    with pytest.raises(ValueError, match="not finite"):
        CompactTargets.from_logits(logits, 2)


def test_chat_templates_are_sandboxed() -> None:
    """Rendering works; Python's insides, and templates that refuse, end in our error."""
    template = "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m.content }}{% endfor %}"
    said = [{"role": "user", "content": "hi"}]
    assert render_chat(template, said, add_generation_prompt=True, bos="B").text == "B<user>hi"
    for bad in (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception('only system') }}",
        "{% for %}",
        "{{ 1 + 'a' }}",
    ):
        with pytest.raises(ChatTemplateError, match="chat template"):
            render_chat(bad, said, add_generation_prompt=False)


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="needs SIGSTOP to make a process hang")
def test_a_hanging_worker_is_given_up_and_an_idle_one_is_not(tiny_teacher_path: Path) -> None:
    """Silence is only suspicious while something is asked; then it is reported, not waited for."""
    with closing(Worker(tiny_teacher_path, threads=1, hung_seconds=0.5)) as worker:
        time.sleep(1.0)
        assert worker.ask("tokenize", ONE_TEXT)[1]["tokens_lengths"].tolist() != []
        os.kill(worker.process_id, signal.SIGSTOP)
        silent = r"gave no sign of life.*during tokenize.*same command again"
        with pytest.raises(TeacherError, match=silent):
            worker.ask("tokenize", ONE_TEXT)


def test_a_mistake_of_ours_in_the_worker_is_no_users_error(tiny_teacher_path: Path) -> None:
    """A Python error in the child reaches the parent with its traceback."""
    with (
        closing(Worker(tiny_teacher_path, threads=1)) as worker,
        pytest.raises(WorkerDefect, match=r"(?s)Traceback.*KeyError"),
    ):
        worker.ask("tokenize", {})


def test_an_encoder_that_llama_cpp_loads_is_refused(tmp_path: Path) -> None:
    """By its want of a memory, whatever its file says; a BERT computes, but no next token."""
    tiny, draw = Tiny(kv_heads=4, head_width=12), np.random.default_rng(0)
    shapes: dict[str, Any] = {"position_embd.weight": (256, 48), "token_types.weight": (2, 48)}
    shapes |= {f"token_embd_norm.{part}": 48 for part in ("weight", "bias")}
    for i, part in product(range(tiny.layers), ("weight", "bias")):
        for name, out in {"attn_q": 48, "attn_k": 48, "attn_v": 48, "attn_output": 48}.items():
            shapes[f"blk.{i}.{name}.{part}"] = (out, 48) if part == "weight" else out
        for name in ("attn_output_norm", "layer_output_norm"):
            shapes[f"blk.{i}.{name}.{part}"] = 48
        shapes[f"blk.{i}.ffn_up.{part}"] = (80, 48) if part == "weight" else 80
        shapes[f"blk.{i}.ffn_down.{part}"] = (48, 80) if part == "weight" else 48
    tensors: dict[str, Any] = dict.fromkeys(stored(tiny).keys() - {"token_embd.weight"})
    tensors |= {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    values = {"attention.layer_norm_epsilon": 1e-5, "tokenizer.ggml.token_type_count": 2}
    path = write_tiny(tmp_path / "bert.gguf", tiny, tensors, values, "bert")
    with closing(WorkerProcess(path, REFERENCE, threads=1)) as process:
        with pytest.raises(RequestRefused, match="no causal language model"):
            process.ask("first_decode", {"tokens": 2, "exact": False})
        with pytest.raises(RequestRefused, match="no causal language model"):
            process.ask(
                "logits", {"exact": False, "last": None}, pack_ragged([np.arange(9)], "tokens")
            )
