"""Folders that cannot be used, each refused with what is wrong and what to do; sharded and 4-bit loading."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from teachers.base import Sampling
from teachers.gguf_file import TeacherFileError
from teachers.huggingface import HuggingFaceTeacher
from teachers.huggingface_folder import load_model
from teachers.huggingface_model import FloatHead, LoadedModel
from teachers.huggingface_speech import speak
from teachers.model_folder import check_folder
from teachers.recipe import Recipe
from tests.tiny_checkpoint import BOS, edit, make_folder, make_model, save_tokenizer, texts

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound checkpoint folder, to be copied."""
    return make_folder(tmp_path_factory.mktemp("huggingface") / "sound")


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    return Path(shutil.copytree(sound, tmp_path / "folder"))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def as_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def without_a_tensor(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def smaller_model(folder: Path) -> None:
    make_model(280).save_pretrained(folder)


def index(folder: Path, content: object) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "folder missing": (shutil.rmtree, "folder does not exist; give the folder of a transformers checkpoint"),
    "no config": (lambda f: (f / "config.json").unlink(), "folder has no config.json"),
    "config no JSON": (lambda f: truncate(f / "config.json"), "config.json cannot be read as JSON"),
    "config not UTF-8": (
        lambda f: (f / "config.json").write_bytes(b"\xff{"),
        "config.json cannot be read as JSON",
    ),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "config.json holds a list"),
    "config of nonsense": (
        lambda f: edit(f / "config.json", num_attention_heads="x"),
        "transformers cannot load .*folder: ",
    ),
    "other architecture": (
        lambda f: edit(f / "config.json", model_type="t5", architectures=["T5"]),
        "transformers cannot load .*folder: ",
    ),
    "code of its own": (
        lambda f: edit(f / "config.json", auto_map={"AutoModelForCausalLM": "modeling.Model"}),
        "config.json has auto_map .*never run; use a model",
    ),
    "tokenizer code": (
        lambda f: edit(f / "tokenizer_config.json", auto_map={"AutoTokenizer": ["a.B", None]}),
        "tokenizer_config.json has auto_map",
    ),
    "an adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), "holds an adapter .*merge"),
    "pickle": (as_pickle, "only as pytorch_model.bin, a pickle, .*save_pretrained"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
    "truncated weights": (lambda f: truncate(f / "model.safetensors"), "model.safetensors is truncated"),
    "empty weights": (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors is truncated"),
    "a tensor missing": (without_a_tensor, "lacks 1 tensors .*'model.layers.2.mlp.up_proj.weight'"),
    "index of nothing": (lambda f: index(f, {}), "index.json has no weight_map"),
    "index elsewhere": (
        lambda f: index(f, {"weight_map": {"a": "../model.safetensors"}}),
        "names '../model.safetensors'",
    ),
    "shard missing": (
        lambda f: index(f, {"weight_map": {"a": "model-1.safetensors"}}),
        "model-1.safetensors is missing",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "folder has no tokenizer.json"),
    "tokenizer no JSON": (lambda f: truncate(f / "tokenizer.json"), "tokenizer.json cannot be read as JSON"),
    "tokenizer of nonsense": (
        lambda f: (f / "tokenizer.json").write_text("{}"),
        "tokenizer.json cannot be used",
    ),
    "tokenizer too large": (smaller_model, "tokenizer.json has 290 tokens, the model's output only 280"),
    "stop outside": (
        lambda f: edit(f / "generation_config.json", eos_token_id=[1, 300]),
        "special token 300 is outside the vocabulary of 300; correct generation_config.json",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_folders_are_refused_with_a_reason(folder: Path, case: str) -> None:
    """Nothing is loaded, and the message says what is wrong."""
    damage, message = BAD[case]
    damage(folder)
    with pytest.raises(TeacherFileError, match=message):
        HuggingFaceTeacher(folder)


def test_a_file_is_no_folder(folder: Path) -> None:
    """A path to one of the files."""
    with pytest.raises(TeacherFileError, match="is not a folder; give the folder"):
        HuggingFaceTeacher(folder / "config.json")


def test_an_encoder_is_refused(tmp_path: Path) -> None:
    """BERT loads as a causal model, and sees what it should predict."""
    make_folder(tmp_path / "encoder", kind="bert")
    with pytest.raises(TeacherFileError, match=r"encoder: a bert model .* sees tokens to come"):
        HuggingFaceTeacher(tmp_path / "encoder")


def test_several_files_of_weights(folder: Path, sound: Path) -> None:
    """A sharded checkpoint is the same model; each of its files is looked at."""
    whole = HuggingFaceTeacher(sound)
    (folder / "model.safetensors").unlink()
    make_model(300).save_pretrained(folder, max_shard_size="200KB")
    teacher = HuggingFaceTeacher(folder)
    assert len(teacher.folder.weights) > 2
    assert teacher.info.parameters == whole.info.parameters
    assert np.array_equal(teacher.logits(texts(3)), whole.logits(texts(3)))
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
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert np.array_equal(teacher.output_rows(5, 8), model.model.embed_tokens.weight[5:8].detach().numpy())
    assert teacher.info.parameters == sum(p.numel() for p in model.parameters())


@needs_bitsandbytes
def test_4_bit(sound: Path) -> None:
    """NF4 on whatever device there is: quantised layers, answers near the float ones, another digest."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    from bitsandbytes.nn import Linear4bit

    exact, rounded = HuggingFaceTeacher(sound), HuggingFaceTeacher(sound, load_in_4bit=True)
    for layer in rounded._model.layers:
        assert isinstance(layer.self_attn.q_proj, Linear4bit) and isinstance(layer.mlp.down_proj, Linear4bit)
        assert layer.mlp.down_proj.weight.quant_type == "nf4"
    sequences = texts(6)
    one, two = exact.logits(sequences), rounded.logits(sequences)
    assert np.corrcoef(one.ravel(), two.ravel())[0, 1] > 0.9  # random weights amplify every layer's rounding
    assert np.abs(one - two).max() > 1e-3, "nothing was rounded"
    floats = dict(exact._model.model.named_modules())
    for name, module in rounded._model.model.named_modules():
        if isinstance(module, Linear4bit):
            weight = floats[name].weight
            weight.copy_(dequantize_4bit(*quantize_4bit(weight, quant_type="nf4")))
    same = exact.logits(sequences)  # of the rounded weights; some CPUs round their scales to bfloat16
    assert np.linalg.norm(same - two) < 0.2 * np.linalg.norm(one - two)
    assert rounded.info.sha256 != exact.info.sha256
    assert rounded.info.tokenizer_sha256 == exact.info.tokenizer_sha256
    assert (rounded.info.parameters, rounded.info.vocab_size) == (
        exact.info.parameters,
        exact.info.vocab_size,
    )
    assert np.array_equal(rounded.output_rows(0, 9), exact.output_rows(0, 9))
    assert len(rounded.score(sequences, Recipe("hidden"), {})["hidden"]) == len(one)
    (spoken,) = rounded.speak([[np.array([BOS], np.int32)]], Sampling(temperature=0, max_length=8))
    assert np.array_equal(rounded.logits([spoken]).argmax(axis=-1), spoken[1:])


@needs_bitsandbytes
def test_4_bit_of_a_quantised_folder_is_refused(folder: Path) -> None:
    """Quantised twice makes no sense."""
    edit(folder / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(TeacherFileError, match="is quantised already; load it without load_in_4bit"):
        HuggingFaceTeacher(folder, load_in_4bit=True)


def test_4_bit_without_bitsandbytes_says_how_to_install_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message holds the command."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(TeacherFileError, match="-m pip install bitsandbytes"):
        HuggingFaceTeacher(folder, load_in_4bit=True)


def test_weights_in_other_precisions_load(folder: Path, sound: Path) -> None:
    """A bfloat16 file is computed in float32 on a CPU."""
    make_model(300).to(torch.bfloat16).save_pretrained(folder)
    found, exact = HuggingFaceTeacher(folder).logits(texts(3)), HuggingFaceTeacher(sound).logits(texts(3))
    assert found.dtype == np.float32 and np.corrcoef(found.ravel(), exact.ravel())[0, 1] > 0.999


def test_bfloat16_as_on_a_gpu(sound: Path) -> None:
    """What a GPU computes with: logits are float32 and exactly the final states times the output matrix."""
    model = LoadedModel(
        load_model(check_folder(sound), torch.device("cpu"), torch.bfloat16, load_in_4bit=False)
    )
    assert model.model.dtype == torch.bfloat16 and isinstance(model.head, FloatHead)
    sequences = texts(5)
    answer = model.answer(sequences, logits=True, states=True, layers=(1,))
    assert answer.logits is not None and answer.states is not None and answer.layers is not None
    assert answer.logits.dtype == answer.states.dtype == answer.layers[1].dtype == torch.float32
    product = answer.states @ torch.from_numpy(model.output_rows(0, 300)).T
    assert torch.allclose(product, answer.logits, atol=1e-4)
    exact = HuggingFaceTeacher(sound).logits(sequences)
    assert np.corrcoef(answer.logits.numpy().ravel(), exact.ravel())[0, 1] > 0.99
    begun = [np.array([BOS, *range(5, 5 + n)], np.int32) for n in (1, 6)]
    spoken = speak(
        model.model,
        [[one] for one in begun],
        Sampling(max_length=12),
        first_index=0,
        end_tokens=(),
        progress=lambda done: None,
    )
    assert [len(tokens) for tokens in spoken] == [12, 12]
