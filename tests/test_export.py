"""The exported file against llama.cpp itself, against transformers, and against a model that is not it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from transformers import AutoModelForCausalLM

from distill.config import Quant
from distill.errors import ProofFailed
from distill.exporting import Export, Proofs, export_proved, tokenizer_entries
from distill.prove import Proof, TokenizedLines, prove
from distill.run_folder import HeldOut
from students.builder import build_student, student_config
from students.export import ExportError, ExportNames, permute_for_rope, write_gguf
from students.gguf_names import from_gguf_name
from students.model import SO8TForCausalLM
from students.shape import ChosenShape, StudentSize
from teachers import example_teacher
from teachers.gguf_file import read_gguf
from teachers.gguf_teacher import GGUFTeacher
from tests.conftest import make_student

NAMES = ExportNames("tested student", {"teacher_name": "example"})


@pytest.fixture(scope="module")
def tokenizer() -> dict:
    return tokenizer_entries(read_gguf(example_teacher()))


@pytest.fixture(scope="module")
def vocab_size(tokenizer: dict) -> int:
    return len(tokenizer["tokenizer.ggml.tokens"][0])


def held_out(vocab_size: int, texts: list[str] | None = None) -> HeldOut:
    random = np.random.default_rng(3)
    sequences = [random.integers(3, vocab_size, size=n).astype(np.int32) for n in (60, 2, 33)]
    return HeldOut(sequences, TokenizedLines([], []))


def proved(student: SO8TForCausalLM, path: Path, quant: Quant, tokenizer: dict, held: HeldOut) -> Proof:
    """Export to one file; the proof of that."""
    proofs: Proofs = export_proved(Export(student, tokenizer, NAMES, held), {quant: path})
    assert proofs.original.max_logit_difference <= 1e-3 and proofs.original.against == "PyTorch"
    return proofs.need(quant)


@pytest.mark.parametrize(
    ("quant", "difference", "kl"), [("f32", 1e-4, 1e-8), ("f16", 0.1, 1e-4), ("q8_0", 1.0, 5e-3)]
)
@pytest.mark.parametrize(("width", "tied"), [(64, True), (320, False), (72, True)])
def test_llama_cpp_computes_what_pytorch_computes(
    tmp_path: Path,
    tokenizer: dict,
    vocab_size: int,
    quant: Quant,
    difference: float,
    kl: float,
    width: int,
    tied: bool,
) -> None:
    """Grouped-query heads (320), odd widths (72), tied and untied: logits agree as closely as the format allows."""
    config = student_config(
        StudentSize(width, 2), vocab_size=vocab_size, context_length=128, tie_embeddings=tied, bos=0, eos=1
    )
    student = build_student(config, 1).eval()
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if ".gate." in name:
                parameter.normal_(generator=torch.Generator().manual_seed(2))
            elif parameter.ndim == 2:
                parameter.mul_(4.0)  # lively logits, so that a wrong computation shows
    proof = proved(student, tmp_path / "s.gguf", quant, tokenizer, held_out(vocab_size))
    assert proof.max_logit_difference <= difference and proof.mean_kl <= kl and proof.positions == 92
    assert [path.name for path in tmp_path.iterdir()] == ["s.gguf"]


@pytest.mark.parametrize(("quant", "difference"), [("f32", 1e-4), ("q8_0", 1.0)])
@pytest.mark.parametrize(("heads", "kv_heads", "head_width"), [(4, 2, 32), (8, 8, 4), (2, 1, 36)])
def test_heads_of_their_own_width_in_llama_cpp(
    tmp_path: Path,
    tokenizer: dict,
    vocab_size: int,
    quant: Quant,
    difference: float,
    heads: int,
    kv_heads: int,
    head_width: int,
) -> None:
    """Heads that are together wider or narrower than the model: the file says so, and every reader follows."""
    config = student_config(
        StudentSize(64, 2),
        vocab_size=vocab_size,
        context_length=128,
        chosen=ChosenShape(heads=heads, kv_heads=kv_heads, head_width=head_width),
    )
    student = build_student(config, 1).eval()
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if ".gate." in name:
                parameter.normal_(generator=torch.Generator().manual_seed(2))
            elif parameter.ndim == 2:
                parameter.mul_(4.0)
    path, held = tmp_path / "s.gguf", held_out(vocab_size)
    proof = proved(student, path, quant, tokenizer, held)
    assert proof.max_logit_difference <= difference and proof.positions == 92
    keys = ("attention.key_length", "attention.value_length", "rope.dimension_count")
    assert [read_gguf(path).value(f"llama.{key}") for key in keys] == [head_width] * 3
    if quant == "f32":
        llama = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="s.gguf", dtype=torch.float32).eval()
        tokens = torch.from_numpy(held.sequences[0].astype(np.int64))[None]
        with torch.no_grad():
            assert (llama(tokens).logits - student(tokens).logits).abs().max() <= 1e-3


def test_ordinary_files_say_nothing_of_head_widths(tmp_path: Path, tokenizer: dict, vocab_size: int) -> None:
    """Where the heads fill the width, every reader's default holds and the files stay what they were."""
    write_gguf(make_student(64, 1, vocab_size), tmp_path / "s.gguf", "f32", tokenizer, NAMES)
    file = read_gguf(tmp_path / "s.gguf")
    assert not [key for key in file.fields if key.endswith(("key_length", "value_length"))]
    assert file.value("llama.rope.dimension_count") == 16


def test_another_model_fails_the_proof(tmp_path: Path, tokenizer: dict, vocab_size: int) -> None:
    """A file whose gate was not folded, or whose rows were not permuted, is found out and gets no name."""
    student = make_student(64, 2, vocab_size)
    path = tmp_path / "s.gguf"
    write_gguf(student, path, "f32", tokenizer, NAMES)
    with torch.no_grad():
        student.gates()[1].safety += 0.05
    with pytest.raises(ProofFailed, match="differ from PyTorch"):
        prove(path, student, held_out(vocab_size).sequences, TokenizedLines([], []))


def test_a_failed_proof_leaves_the_old_file(
    tmp_path: Path, tokenizer: dict, vocab_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new file gets its name only after the proof; until then the old one stays."""
    path = tmp_path / "s.gguf"
    path.write_bytes(b"precious")
    monkeypatch.setattr("students.export.permute_for_rope", lambda weight, heads: weight)
    with pytest.raises(ProofFailed):
        proved(make_student(64, 2, vocab_size), path, "f32", tokenizer, held_out(vocab_size))
    assert path.read_bytes() == b"precious" and len(list(tmp_path.iterdir())) == 1


def test_a_foreign_tokenizer_fails_the_proof(tmp_path: Path, tokenizer: dict, vocab_size: int) -> None:
    """Ids that differ from the teacher's are found out by text."""
    student = make_student(64, 1, vocab_size)
    lines = TokenizedLines(["Please book a room."], [np.array([1, 2, 3], dtype=np.int32)])
    held = HeldOut(held_out(vocab_size).sequences, lines)
    with pytest.raises(ProofFailed, match="tokenizer"):
        proved(student, tmp_path / "s.gguf", "f32", tokenizer, held)


def test_tokenizer_and_template_are_copied_as_they_are(
    tmp_path: Path, tokenizer: dict, vocab_size: int
) -> None:
    """Every tokenizer.* entry of the teacher stands in the student with the same value and type."""
    write_gguf(make_student(64, 1, vocab_size), tmp_path / "s.gguf", "f16", tokenizer, NAMES)
    copied = tokenizer_entries(read_gguf(tmp_path / "s.gguf"))
    assert copied == tokenizer and "tokenizer.chat_template" in copied


def test_every_tensor_is_accounted_for(tmp_path: Path, tokenizer: dict, vocab_size: int) -> None:
    """The file reopened has exactly the folded student's tensors; norms are F32, matrices as asked."""
    student = make_student(64, 3, vocab_size)
    write_gguf(student, tmp_path / "s.gguf", "q8_0", tokenizer, NAMES)
    reader = GGUFReader(tmp_path / "s.gguf")
    names = {from_gguf_name(tensor.name) for tensor in reader.tensors}
    expected = {name for name in student.state_dict() if "gate." not in name or "gate_proj" in name}
    assert names == expected - {"lm_head.weight"}
    kinds = {tensor.name.split(".")[-2]: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["attn_norm"] == "F32" and kinds["attn_q"] == "Q8_0" and kinds["token_embd"] == "Q8_0"
    assert reader.fields["so8t.teacher_name"].contents() == "example"
    assert reader.fields["so8t.max_orthogonality_error"].contents() <= 1e-5


def test_transformers_reads_the_file_too(tmp_path: Path, tokenizer: dict, vocab_size: int) -> None:
    """``gguf_file=`` gives a Llama with the gated student's logits."""
    student = make_student(64, 2, vocab_size)
    write_gguf(student, tmp_path / "s.gguf", "f32", tokenizer, NAMES)
    llama = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="s.gguf", dtype=torch.float32).eval()
    tokens = torch.from_numpy(held_out(vocab_size).sequences[0].astype(np.int64))[None]
    with torch.no_grad():
        assert (llama(tokens).logits - student(tokens).logits).abs().max() <= 1e-3


def test_permutation_is_the_pairing_of_halves() -> None:
    """Row order by definition: pair i of a head is (i, i + W/2), laid out as rows 2i and 2i + 1."""
    weight = np.arange(2 * 6 * 3, dtype=np.float32).reshape(12, 3)
    permuted = permute_for_rope(weight, heads=2)
    for head in range(2):
        for pair in range(3):
            assert np.array_equal(permuted[head * 6 + 2 * pair], weight[head * 6 + pair])
            assert np.array_equal(permuted[head * 6 + 2 * pair + 1], weight[head * 6 + pair + 3])


def test_wrong_vocabulary_or_format(tmp_path: Path, tokenizer: dict) -> None:
    """A tokenizer of another size and an unknown format are refused before a file exists."""
    with pytest.raises(ExportError, match="96 tokens"):
        write_gguf(make_student(), tmp_path / "s.gguf", "f32", tokenizer, NAMES)
    with pytest.raises(ExportError, match="q2_k"):
        write_gguf(make_student(), tmp_path / "s.gguf", "q2_k", tokenizer, NAMES)
    assert not list(tmp_path.iterdir())


def test_the_exported_tokenizer_is_the_teachers(tmp_path: Path, tokenizer: dict, vocab_size: int) -> None:
    """Text in both languages, control tokens included, gives the same ids in both files."""
    write_gguf(make_student(64, 1, vocab_size), tmp_path / "s.gguf", "f16", tokenizer, NAMES)
    texts = ["<|user|>\nHow long for 120 km?<|end|>", "休暇を3日取りたい。", "   odd  spaces\n\n", ""]
    with (
        GGUFTeacher(example_teacher(), threads=1) as teacher,
        GGUFTeacher(tmp_path / "s.gguf", threads=1) as copy,
    ):
        for parse in (True, False):
            theirs = teacher.tokenize(texts, add_special=True, parse_special=parse)
            ours = copy.tokenize(texts, add_special=True, parse_special=parse)
            assert [t.tolist() for t in ours] == [t.tolist() for t in theirs]
