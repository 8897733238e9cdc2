"""The tool that makes a base model: it loads, and has learnt a little."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from typer import Typer
from typer.testing import CliRunner

from students.gguf.config_values import require_exportable
from teachers import example_teacher
from teachers.gguf.file import TeacherFileError, read_gguf, tokenizer_fields
from teachers.huggingface.checkpoint import load_model, load_tokenizer
from teachers.huggingface.folder import check_folder
from teachers.tokenizer.tokenizer_json import build_tokenizer
from tools.example_teacher.tokenizer import BOS_ID, EOS_ID, SPECIAL_TOKENS, dialogue_text
from tools.example_teacher.training import Settings
from tools.models import make_base as tool
from tools.models.make_base import Kind, make_base, make_large
from tools.models.random_teacher import Shape
from tools.models.random_teacher import write as write_teacher

CPU = torch.device("cpu")
TOKENS = 1024  # of the example teacher
FIELDS = tokenizer_fields(read_gguf(example_teacher()))
SMALL: dict[str, Any] = {"width": 64, "layers": 1, "steps": 0}


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


@pytest.mark.parametrize("kind", get_args(Kind))
def test_a_folder_that_loads(kind: Kind, tmp_path: Path) -> None:
    """A checked folder, with the teacher's ids, and of a kind that can be exported."""
    folder = make_base(tmp_path / "base", kind, width=96, layers=2, steps=0, extra_rows=5)
    assert folder == tmp_path / "base"
    checked = check_folder(folder)
    tokenizer = load_tokenizer(checked, TOKENS)
    text = dialogue_text([("How many lamps?", "Three. 三つ。")])
    ours = tokenizer(text, add_special_tokens=False).input_ids
    assert ours == build_tokenizer(FIELDS).encode(text, add_special_tokens=False).ids
    assert tokenizer.bos_token == SPECIAL_TOKENS[BOS_ID]
    assert "assistant" in tokenizer.chat_template
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    assert model.config.model_type == kind
    assert model.get_output_embeddings().weight.shape == (TOKENS + 5, 96)
    assert model.config.num_key_value_heads < model.config.num_attention_heads == 3
    require_exportable(model.config)
    generation = GenerationConfig.from_pretrained(folder)
    assert (generation.bos_token_id, generation.eos_token_id) == (BOS_ID, EOS_ID)
    assert torch.isfinite(model(torch.tensor([ours])).logits).all()
    loaded = load_model(checked, CPU, torch.float32, load_in_4bit=False)
    biases = [one for name, one in loaded.named_parameters() if name.endswith(".bias")]
    assert len(biases) == (6 if kind == "qwen2" else 0)
    assert all(one.std() > 0.01 for one in biases)
    assert model.config.tie_word_embeddings == kind.startswith("qwen")


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    sizes = SMALL | {"steps": 2}
    folders = [make_base(tmp_path / f"{n}", "llama", seed=n // 2, **sizes) for n in (2, 3, 4)]
    first, again, other = (digests(folder) for folder in folders)
    assert first == again
    assert {name for name in first if first[name] != other[name]} == {"model.safetensors"}
    assert torch.equal(state, torch.random.get_rng_state())


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    losses: list[float] = []
    make_base(tmp_path / "base", "qwen2", width=64, layers=1, steps=12, losses=losses)
    assert len(losses) == 12
    assert losses[0] == pytest.approx(torch.tensor(float(TOKENS)).log().item(), abs=0.5)
    assert losses[-1] < losses[0] - 0.3


def test_a_text_to_train_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents parted by blank lines; a long one is cut."""
    text = tmp_path / "text.txt"
    text.write_text("one lamp\nand two\n\n   \n\n" + "three lamps " * 300 + "\n\n\n")
    drawn: list[list[int]] = []
    train = tool.train

    def watched(model: Any, documents: Iterator[list[int]], settings: Settings) -> list[float]:
        drawn.extend(next(documents) for _ in range(10))
        return train(model, documents, settings)

    monkeypatch.setattr(tool, "train", watched)
    losses: list[float] = []
    make_base(tmp_path / "base", "llama", **(SMALL | {"steps": 3, "text": text, "losses": losses}))
    assert losses[-1] < losses[0]
    assert max(map(len, drawn)) == tool.LONGEST
    assert min(map(len, drawn)) > 1
    assert build_tokenizer(FIELDS).encode("one lamp\nand two").ids in drawn


def test_longrope(tmp_path: Path) -> None:
    folder = make_base(tmp_path / "base", "phi3", rope="longrope", **SMALL)
    config = AutoConfig.from_pretrained(folder)
    factors = config.rope_parameters
    assert factors["rope_type"] == "longrope"
    assert len(factors["long_factor"]) == len(factors["short_factor"]) == 16
    assert config.max_position_embeddings == 2 * config.original_max_position_embeddings
    require_exportable(config)


def test_a_large_shape_is_written_layer_by_layer(tmp_path: Path) -> None:
    """Shards that transformers loads in bfloat16; the same seed gives the same bytes."""
    folder = make_large(tmp_path / "a", width=192, layers=2, extra_rows=3)
    checked = check_folder(folder)
    assert len(checked.weights) == 3
    load_tokenizer(checked, TOKENS)
    model = load_model(checked, CPU, torch.bfloat16, load_in_4bit=False)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2 * sum(one.numel() for one in model.parameters())
    assert model.config.vocab_size == TOKENS + 3
    assert not model.config.tie_word_embeddings
    assert len(model.config.rope_parameters["long_factor"]) == 192 // 32 // 2
    assert torch.isfinite(model(torch.arange(20)[None]).logits).all()
    assert 0.015 < model.model.layers[1].mlp.down_proj.weight.float().std() < 0.025
    assert digests(folder) == digests(make_large(tmp_path / "b", width=192, layers=2, extra_rows=3))


def test_the_real_shape_is_that_of_phi_3_5_mini() -> None:
    config = tool.phi_config(FIELDS)
    sizes = (config.hidden_size, config.intermediate_size, config.num_hidden_layers)
    assert sizes == (3072, 8192, 32)
    assert (config.num_attention_heads, config.num_key_value_heads) == (32, 32)
    lengths = [len(config.rope_parameters[f"{one}_factor"]) for one in ("long", "short")]
    assert lengths == [48, 48]
    contexts = (config.max_position_embeddings, config.original_max_position_embeddings)
    assert contexts == (131072, 4096)
    require_exportable(config)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    """Sizes, a text without text, a teacher that is not there or has no text of its own."""
    empty, other, folder = tmp_path / "text.txt", tmp_path / "other.gguf", tmp_path / "base"
    empty.write_text("\n\n \n")
    write_teacher(other, Shape(64, 1, 64, 1, vocab_size=300), "f16", 0)
    own = "only the example teacher has text of its own; give --text FILE"
    cases: list[tuple[dict[str, Any], str]] = [
        ({"width": 70}, "width 70 cannot be divided into heads of 32; choose a multiple of 32"),
        ({"layers": 0}, "0 layers are not at least 1"),
        ({"rope": "longrope"}, "longrope is phi3's, not llama's"),
        ({"extra_rows": -1}, "-1 extra rows are fewer than none"),
        ({"steps": 1, "text": empty}, "has no text to train on"),
        ({"steps": 1, "teacher": other}, own),
    ]
    for changes, words in cases:
        with pytest.raises(ValueError, match=words):
            make_base(folder, "llama", **(SMALL | changes))
            pytest.fail(f"{changes} are taken")
    with pytest.raises(TeacherFileError, match="does not exist"):
        make_base(folder, "llama", teacher=tmp_path / "none.gguf", **SMALL)
    assert not folder.exists()


def test_the_command_line(tmp_path: Path) -> None:
    app = Typer()
    app.command()(tool.main)
    runner = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"})

    def run(*arguments: str) -> tuple[int, str]:
        result = runner.invoke(app, list(arguments))
        return result.exit_code, " ".join(result.output.replace("│", " ").split())

    small = ["--width", "64", "--layers", "1", "--steps", "1"]
    code, said = run(str(tmp_path / "a"), "--kind", "qwen3", *small)
    assert code == 0 and "nats per token" in said
    check_folder(tmp_path / "a")
    code, said = run(str(tmp_path / "b"), "--shape", "phi3.5", "--width", "192", "--layers", "1")
    assert code == 0
    check_folder(tmp_path / "b")
    assert run(str(tmp_path / "c"), "--shape", "phi3.5", "--steps", "1")[0] == 2
    code, said = run(str(tmp_path / "c"))
    assert code == 2 and "give one of --kind and --shape" in said
    code, said = run(str(tmp_path / "c"), "--kind", "llama", "--width", "70")
    assert code == 2 and "width 70 cannot be divided" in said
