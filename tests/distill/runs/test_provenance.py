"""Where an exported student says that it comes from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from gguf import GGUFValueType

from distill.capture.capture import keep_teacher_record, text_of
from distill.config.loading import load_config
from distill.errors import UserError
from distill.runs.folder import RunFolder
from distill.runs.provenance import lineage_of, read_lineage
from distill.runtime.progress import Console
from students.gguf.provenance import Lineage
from teachers.gguf.file import Field
from teachers.llama_cpp.teacher import GGUFTeacher
from teachers.store.store import SoftTargetStore
from teachers.store.teacher_record import TeacherRecord, make_teacher_record
from tests.support.children.capture_child import Source
from tests.support.stores import filled

ABOUT = {
    "license": "apache-2.0",
    "license.link": "https://example.org/licence",
    "organization": "somebody",
    "repo_url": "https://example.org/model",
    "languages": "en,ja",
    "text": "prompts.jsonl",
}


@pytest.fixture(scope="module")
def store(tiny_teacher: GGUFTeacher, tmp_path_factory: pytest.TempPathFactory) -> SoftTargetStore:
    return filled(tmp_path_factory.mktemp("lineage") / "store", tiny_teacher, Source())[0]


@pytest.fixture(scope="module")
def kept(tiny_teacher: GGUFTeacher, store: SoftTargetStore) -> TeacherRecord:
    made = keep_teacher_record(tiny_teacher, tiny_teacher.file.path, store, Console())
    return replace(made, about=ABOUT)


def test_a_new_student_has_its_teachers_lineage(
    kept: TeacherRecord, store: SoftTargetStore
) -> None:
    """Licence, addresses and languages of the teacher, unless it has a base; the text by name."""
    found = lineage_of(kept, store, None)
    assert found.licence == {"": "apache-2.0", "link": "https://example.org/licence"}
    assert [one.name for one in found.models] == ["tiny"] and found.languages == ("en", "ja")
    details = found.models[0].details
    for name in ("organization", "repo_url"):
        assert details[name] == ABOUT[name]
    assert kept.info.sha256 in details["description"]
    assert found.datasets[0].name == "prompts.jsonl"
    assert store.manifest.key in found.datasets[0].details["description"]
    # The weights of a base are the base's: it stands first, and nothing is said of the licence.
    found = lineage_of(kept, store, "my-base")
    assert [one.name for one in found.models] == ["my-base", "tiny"] and not found.licence
    # A store of before has no name for its text: its key stands in.
    found = lineage_of(replace(kept, about={}), store, None)
    assert found.datasets[0].name == f"soft targets {store.manifest.key[:12]}"
    assert not found.licence and not found.languages


def test_what_a_file_says_of_itself_is_kept_as_plain_text(tiny_teacher: GGUFTeacher) -> None:
    """One line each, of bounded length, without odd bytes; other types are left out."""
    text = GGUFValueType.STRING
    said = {
        "general.license": Field("mit\n\nor not", text),
        "general.author": Field("x" * 5000 + "\udcff", text),
        "general.url": Field(12, GGUFValueType.UINT32),
        "general.languages": Field(["de", "fr"], GGUFValueType.ARRAY, text),
    }
    file = replace(tiny_teacher.file, fields=tiny_teacher.file.fields | said)
    about = make_teacher_record(tiny_teacher, file, [], "some text").about
    assert about["license"] == "mit or not" and len(about["author"]) == 500
    assert about["languages"] == "de,fr" and about["text"] == "some text" and "url" not in about


def test_the_text_is_named_without_its_folders(tiny_teacher: GGUFTeacher, tmp_path: Path) -> None:
    """They may be private."""
    config = load_config(None, {"data.path": str(tmp_path / "secret" / "prompts.jsonl")}, [])
    assert text_of(config, tiny_teacher.info) == "prompts.jsonl"
    assert text_of(load_config(None, {}, []), tiny_teacher.info) == "text written by tiny"


def test_a_damaged_lineage_is_named(tmp_path: Path) -> None:
    """One line; none at all is a student of before."""
    folder = RunFolder(tmp_path)
    assert read_lineage(folder) == Lineage()
    folder.student.mkdir()
    damages = {"licence": {"other": "x"}, "models": [{"name": "x", "colour": "red"}]}
    damages |= {"languages": ["\ud800"]}
    contents = [json.dumps(Lineage().to_json() | {key: one}) for key, one in damages.items()]
    for content in ("[", "[]", "{}", *contents):
        (folder.student / "lineage.json").write_text(content)
        with pytest.raises(UserError, match=r"lineage\.json is damaged") as caught:
            read_lineage(folder)
        assert "\n" not in str(caught.value), content
