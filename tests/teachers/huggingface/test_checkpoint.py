"""Folders that cannot be used, each refused with a reason; sharded and 4-bit loading."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from teachers.base import GenerationRequest, Sampling
from teachers.gguf.file import TeacherFileError
from teachers.huggingface.checkpoint import load_model
from teachers.huggingface.folder import check_folder
from teachers.huggingface.generation import generate
from teachers.huggingface.model import FloatHead, LoadedModel
from teachers.huggingface.teacher import HuggingFaceTeacher
from teachers.targets.recipe import Recipe
from tests.support.tiny_checkpoint import BOS, edit, make_folder, make_model, save_tokenizer, texts

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG, TOKENIZER, GENERATION = "config.json", "tokenizer.json", "generation_config.json"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound checkpoint folder, to be copied."""
    return make_folder(tmp_path_factory.mktemp("huggingface") / "sound")


@pytest.fixture(scope="module")
def exact(sound: Path) -> HuggingFaceTeacher:
    """The checkpoint, loaded."""
    return HuggingFaceTeacher(sound)


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint to damage."""
    return Path(shutil.copytree(sound, tmp_path / "folder"))


def truncate(path: Path) -> None:
    """Cut a file in half."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def without_a_tensor(path: Path) -> None:
    """Take one matrix out."""
    weights = load_file(path)
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, path, metadata={"format": "pt"})


def as_pickle(path: Path) -> None:
    """Name the weights as a pickle is named."""
    path.rename(path.with_name("pytorch_model.bin"))


def smaller_model(path: Path) -> None:
    """Put a model there that has fewer tokens."""
    make_model(280).save_pretrained(path.parent)


# A file's name, what becomes of it (its bytes, changed entries, or a change), and what is said.
Harm = bytes | dict[str, object] | Callable[[Path], object]
BAD: list[tuple[str, Harm, str]] = [
    ("", shutil.rmtree, "folder does not exist; give the folder of a transformers checkpoint"),
    (CONFIG, Path.unlink, "folder has no config.json"),
    (CONFIG, truncate, "config.json cannot be read as JSON"),
    (CONFIG, b"\xff{", "config.json cannot be read as JSON"),
    (CONFIG, b"[]", "config.json holds a list"),
    (CONFIG, {"num_attention_heads": "x"}, "transformers cannot load .*folder: "),
    (CONFIG, {"model_type": "t5", "architectures": ["T5"]}, "transformers cannot load .*folder: "),
    (CONFIG, {"auto_map": {"AutoModelForCausalLM": "a.B"}}, "auto_map .*never run; use a model"),
    ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["a.B"]}}, "config.json has auto_map"),
    ("adapter_config.json", b"{}", "holds an adapter .*merge"),
    (WEIGHTS, as_pickle, "only as pytorch_model.bin, a pickle, .*save_pretrained"),
    (WEIGHTS, Path.unlink, "has no model.safetensors"),
    (WEIGHTS, truncate, "model.safetensors is truncated"),
    (WEIGHTS, b"", "model.safetensors is truncated"),
    (WEIGHTS, without_a_tensor, "lacks 1 tensors .*'model.layers.2.mlp.up_proj.weight'"),
    (WEIGHTS, smaller_model, "json has 290 tokens, the model's output only 280"),
    (INDEX, b"{}", "index.json has no weight_map"),
    (INDEX, b'{"weight_map": {"a": "../model.safetensors"}}', "names '../model.safetensors'"),
    (INDEX, b'{"weight_map": {"a": "model-1.safetensors"}}', "model-1.safetensors is missing"),
    (TOKENIZER, Path.unlink, "folder has no tokenizer.json"),
    (TOKENIZER, truncate, "tokenizer.json cannot be read as JSON"),
    (TOKENIZER, b"{}", "tokenizer.json cannot be used"),
    (GENERATION, {"eos_token_id": [1, 300]}, "300 is outside the vocabulary of 300; correct gen"),
]


def test_bad_folders_are_refused_with_a_reason(sound: Path, tmp_path: Path) -> None:
    """Nothing is loaded, and the message says what is wrong."""
    for number, (name, harm, words) in enumerate(BAD):
        folder = Path(shutil.copytree(sound, tmp_path / str(number) / "folder"))
        if name == INDEX:
            (folder / WEIGHTS).unlink()
        if isinstance(harm, bytes):
            (folder / name).write_bytes(harm)
        elif isinstance(harm, dict):
            edit(folder / name, **harm)
        else:
            harm(folder / name)
        with pytest.raises(TeacherFileError, match=words):
            HuggingFaceTeacher(folder)
            pytest.fail(f"not refused: {words}")


def test_what_is_no_folder_or_no_decoder_is_refused(folder: Path, tmp_path: Path) -> None:
    """One of the files; BERT, which loads as a causal model and sees what it should predict."""
    with pytest.raises(TeacherFileError, match="is not a folder; give the folder"):
        HuggingFaceTeacher(folder / CONFIG)
    make_folder(tmp_path / "encoder", kind="bert")
    with pytest.raises(TeacherFileError, match=r"encoder: a bert model .* sees tokens to come"):
        HuggingFaceTeacher(tmp_path / "encoder")


def test_several_files_of_weights(folder: Path, exact: HuggingFaceTeacher) -> None:
    """A sharded checkpoint is the same model; each of its files is looked at."""
    (folder / WEIGHTS).unlink()
    make_model(300).save_pretrained(folder, max_shard_size="200KB")
    teacher = HuggingFaceTeacher(folder)
    assert len(teacher.folder.weights) > 2
    assert teacher.info.parameters == exact.info.parameters
    assert np.array_equal(teacher.logits(texts(3)), exact.logits(texts(3)))
    truncate(teacher.folder.weights[1])
    with pytest.raises(TeacherFileError, match=f"{teacher.folder.weights[1].name} is truncated"):
        HuggingFaceTeacher(folder)


def test_tied_weights_are_not_missing(tmp_path: Path) -> None:
    """A model whose output matrix is its embedding has it once in the file."""
    save_tokenizer(tmp_path)
    model = make_model(300, tie_word_embeddings=True)
    model.tie_weights()
    model.save_pretrained(tmp_path)
    teacher = HuggingFaceTeacher(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / WEIGHTS)
    embedding = model.model.embed_tokens.weight[5:8].detach().numpy()
    assert np.array_equal(teacher.output_rows(5, 8), embedding)
    assert teacher.info.parameters == sum(p.numel() for p in model.parameters())


@needs_bitsandbytes
def test_4_bit(sound: Path) -> None:
    """NF4 on any device: quantized layers, answers near the float ones, another digest."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    from bitsandbytes.nn import Linear4bit

    exact, rounded = HuggingFaceTeacher(sound), HuggingFaceTeacher(sound, load_in_4bit=True)
    for layer in rounded.model.layers:
        for module in (layer.self_attn.q_proj, layer.mlp.down_proj):
            assert isinstance(module, Linear4bit) and module.weight.quant_type == "nf4"
    sequences = texts(6)
    one, two = exact.logits(sequences), rounded.logits(sequences)
    # Random weights amplify every layer's rounding.
    assert np.corrcoef(one.ravel(), two.ravel())[0, 1] > 0.9
    assert np.abs(one - two).max() > 1e-3, "nothing was rounded"
    floats = dict(exact.model.model.named_modules())
    for name, module in rounded.model.model.named_modules():
        if isinstance(module, Linear4bit):
            weight = floats[name].weight
            weight.copy_(dequantize_4bit(*quantize_4bit(weight, quant_type="nf4")))
    same = exact.logits(sequences)  # of rounded weights; some CPUs round their scales to bfloat16
    assert np.linalg.norm(same - two) < 0.2 * np.linalg.norm(one - two)
    assert rounded.info.sha256 != exact.info.sha256
    for name in ("tokenizer_sha256", "parameters", "vocab_size"):
        assert getattr(rounded.info, name) == getattr(exact.info, name), name
    assert np.array_equal(rounded.output_rows(0, 9), exact.output_rows(0, 9))
    assert len(rounded.score(sequences, Recipe("hidden"), {})["hidden"]) == len(one)
    start = np.array([BOS], np.int32)
    (spoken,) = rounded.generate(
        GenerationRequest([[start]], Sampling(temperature=0, max_length=8))
    )
    assert np.array_equal(rounded.logits([spoken]).argmax(axis=-1), spoken[1:])


def test_where_4_bit_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without bitsandbytes, with the command that installs it; quantized twice makes no sense."""
    with monkeypatch.context() as changed:
        changed.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(TeacherFileError, match="-m pip install bitsandbytes"):
            HuggingFaceTeacher(folder, load_in_4bit=True)
    edit(
        folder / CONFIG, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}
    )
    with pytest.raises(
        TeacherFileError, match="is quantized already; load it without load_in_4bit"
    ):
        HuggingFaceTeacher(folder, load_in_4bit=True)


def test_weights_in_other_precisions_load(folder: Path, exact: HuggingFaceTeacher) -> None:
    """A bfloat16 file is computed in float32 on a CPU."""
    make_model(300).to(torch.bfloat16).save_pretrained(folder)
    found, expected = (one.logits(texts(3)) for one in (HuggingFaceTeacher(folder), exact))
    assert found.dtype == np.float32
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.999


def test_bfloat16_as_on_a_gpu(sound: Path, exact: HuggingFaceTeacher) -> None:
    """What a GPU computes with: float32 logits, exactly final states times the output matrix."""
    loaded = load_model(
        check_folder(sound), torch.device("cpu"), torch.bfloat16, load_in_4bit=False
    )
    model = LoadedModel(loaded)
    assert model.model.dtype == torch.bfloat16 and isinstance(model.head, FloatHead)
    sequences = texts(5)
    answer = model.answer(sequences, logits=True, states=True, layers=(1,))
    assert answer.logits is not None and answer.states is not None and answer.layers is not None
    for rows in (answer.logits, answer.states, answer.layers[1]):
        assert rows.dtype == torch.float32
    product = answer.states @ torch.from_numpy(model.output_rows(0, 300)).T
    assert torch.allclose(product, answer.logits, atol=1e-4)
    expected = exact.logits(sequences)
    assert np.corrcoef(answer.logits.numpy().ravel(), expected.ravel())[0, 1] > 0.99
    spoken = generate(
        model.model,
        GenerationRequest(
            [[np.array([BOS, *range(5, 5 + n)], np.int32)] for n in (1, 6)], Sampling(max_length=12)
        ),
        (),
        lambda done: None,
    )
    assert [len(tokens) for tokens in spoken] == [12, 12]
