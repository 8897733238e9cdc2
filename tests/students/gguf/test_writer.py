"""The exported file against llama.cpp, transformers, and a model that is not it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from transformers import AutoModelForCausalLM

from distill.capture.temporary_files.tokenizer_only import tokenizer_entries
from distill.config.schema import Quant
from distill.errors import ProofFailed
from distill.export.export import Export, Proofs, export_proved
from distill.export.proof import expected_of, proof_sequences, prove
from distill.runs.folder import HeldOut
from distill.runs.proof_record import Proof
from students.gguf.architectures import from_gguf_name
from students.gguf.metadata import ExportError, ExportNames
from students.gguf.writer import write_gguf
from students.mapped_tensors import MappedTensors
from students.model.build import build_student, student_config
from students.model.config import SO8TConfig
from students.model.decoder import SO8TForCausalLM
from students.model.shape import ChosenShape, StudentSize
from teachers import example_teacher
from teachers.base import TokenizedLines
from teachers.gguf.file import read_gguf
from teachers.llama_cpp.teacher import GGUFTeacher
from tests.support.pretended_gpu.arithmetic import rounded_products
from tests.support.students import make_student

pytestmark = pytest.mark.usefixtures("llama_here")
NAMES = ExportNames("tested student", {"teacher_name": "example"})
TOKENIZER = tokenizer_entries(read_gguf(example_teacher()))
VOCAB = len(TOKENIZER["tokenizer.ggml.tokens"][0])


def held_out() -> HeldOut:
    random = np.random.default_rng(3)
    sequences = [random.integers(3, VOCAB, size=n).astype(np.int32) for n in (60, 2, 33)]
    return HeldOut(sequences, TokenizedLines([], []))


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student in Q8_0."""
    path = tmp_path_factory.mktemp("ordinary") / "s.gguf"
    write_gguf(make_student(64, 3, VOCAB), path, "q8_0", TOKENIZER, NAMES)
    return path


def lively(config: SO8TConfig) -> SO8TForCausalLM:
    """A student in whose logits a wrong computation shows."""
    student = build_student(config, 1).eval()
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if ".gate." in name:
                parameter.normal_(generator=torch.Generator().manual_seed(2))
            elif parameter.ndim == 2:
                parameter.mul_(4.0)
    return student


def proved(
    student: SO8TForCausalLM, folder: Path, held: HeldOut, *quants: Quant
) -> dict[Quant, Proof]:
    """Export to ``folder``, a file for each type; their proofs."""
    wanted = {quant: folder / f"{quant}.gguf" for quant in quants}
    proofs: Proofs = export_proved(Export(student, TOKENIZER, NAMES, held), wanted)
    original = proofs.original
    assert original.max_logit_difference <= 1e-3 and original.against == "PyTorch"
    proofs.require(folder)
    return {quant: proofs.files[quant] for quant in quants}


def difference_in_transformers(student: SO8TForCausalLM, path: Path, held: HeldOut) -> float:
    """How far the logits of the Llama that transformers reads from the file are from ours."""
    load = AutoModelForCausalLM.from_pretrained
    llama = load(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    tokens = torch.from_numpy(held.sequences[0].astype(np.int64))[None]
    with torch.no_grad():
        return float((llama(tokens).logits - student(tokens).logits).abs().max())


LIMITS: dict[Quant, tuple[float, float]] = {
    "f32": (1e-4, 1e-8),
    "f16": (0.1, 1e-4),
    "q8_0": (1.0, 5e-3),
}


OWN_HEADS = [(4, 2, 32), (8, 8, 4), (2, 1, 36)]  # together wider or narrower than the model


@pytest.mark.parametrize(
    ("width", "tied", "heads"),
    [(64, True, ()), (320, False, ()), (72, True, ()), *((64, True, own) for own in OWN_HEADS)],
)
def test_llama_cpp_computes_what_pytorch_computes(
    tmp_path: Path, width: int, tied: bool, heads: tuple[int, ...]
) -> None:
    """Grouped-query heads (320), odd widths (72): logits agree as closely as the format allows.

    A file says how wide heads of their own width are, and readers follow.
    """
    config = student_config(
        StudentSize(width, 2),
        vocab_size=VOCAB,
        context_length=128,
        tie_embeddings=tied,
        bos=0,
        eos=1,
        chosen=ChosenShape(*heads),
    )
    student, held = lively(config), held_out()
    keys = ("attention.key_length", "attention.value_length", "rope.dimension_count")
    for quant, proof in proved(student, tmp_path, held, *LIMITS).items():
        difference, kl = LIMITS[quant]
        assert proof.max_logit_difference <= difference and proof.mean_kl <= kl, quant
        assert proof.positions == 92, quant
        file = read_gguf(tmp_path / f"{quant}.gguf")
        assert not heads or [file.value(f"llama.{key}") for key in keys] == [heads[2]] * 3, quant
    assert {path.name for path in tmp_path.iterdir()} == {f"{quant}.gguf" for quant in LIMITS}
    if width == 64:
        assert difference_in_transformers(student, tmp_path / "f32.gguf", held) <= 1e-3


def test_a_proof_holds_whatever_is_switched_on(tmp_path: Path) -> None:
    """PyTorch's side computes in float32; rounded products were off by more than the limit."""
    with rounded_products():
        proof = proved(make_student(64, 2, VOCAB), tmp_path, held_out(), "f32")["f32"]
    assert proof.max_logit_difference <= LIMITS["f32"][0]


def test_another_model_fails_the_proof(tmp_path: Path) -> None:
    """A file whose gate was not folded fails."""
    student = make_student(64, 2, VOCAB)
    path = tmp_path / "s.gguf"
    write_gguf(student, path, "f32", TOKENIZER, NAMES)
    with torch.no_grad():
        student.gates()[1].safety += 0.05
    sequences = held_out().sequences
    with MappedTensors(tmp_path) as kept:
        expected = expected_of(student, proof_sequences(sequences, VOCAB), kept)
        with pytest.raises(ProofFailed, match="differ from PyTorch"):
            prove(path, expected, HeldOut(sequences, TokenizedLines([], [])), kept)


def test_a_failed_proof_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new file gets its name only after the proof; until then the old one stays."""
    path = tmp_path / "f32.gguf"
    path.write_bytes(b"precious")
    student, held = make_student(64, 2, VOCAB), held_out()
    lines = TokenizedLines(["Please book a room."], [np.array([1, 2, 3], dtype=np.int32)])
    with pytest.raises(ProofFailed, match="tokenizer"):  # one that gives other ids
        proved(student, tmp_path, HeldOut(held.sequences, lines), "f32")
    monkeypatch.setattr("students.gguf.writer.permute_for_rope", lambda weight, heads: weight)
    with pytest.raises(ProofFailed, match="differ from PyTorch"):
        proved(student, tmp_path, held, "f32")
    assert path.read_bytes() == b"precious" and len(list(tmp_path.iterdir())) == 1


def test_every_tensor_and_entry_is_accounted_for(ordinary: Path) -> None:
    """The folded student's tensors, norms in F32; the teacher's tokenizer and chat template."""
    reader = GGUFReader(ordinary)
    names = {from_gguf_name(tensor.name) for tensor in reader.tensors}
    state = make_student(64, 3, VOCAB).state_dict()
    expected = {name for name in state if "gate." not in name or "gate_proj" in name}
    assert names == expected - {"lm_head.weight"}
    kinds = {tensor.name.split(".")[-2]: tensor.tensor_type.name for tensor in reader.tensors}
    assert (kinds["attn_norm"], kinds["attn_q"], kinds["token_embd"]) == ("F32", "Q8_0", "Q8_0")
    file = read_gguf(ordinary)
    assert file.value("so8t.teacher_name") == "example"
    assert file.value("so8t.max_orthogonality_error") <= 1e-5
    copied = tokenizer_entries(file)
    assert copied == TOKENIZER and "tokenizer.chat_template" in copied
    # Where the heads fill the width, every reader's default holds.
    assert not [key for key in file.fields if key.endswith(("key_length", "value_length"))]
    assert file.value("llama.rope.dimension_count") == 16


def test_wrong_vocabulary_or_format(tmp_path: Path) -> None:
    """A tokenizer of another size and an unknown format are refused before a file exists."""
    with pytest.raises(ExportError, match="96 tokens"):
        write_gguf(make_student(), tmp_path / "s.gguf", "f32", TOKENIZER, NAMES)
    with pytest.raises(ExportError, match="q2_k"):
        write_gguf(make_student(), tmp_path / "s.gguf", "q2_k", TOKENIZER, NAMES)
    assert not list(tmp_path.iterdir())


def test_the_exported_tokenizer_is_the_teachers(ordinary: Path, example_gguf: GGUFTeacher) -> None:
    """Text in both languages, control tokens included, gives the same ids in both files."""
    texts = [
        "<|user|>\nHow long for 120 km?<|end|>",
        "休暇を3日取りたい。",
        "  odd  spaces\n\n",
        "",
    ]
    with GGUFTeacher(ordinary, threads=1) as copy:
        for parse in (True, False):
            theirs = example_gguf.tokenize(texts, add_special=True, parse_special=parse)
            ours = copy.tokenize(texts, add_special=True, parse_special=parse)
            assert [one.tolist() for one in ours] == [one.tolist() for one in theirs]
