"""Whose tokenizer a merged model gets, and how an adapter's own is reported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import flora_core as flora
from flora_core.cli.main import main
from tests.support.checkpoints import CONFIG, VOCAB, files, save_adapters, save_checkpoint, weights


def save_tokenizer(folder: Path, tokens: int, template: str = "BASE", eos: str = "t1") -> None:
    """Write the files of a fast tokenizer of some tokens, the last of them an added one."""
    vocab = {f"t{number}": number for number in range(tokens - 1)}
    added = [{"id": tokens - 1, "content": f"t{tokens - 1}"}]
    table = {"version": "1.0", "model": {"type": "BPE", "vocab": vocab, "merges": []}, "added_tokens": added}
    (folder / "tokenizer.json").write_text(json.dumps(table))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": eos}}))
    (folder / "chat_template.jinja").write_text(template)


@pytest.fixture
def case(tmp_path):
    """A base of 64 embeddings with a tokenizer of 60 tokens, and three adapters."""
    base = save_checkpoint(tmp_path / "base", weights(layers=1), config={**CONFIG, "vocab_size": VOCAB})
    save_tokenizer(base, 60)
    return base, [Path(path) for path in save_adapters(tmp_path, layers=1)]


def test_an_adapter_s_own_tokenizer_is_reported_and_the_base_s_is_kept(case, tmp_path):
    base, paths = case
    save_tokenizer(paths[0], 62, "OTHER", eos="t61")
    save_tokenizer(paths[1], 60)
    report = flora.merge_into_checkpoint(base, dict.fromkeys(paths, 1), tmp_path / "out", verify=True)
    (note,) = report.notes
    assert f"adapter {paths[0]} has a tokenizer of its own: another chat template; 2 tokens more ('t60', 't61')" in note
    assert "eos_token 't61' where the base has 't1'" in note
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    quiet = flora.merge_into_checkpoint(base, dict.fromkeys(paths, 1), tmp_path / "base-own", tokenizer="base")
    assert quiet.notes == ()
    assert files(tmp_path / "base-own").keys() == files(tmp_path / "out").keys()


def test_the_adapter_s_tokenizer_replaces_all_of_the_base_s(case, tmp_path, capsys):
    base, paths = case
    (base / "vocab.json").write_text("{}")
    (base / "generation_config.json").write_text("{}")
    save_tokenizer(paths[1], VOCAB, "OTHER")
    words = ["aggregate", "--base", str(base), "--adapter", str(paths[0]), "--adapter", str(paths[1]), "--verify"]
    assert main([*words, "--out", str(tmp_path / "out"), "--tokenizer", "adapter"]) == 0
    out = tmp_path / "out"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (paths[1] / name).read_bytes()
    assert not (out / "vocab.json").exists()
    assert (out / "generation_config.json").exists()
    # The other choice is another result.
    assert main([*words, "--out", str(out)]) == 2
    assert "merge of other inputs" in capsys.readouterr().err


def test_one_tokenizer_of_several_adapters_may_be_saved_by_two_versions(case, tmp_path):
    base, paths = case
    for path in paths[:2]:
        save_tokenizer(path, 62, "OTHER")
    table = json.loads((paths[0] / "tokenizer.json").read_text())
    (paths[0] / "tokenizer.json").write_text(json.dumps(table, indent=4))
    flora.merge_into_checkpoint(base, dict.fromkeys(paths, 1), tmp_path / "out", tokenizer="adapter")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (paths[0] / "tokenizer.json").read_bytes()


def test_tokenizers_that_cannot_be_taken_are_refused_before_anything_is_written(case, tmp_path):
    base, paths = case

    def refused(words: str, choice: str = "adapter") -> None:
        before = files(tmp_path)
        with pytest.raises(ValueError, match=words):
            flora.merge_into_checkpoint(base, dict.fromkeys(paths, 1), tmp_path / "out", tokenizer=choice)
        assert files(tmp_path) == before

    refused("no adapter's folder holds a tokenizer; take the base's")
    refused("tokenizer must be one of base, adapter, got 'adaptor'", "adaptor")
    save_tokenizer(paths[0], 62)
    save_tokenizer(paths[2], 61)
    refused(r"the tokenizers of adapters .*client-0, .*client-2 differ")
    shutil.copy(paths[0] / "tokenizer.json", paths[2] / "tokenizer.json")
    (paths[2] / "chat_template.jinja").write_text("OTHER")
    refused(r"the tokenizers of adapters .*client-0, .*client-2 differ")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (paths[2] / name).unlink()
    save_tokenizer(paths[0], VOCAB + 1)
    refused(rf"has ids up to {VOCAB}, and base .* has embeddings for {VOCAB} tokens; without one: 't{VOCAB}'; resize")
    (paths[0] / "tokenizer.json").unlink()
    refused("holds no tokenizer.json to count tokens of")


def test_a_chat_template_alone_is_taken_beside_the_base_s_tokenizer(case, tmp_path):
    base, paths = case
    (paths[1] / "chat_template.jinja").write_text("OTHER")
    (paths[1] / "additional_chat_templates").mkdir()
    (paths[1] / "additional_chat_templates" / "tools.jinja").write_text("TOOLS")
    report = flora.merge_into_checkpoint(base, dict.fromkeys(paths, 1), tmp_path / "kept")
    (note,) = report.notes
    assert f"adapter {paths[1]} has a chat template of its own: another chat template. The base's is kept" in note
    flora.merge_into_checkpoint(base, dict.fromkeys(paths, 1), tmp_path / "out", tokenizer="adapter", verify=True)
    out = files(tmp_path / "out")
    assert out["chat_template.jinja"] == b"OTHER"
    assert out["additional_chat_templates/tools.jinja"] == b"TOOLS"
    assert out["tokenizer.json"] == (base / "tokenizer.json").read_bytes()
    assert out.keys() - files(tmp_path / "kept").keys() == {"additional_chat_templates/tools.jinja"}


def test_a_tokenizer_without_the_base_s_template_is_reported(case, tmp_path):
    base, paths = case
    save_tokenizer(paths[0], 60)
    (paths[0] / "chat_template.jinja").unlink()
    report = flora.merge_into_checkpoint(base, dict.fromkeys(paths, 1), tmp_path / "out")
    assert "has a tokenizer of its own: no chat template where the base has one. The" in report.notes[0]


def test_a_tokenizer_and_one_adapter_as_result_exclude_each_other(case, tmp_path, capsys):
    base, paths = case
    words = ["aggregate", "--base", str(base), "--adapter", str(paths[0]), "--out", str(tmp_path / "out")]
    assert main([*words, "--as-adapter", "--tokenizer", "adapter"]) == 2
    assert "--as-adapter writes none; leave one out" in " ".join(capsys.readouterr().err.split())
