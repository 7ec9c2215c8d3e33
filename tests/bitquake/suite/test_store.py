"""Output folders, on a disk and behind fsspec: what counts as there, and what is refused."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest

from bitquake.suite.run import _clear_work
from bitquake.suite.store import Damage, Store, StoreError, disk_takes, file_hash, is_full_disk, open_store
from bitquake.suite_plan import PLAN_VERSION, CellManifest, SuitePlan

HASH = "0123456789abcdef0123456789abcdef"


@pytest.fixture(params=["disk", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    if request.param == "disk":
        yield open_store(tmp_path / "out")
        return
    url = f"memory://bitquake-{uuid.uuid4().hex}/out"
    yield open_store(url)
    fsspec.filesystem("memory").rm(url.removeprefix("memory:/").rpartition("/")[0], recursive=True)


def _manifest(folder: Path, version: int = PLAN_VERSION) -> CellManifest:
    files = {
        path.relative_to(folder).as_posix(): hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }
    told = {"bitquake": "0", "hash": HASH, "name": "m/q", "samples": {"t": 2}, "seconds": 1, "load_seconds": 1}
    return CellManifest(version=version, files=files, began="2026-01-01T00:00:00+00:00", **told)


def _cell(folder: Path) -> Path:
    (folder / "runs" / "all" / "model").mkdir(parents=True)
    (folder / "runs" / "all" / "model" / "x_samples_t.jsonl").write_text("{}\n{}\n")
    (folder / "runs" / "all" / "model" / "x_results.json").write_text("{}")
    return folder


def _files(store: Store) -> dict[str, bytes]:
    """Every file, found without the store."""
    if store.local is not None:
        return {path.relative_to(store.local).as_posix(): path.read_bytes() for path in store.local.rglob("*.*")}
    memory = fsspec.filesystem("memory")
    root = store.url.removeprefix("memory:/")
    return {path.removeprefix(f"{root}/"): memory.cat_file(path) for path in memory.find(root)}


def test_a_cell_appears_with_all_its_files(store: Store, tmp_path: Path) -> None:
    assert store.cell(HASH) is None
    work = _cell(tmp_path / "work")
    wanted = {path.relative_to(work).as_posix(): path.read_bytes() for path in work.rglob("*.*")}
    manifest = _manifest(work)
    store.write_failure(HASH, {"reason": "before"})
    store.publish_cell(work, manifest)
    assert store.cell(HASH, deep=True) == manifest
    there = _files(store)
    assert {
        key.removeprefix(f"cells/{HASH}/"): data for key, data in there.items() if key.endswith(("l", "s.json"))
    } == (wanted)
    assert store.failures() == {}
    mirror = store.mirror(tmp_path / "mirror")
    assert file_hash(mirror / "cells" / HASH / "runs/all/model/x_samples_t.jsonl") in manifest.files.values()


def test_a_cell_that_another_worker_finished_first_stays(store: Store, tmp_path: Path) -> None:
    first = _cell(tmp_path / "first")
    manifest = _manifest(first)
    store.publish_cell(first, manifest)
    second = _cell(tmp_path / "second")
    store.publish_cell(second, manifest)
    assert store.cell(HASH, deep=True) == manifest


@pytest.mark.parametrize("harm", ["missing file", "no cell.json", "cut cell.json", "another cell's"])
def test_a_damaged_cell_does_not_count(store: Store, tmp_path: Path, harm: str) -> None:
    work = _cell(tmp_path / "work")
    store.publish_cell(work, _manifest(work))
    key = f"cells/{HASH}/cell.json"
    if harm == "missing file":
        store._files.delete(f"cells/{HASH}/runs/all/model/x_results.json")
    elif harm == "no cell.json":
        store._files.delete(key)
    elif harm == "cut cell.json":
        store.write(key, (store.read(key) or b"")[:40])
    else:
        store.write(key, (store.read(key) or b"").replace(HASH.encode(), HASH[::-1].encode()))
    found = store.cell(HASH)
    if harm == "no cell.json" and store.local is None:
        assert found is None  # an upload that was cut short: nothing to set aside
        return
    assert isinstance(found, Damage)
    aside = store.set_aside(HASH)
    assert store.cell(HASH) is None and HASH in aside
    assert any(key.startswith("damaged/") for key in _files(store))


def test_changed_bytes_are_noticed_on_a_disk(tmp_path: Path) -> None:
    store = open_store(tmp_path / "out")
    work = _cell(tmp_path / "work")
    store.publish_cell(work, _manifest(work))
    file = tmp_path / "out" / "cells" / HASH / "runs/all/model/x_samples_t.jsonl"
    file.write_text("{}\n{ \n")
    assert isinstance(store.cell(HASH), CellManifest)
    assert store.cell(HASH, deep=True) == Damage("runs/all/model/x_samples_t.jsonl was changed")


def test_an_upload_that_ends_early_leaves_no_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(f"memory://bitquake-{uuid.uuid4().hex}")
    work = _cell(tmp_path / "work")
    manifest = _manifest(work)
    put, written = type(store._files).put, []

    def some(files: object, path: Path, key: str) -> None:
        written.append(key)
        if len(written) == 2:
            raise OSError(errno.ECONNRESET, "connection reset")
        put(files, path, key)  # type: ignore[arg-type]

    monkeypatch.setattr(type(store._files), "put", some)
    with pytest.raises(OSError, match="connection reset"):
        store.publish_cell(work, manifest)
    assert store.cell(HASH) is None
    monkeypatch.undo()
    store.publish_cell(work, manifest)
    assert store.cell(HASH) == manifest and written[-1] != f"cells/{HASH}/cell.json"


def test_a_mirror_holds_what_the_manifest_names(tmp_path: Path) -> None:
    """Workers that died before their cell.json leave files, and so do those that are at it now."""
    store = open_store(f"memory://bitquake-{uuid.uuid4().hex}")
    work = _cell(tmp_path / "work")
    manifest = _manifest(work)
    store.write(f"cells/{HASH}/runs/all/model/0_samples_t.jsonl", b"{}\n")
    store.publish_cell(work, manifest)
    store.write(f"cells/{HASH}/runs/all/model/z_samples_t.jsonl", b"{}\n")
    store.write(f"cells/{HASH[::-1]}/runs/all/model/x_samples_t.jsonl", b"{}\n")  # no cell, by now
    mirror = store.mirror(tmp_path / "mirror")
    (cell,) = (mirror / "cells").iterdir()
    there = {path.relative_to(cell).as_posix() for path in cell.rglob("*") if path.is_file()}
    assert there == {*manifest.files, "cell.json"}
    assert {path: file_hash(cell / path) for path in manifest.files} == manifest.files


def test_a_mirror_holds_the_curves_of_the_plans_trainings(tmp_path: Path, plan: Callable[..., SuitePlan]) -> None:
    training = {"method": "qat", "bits": 3, "group_size": 64, "data": ["block_vqav2"], "steps": 5}
    model = {"name": "m", "pretrained": "bitquake/block-idefics3", "training": training}
    made = plan(models=[model])
    store = open_store(f"memory://bitquake-{uuid.uuid4().hex}")
    store.write_plan(made)
    curve = f"models/{made.cells[0].training_hash}/curve.jsonl"
    store.write(curve, b"{}\n")
    store.write(curve.replace("curve.jsonl", "model/model.safetensors"), b"large")
    mirror = store.mirror(tmp_path / "mirror")
    assert [path.relative_to(mirror).as_posix() for path in mirror.rglob("*") if path.is_file()] == [
        *("suite.json", curve),
    ]


def _trained(folder: Path, weights: bytes) -> Path:
    for name, data in {
        "result.json": b"{}",
        "curve.jsonl": b"{}\n",
        "model/a.safetensors": weights,
        "model/b.safetensors": weights,
        "state/step-5.safetensors": b"moments",
        ".lock": b"",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def test_a_finished_training_follows_and_comes_back_whole_or_not_at_all(tmp_path: Path) -> None:
    store = open_store(f"memory://bitquake-{uuid.uuid4().hex}")
    first, second = (_trained(tmp_path / name, name.encode()) for name in ("first", "second"))
    store.follow_training(HASH, first, "state")
    store.follow_training(HASH, second, "state")  # the first stays: cells have been evaluated on it
    kept = {"result.json", "curve.jsonl", "model/a.safetensors", "model/b.safetensors"}
    assert _files(store).keys() == {f"models/{HASH}/{name}" for name in (*kept, "trained.json")}

    def fetched(name: str) -> dict[str, bytes]:
        folder = tmp_path / name
        folder.mkdir()
        store.fetch_training(HASH, folder, "result.json")
        assert not list(tmp_path.glob(f".{name}-*"))
        return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    assert fetched("there") == {name: (first / name).read_bytes() for name in kept}
    store.write(f"models/{HASH}/model/b.safetensors", b"second")  # of another machine that was at it too
    assert fetched("mixed") == {}
    store.follow_training(HASH, second, "state")
    assert fetched("renewed") == {name: (second / name).read_bytes() for name in kept}
    store._files.delete(f"models/{HASH}/trained.json")
    assert fetched("cut short") == {}


def test_a_copy_from_another_disk_is_made_where_the_next_run_clears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, work = open_store(tmp_path / "out"), _cell(tmp_path / "elsewhere" / "cell")
    manifest = _manifest(work)
    rename, copies = Path.rename, []

    def across(path: Path, target: Path) -> Path:
        if path.is_relative_to(tmp_path / "elsewhere"):
            raise OSError(errno.EXDEV, "cross-device link")
        copies.append(path.relative_to(tmp_path / "out"))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", across)
    store.publish_cell(work, manifest)
    assert store.cell(HASH, deep=True) == manifest
    assert [path.parent.as_posix() for path in copies] == [".scratch/work"]
    store.publish_cell(work, manifest)  # another worker was first: the copy goes
    assert not list((tmp_path / "out" / ".scratch" / "work").iterdir())
    left = tmp_path / "out" / ".scratch" / "work" / "of a killed worker"
    left.mkdir()
    _clear_work(store, tmp_path / "elsewhere")
    assert not left.exists() and store.cell(HASH, deep=True) == manifest


def test_a_folder_of_another_version_or_suite_is_refused(
    store: Store, tmp_path: Path, plan: Callable[..., SuitePlan]
) -> None:
    made = plan()
    store.write_plan(made)
    store.check_version()
    assert store.plan() == made
    with pytest.raises(StoreError, match=r"holds suite 'tiny' \(block world\), not 'other' \(block\).*another --out"):
        store.write_plan(plan(suite="other"))
    told = json.loads(store.read("suite.json") or b"")
    store.write("suite.json", json.dumps({**told, "version": PLAN_VERSION + 1, "bitquake": "9.1"}).encode())
    with pytest.raises(StoreError, match=rf"of version {PLAN_VERSION + 1} \(Bitquake 9\.1\).*new --out"):
        store.check_version()
    store.write("suite.json", json.dumps(told).encode())
    work = _cell(tmp_path / "work")
    store.publish_cell(work, _manifest(work, version=PLAN_VERSION + 1))
    with pytest.raises(StoreError, match=rf"of version {PLAN_VERSION + 1}"):
        store.check_version()
    with pytest.raises(StoreError, match="Its results are kept"):
        store.cell(HASH)
    store.write("suite.json", b"{}")
    with pytest.raises(StoreError, match="is no plan of a suite"):
        store.plan()


def test_notes_come_back_and_go(store: Store) -> None:
    store.write_heartbeat(HASH, {"done": 3})
    store.write_failure(HASH, {"reason": "time"})
    assert store.heartbeats() == {HASH: {"done": 3}} and store.failures() == {HASH: {"reason": "time"}}
    assert store.failure(HASH) == {"reason": "time"} and store.failure(HASH[::-1]) == {}
    store.clear_heartbeat(HASH)
    store.clear_heartbeat(HASH)
    store.clear_failure(HASH)
    assert store.heartbeats() == store.failures() == {}


def test_artifacts_follow_once(tmp_path: Path) -> None:
    store = open_store(f"memory://bitquake-{uuid.uuid4().hex}")
    places = store.places(tmp_path)
    card = places.artifacts / "quant_cards" / "a.json"
    card.parent.mkdir(parents=True)
    card.write_text("1")
    (card.parent / ".half.tmp").write_text("2")
    store.follow(places)
    card.write_text("3")  # content-addressed: what is there is never written again
    store.follow(places)
    assert _files(store) == {"artifacts/quant_cards/a.json": b"1"}
    local = open_store(tmp_path / "out")
    assert local.places(tmp_path / "scratch").artifacts == tmp_path / "out" / "artifacts"


def test_paths_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="comma"):
        open_store(tmp_path / "a,b")
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="is a file"):
        open_store(tmp_path / "file")
    with pytest.raises(StoreError, match="cannot be opened"):
        open_store("nothing-like-it://bucket/x")


def test_a_full_disk_is_known_by_its_error_and_by_trying(tmp_path: Path) -> None:
    assert is_full_disk(OSError(errno.ENOSPC, "x")) and is_full_disk(OSError(errno.EFBIG, "x"))
    wrapped = RuntimeError("no")
    wrapped.__cause__ = RuntimeError(f"SafetensorError: {os.strerror(errno.ENOSPC)} (os error 28)")
    assert is_full_disk(wrapped)
    assert not is_full_disk(OSError(errno.EACCES, "x")) and not is_full_disk(None)
    full = Path("/dev/full")
    if full.exists():
        with pytest.raises(OSError) as caught, full.open("wb", buffering=0) as file:
            file.write(b"1")
        assert is_full_disk(caught.value)
    assert disk_takes(tmp_path) and not list(tmp_path.iterdir())
