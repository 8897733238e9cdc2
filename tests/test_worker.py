"""The worker: what it scores is right, and what kills llama.cpp does not kill the parent."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from teachers.chat_template import ChatTemplateError, render_chat
from teachers.errors import TeacherError, WorkerDefect
from teachers.gguf_teacher import GGUFTeacher
from teachers.recipe import NODES, Recipe
from teachers.records import typed
from teachers.soft_targets import CompactTargets
from teachers.worker import Worker


def sequences_of(teacher: GGUFTeacher, lengths: list[int], seed: int = 0) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.integers(3, teacher.info.vocab_size, size=n).astype(np.int32) for n in lengths]


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
    for row, ids, values, tails in zip(
        dense, targets.topk_ids, targets.topk_logits, targets.tail, strict=True
    ):
        order = np.argsort(-row, kind="stable")[:6]
        assert order.tolist() == ids.tolist()
        assert np.array_equal((row[ids] - row[ids[0]]).astype(np.float16), values.numpy())  # kept in half
        rest = np.delete(row.astype(np.float64) - float(row[ids[0]]), ids)
        for node, found in zip(NODES, tails.tolist(), strict=True):
            assert found == pytest.approx(np.log(np.exp(rest * node).sum()), abs=1e-5)


def test_batching_does_not_change_a_sequence(tiny_teacher: GGUFTeacher) -> None:
    """Many sequences in one batch, also more than fit at once, score as each does alone."""
    sequences = sequences_of(tiny_teacher, [60] * 50 + [3, 200, 100], seed=1)
    together = tiny_teacher.logits(sequences, exact=True)
    start = 0
    for place, tokens in enumerate(sequences):
        rows = together[start : start + len(tokens) - 1]
        start += len(tokens) - 1
        if place % 10 == 0 or place > 48:
            assert np.abs(rows - tiny_teacher.logits([tokens], exact=True)).max() < 1e-4
    assert start == len(together)


def test_text_round_trip(tiny_teacher: GGUFTeacher) -> None:
    """Tokens turn back into the text, Japanese and odd characters included."""
    for text in ("Order 7 boxes.", "会議室を予約したい。", "tab\tnew\nline ☃ é"):
        tokens = tiny_teacher.tokenize([text], add_special=False, parse_special=False)[0]
        assert tiny_teacher.detokenize([tokens])[0] == text


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


def rewrite(source: Path, target: Path, **changes: object) -> Path:
    """Copy a GGUF file with some metadata changed."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "llama")
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        element = field.types[1] if len(field.types) > 1 else None
        value = changes.pop(key, field.contents())
        writer.add_key_value(key, value, field.types[0], element)
    assert not changes
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.mark.parametrize(
    "changes",
    [
        {"llama.block_count": 0},
        {"llama.block_count": 1000},
        {"llama.attention.head_count": 7},
        {"llama.embedding_length": 128},
        {"tokenizer.ggml.model": "unheard-of"},
    ],
    ids=str,
)
def test_headers_that_llama_cpp_refuses_or_dies_of(
    tiny_teacher_path: Path, tmp_path: Path, changes: dict[str, object]
) -> None:
    """A well-formed file with impossible settings: one error that names the file, no crash, no hang."""
    path = rewrite(tiny_teacher_path, tmp_path / "odd.gguf", **changes)
    with pytest.raises(TeacherError, match=r"odd\.gguf"), GGUFTeacher(path, threads=1) as teacher:
        teacher.logits(sequences_of(teacher, [8]))


@pytest.mark.parametrize(
    "recipe", [Recipe(num_topk=4), Recipe("hidden"), Recipe("dense")], ids=lambda recipe: recipe.kind
)
def test_a_teacher_with_broken_weights_is_refused(
    tiny_teacher_path: Path, tmp_path: Path, recipe: Recipe
) -> None:
    """One NaN weight makes every logit NaN; capture must not store that."""
    path = tmp_path / "nan.gguf"
    data = bytearray(tiny_teacher_path.read_bytes())
    norm = next(t for t in gguf.GGUFReader(tiny_teacher_path).tensors if t.name == "output_norm.weight")
    data[norm.data_offset : norm.data_offset + 4] = np.float32("nan").tobytes()
    path.write_bytes(data)
    with GGUFTeacher(path, threads=1) as teacher, pytest.raises(TeacherError, match=r"nan\.gguf.*not finite"):
        teacher.score(sequences_of(teacher, [8]), recipe, {})


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
    assert render_chat(template, said, add_generation_prompt=True, bos="B") == "B<user>hi"
    for bad in (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception('only system') }}",
        "{% for %}",
        "{{ 1 + 'a' }}",
    ):
        with pytest.raises(ChatTemplateError, match="chat template"):
            render_chat(bad, said, add_generation_prompt=False)


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="needs SIGSTOP to make a process hang")
def test_a_hanging_worker_is_given_up(tiny_teacher_path: Path) -> None:
    """A worker that neither answers nor computes is stopped and reported, not waited for."""
    worker = Worker(tiny_teacher_path, threads=1, hung_seconds=1.0)
    try:
        os.kill(worker.process_id, signal.SIGSTOP)
        with pytest.raises(TeacherError, match=r"gave no sign of life.*during tokenize.*same command again"):
            worker.ask("tokenize", {"texts": ["a"], "add_special": False, "parse_special": False})
    finally:
        worker.close()


def test_an_idle_worker_is_left_alone(tiny_teacher_path: Path) -> None:
    """Silence is only suspicious while something is asked."""
    worker = Worker(tiny_teacher_path, threads=1, hung_seconds=0.2)
    try:
        time.sleep(1.0)
        request = {"texts": ["a"], "add_special": False, "parse_special": False}
        assert worker.ask("tokenize", request)[1]["tokens_lengths"].tolist() != []
    finally:
        worker.close()


def test_a_mistake_of_ours_in_the_worker_is_no_users_error(tiny_teacher_path: Path) -> None:
    """A Python error in the child reaches the parent with its traceback, not as a damaged file."""
    worker = Worker(tiny_teacher_path, threads=1)
    try:
        with pytest.raises(WorkerDefect, match=r"(?s)Traceback.*KeyError"):
            worker.ask("tokenize", {})
    finally:
        worker.close()
