"""Settings: unknown keys refused, files and flags combined, messages that name the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from distill.config.loading import load_config
from distill.config.schema import RunConfig
from distill.config.units import parse_quants
from distill.errors import UserError
from students.model.build import student_config
from students.model.shape import StudentSize, default_size, parse_size


def test_defaults_are_those_of_the_documented_formula() -> None:
    """T 3, α 0.7, β 0.3, λ_so8t 0.5 and 64 stored tokens, as the README and the design say."""
    config = RunConfig()
    loss = config.loss
    assert (loss.temperature, loss.alpha, loss.beta, loss.lambda_so8t) == (3.0, 0.7, 0.3, 0.5)
    assert (loss.final_temperature, loss.divergence, loss.gamma) == (None, "forward_kl", 0.1)
    assert config.student.tie_embeddings and config.export.quant == "q8_0"


def test_presets_are_where_settings_start_from(tmp_path: Path) -> None:
    """Recommended unless said otherwise; whatever a file, a flag or --set says wins."""
    loss = load_config(None, {}, []).loss
    assert (loss.temperature, loss.alpha, loss.beta) == (1.0, 1.0, 0.0)
    assert load_config(None, {}, [], "formula") == RunConfig()
    assert load_config(None, {}, ["loss.alpha=0.5"]).loss.temperature == 1.0
    assert load_config(None, {}, ["loss.temperature=2"]).loss.temperature == 2.0
    assert load_config(None, {}, ["loss.beta=0.3"]).loss.beta == 0.3
    path = tmp_path / "a.yaml"
    path.write_text("loss: {temperature: 4}")
    assert load_config(path, {}, []).loss.temperature == 4.0
    path.write_text("loss:")
    with pytest.raises(UserError, match="loss = None"):
        load_config(path, {}, [])
    with pytest.raises(UserError, match="'best' does not exist; choose recommended or formula"):
        load_config(None, {}, [], "best")


def test_file_then_flags_then_set(tmp_path: Path) -> None:
    """Both formats are read; a flag wins over the file and --set over both."""
    texts = {"a.yaml": "train: {epochs: 2}\n", "a.json": '{"train": {"epochs": 2}}'}
    for name, text in texts.items():
        path = tmp_path / name
        path.write_text(text)
        for flag, settings, epochs in (
            ({}, [], 2),
            ({"train.epochs": None}, [], 2),
            ({"train.epochs": 3}, [], 3),
            ({"train.epochs": 3}, ["train.epochs=4"], 4),
        ):
            assert load_config(path, flag, settings).train.epochs == epochs, (name, flag, settings)


def test_wrong_settings_are_refused_by_name() -> None:
    """Every refusal names the key, its value or what is allowed; two mistakes are named at once."""
    for setting, *words in (
        ("train.epoch=3", "train.epoch", "epochs"),
        ("nonsense=1", "nonsense", "teacher"),
        ("loss.temperature=0.5", "loss.temperature", "0.5", "greater than or equal to 1"),
        ("loss.alpha=.nan", "loss.alpha"),
        ("train.epochs=0", "train.epochs", "0"),
        ("student.size=60x2", "60", "divisible by 8", "56x2", "64x2"),
        ("student.size=big", "big", "WIDTHxLAYERS"),
        ("export.quant=q9", "export.quant", "q9", "q8_0"),
        ("train", "section.key=value"),
        ("seed.x=1", "seed"),
        ("train.epochs=0 data.what=1", "train.epochs", "data.what"),
    ):
        with pytest.raises(UserError) as caught:
            load_config(None, {"seed": 1}, setting.split())
            pytest.fail(f"{setting} is accepted")
        assert [word for word in words if word not in str(caught.value)] == [], setting


def test_broken_config_files_are_refused(tmp_path: Path) -> None:
    """Not a mapping, not YAML, or not there: the file is named."""
    path = tmp_path / "c.yaml"
    for text in ("[1, 2]", "a: [", "\tx", None):
        path.unlink(missing_ok=True)
        if text is not None:
            path.write_text(text)
        with pytest.raises(UserError, match=r"c\.yaml"):
            load_config(path, {}, [])
            pytest.fail(f"{text!r} is accepted")


def test_config_survives_its_own_json(tmp_path: Path) -> None:
    """A saved config.json is a valid --config that gives the same run."""
    config = load_config(None, {"student.size": "64x3"}, ["loss.pet=[0, 0.1, 0.2]"])
    path = tmp_path / "config.json"
    path.write_text(config.model_dump_json())
    assert load_config(path, {}, []) == config


def test_a_token_is_written_nowhere() -> None:
    """Not with the settings, not where they are refused; digits alone are a token too."""
    config = load_config(None, {"teacher.path": "http://a"}, ["teacher.token=1234567"])
    assert config.teacher.token == "1234567"
    assert "1234567" not in f"{config.model_dump()} {config.model_dump_json()} {config!r}"
    for setting in ("teacher.token=[1234567]", "teacher.main_gpu=0"):
        given = ["teacher.token=1234567", "teacher.tensor_split=[1]", setting]
        with pytest.raises(UserError) as caught:
            load_config(None, {}, given)
        assert "1234567" not in str(caught.value)


def test_sizes() -> None:
    """Sizes read back as written; heads, feed-forward and default size follow the rules."""
    assert parse_size("512x4") == StudentSize(512, 4) and str(parse_size("512X4")) == "512x4"
    config = student_config(parse_size("512x4"), vocab_size=32064, context_length=2048)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (8, 4, 64)
    assert config.intermediate_size % 256 == 0
    for width in range(8, 1024, 8):
        shape = student_config(StudentSize(width, 1), vocab_size=8, context_length=8)
        assert shape.head_dim * shape.num_attention_heads == width and shape.head_dim % 2 == 0
    assert default_size(3072, 32) == StudentSize(1536, 16)
    assert default_size(16, 1) == StudentSize(8, 1)
    for text in ("512", "512x", "x4", "0x4", "512x0", "-8x2", "99999999x2", "512x4x2", ""):
        with pytest.raises(ValueError, match="student size"):
            parse_size(text)
            pytest.fail(f"{text!r} is accepted")


def test_quant_names() -> None:
    """File types are checked by name; several have commas between them."""
    assert parse_quants("f16") == ("f16",) and parse_quants("q4_k_m, F32,") == ("q4_k_m", "f32")
    assert parse_quants("q8_0,all")[:2] == ("q8_0", "f32") and len(parse_quants("q8_0,all")) == 9
    rows = parse_quants("Q4_K_M:output=q8_0:embedding=Q6_K,q8_0:embedding=q4_0")
    assert rows == ("q4_k_m:embedding=q6_k:output=q8_0", "q8_0:embedding=q4_0")
    with pytest.raises(UserError, match="'q2_k' is not a file type"):
        parse_quants("f16,q2_k")
    for wrong in ("embedding", "embedding=q2_k", "ffn=q8_0", "embedding=f16:embedding=f16", ""):
        with pytest.raises(UserError, match="is not the type of token rows; write embedding=TYPE"):
            parse_quants(f"q4_k_m:{wrong}")
            pytest.fail(f"{wrong!r} is accepted")
    tied = ["export.quant=q8_0:output=q6_k"]
    with pytest.raises(UserError, match=r"student\.tie_embeddings"):
        load_config(None, {}, tied)
    load_config(None, {}, [*tied, "student.tie_embeddings=false"])
    with pytest.raises(UserError, match="names no file type"):
        parse_quants(" ,")


def test_variables_of_the_chat_template() -> None:
    """Any JSON value by name, a date as its text; what the conversation gives is refused."""
    key = "teacher.template_variables"
    settings = [f"{key}.enable_thinking=false", f"{key}.date_string=2024-07-26"]
    found = load_config(None, {}, [*settings, f"{key}.tools=[{{name: f, n: null}}]"])
    values = {"enable_thinking": False, "date_string": "2024-07-26"}
    values |= {"tools": [{"name": "f", "n": None}]}
    assert found.teacher.template_variables == values
    for name in ("messages", "eos_token", "a-b", "ä", "x %}"):
        with pytest.raises(UserError, match="no variable that can be set"):
            load_config(None, {key: {name: 1}}, [])
    for name in ("tools", "documents"):
        for value in ("text", "{}", "[1]", "5", "[{}, [a]]"):
            with pytest.raises(UserError, match=f"{name} = .* is no list of objects"):
                load_config(None, {}, [f"{key}.{name}={value}"])
                pytest.fail(f"{name}={value} is accepted")
        for kept in ("null", "[]", "[{a: 1}]"):
            load_config(None, {}, [f"{key}.{name}={kept}"])
