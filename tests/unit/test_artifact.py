"""Saving and verifying: round trip, every kind of damage refused by name, replacing, moving."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tests.toy_artifact import kernels, manifest, plan, save
from tilewright.runtime import (
    ArtifactError,
    ArtifactVersionError,
    DamagedArtifactError,
    TruncatedArtifactError,
    UnsupportedHostError,
    load,
)
from tilewright.runtime.artifact import ArtifactWriter, Manifest, read_manifest, verify_files

FILES = ["manifest.json", "kernels.so", "weights.safetensors", "program.c", "tokenizer/config.json"]


def scale(path, **options):
    with load(path, **options).session(threads=1) as session:
        return float(session("scale", x=np.ones((1, 8), np.float32))["y"][0, 0])


def litter(folder):
    return [name for name in os.listdir(folder) if name.startswith(".")]


def test_round_trip(tmp_path):
    path = save(tmp_path / "toy")
    read = read_manifest(path)
    assert sorted(read.files) == sorted(name for name in FILES if name != "manifest.json")
    assert dataclasses.replace(read, files={}) == manifest()
    assert Manifest.from_text(read.to_text()) == read
    verify_files(path)
    assert scale(path) == 2.0
    assert litter(tmp_path) == []


@pytest.mark.parametrize("where", [0.0, 0.5, 0.999])
@pytest.mark.parametrize("name", FILES)
def test_flipped_byte_is_refused(tmp_path, name, where):
    path = save(tmp_path / "toy")
    data = bytearray((path / name).read_bytes())
    data[int(where * len(data))] ^= 0x10
    (path / name).write_bytes(data)
    with pytest.raises(ArtifactError, match=name):
        load(path)


def test_every_flipped_byte_of_the_manifest_is_refused_or_harmless(tmp_path):
    text = (save(tmp_path / "toy") / "manifest.json").read_bytes()
    good = Manifest.from_text(text)
    for at in range(0, len(text), 3):
        damaged = bytearray(text)
        damaged[at] ^= 1 << at % 8
        try:
            assert Manifest.from_text(bytes(damaged)) == good  # white space only
        except ArtifactError:
            continue


@pytest.mark.parametrize("keep", [0, 1, -1])
@pytest.mark.parametrize("name", FILES)
def test_truncated_file_is_refused(tmp_path, name, keep):
    path = save(tmp_path / "toy")
    data = (path / name).read_bytes()
    (path / name).write_bytes(data[:keep] if keep >= 0 else data[:-2])
    kind = DamagedArtifactError if name == "manifest.json" else TruncatedArtifactError
    with pytest.raises(kind, match=name):
        load(path, verify=False)


@pytest.mark.parametrize("name", FILES)
def test_missing_file_is_refused(tmp_path, name):
    path = save(tmp_path / "toy")
    (path / name).unlink()
    with pytest.raises(DamagedArtifactError, match=name):
        load(path)


def test_verify_false_skips_the_checksums_only(tmp_path):
    path = save(tmp_path / "toy")
    text = (path / "program.c").read_text()
    (path / "program.c").write_text(text.replace("FACTOR", "FACT0R"))
    assert scale(path, verify=False) == 2.0
    with pytest.raises(DamagedArtifactError, match=r"program\.c.*checksum"):
        load(path)


@pytest.mark.parametrize(("version", "remedy"), [(1, "compile the model again"), (3, "newer tilewright"),
                                                 (10_000, "newer tilewright")])  # fmt: skip
def test_other_version_is_refused(tmp_path, version, remedy):
    path = save(tmp_path / "toy")
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.replace('"version": 2', f'"version": {version}'))
    with pytest.raises(ArtifactVersionError, match=f"version {version}.*{remedy}"):
        load(path)


def test_unsupported_host_is_refused_before_files_are_read(tmp_path):
    path = save(tmp_path / "toy", features=("avx512zz", "sse9"))
    (path / "kernels.so").unlink()
    with pytest.raises(UnsupportedHostError, match="avx512zz, sse9") as caught:
        load(path)
    assert caught.value.missing == ("avx512zz", "sse9")


def test_kernels_of_another_compilation_are_refused(tmp_path):
    """The manifest asks for an entry that the library lacks: it is named, not called."""
    path = tmp_path / "toy"
    save(path)
    entries = manifest().entries
    with ArtifactWriter(tmp_path / "other") as writer:
        writer.copy("kernels.so", path / "kernels.so")
        writer.copy("weights.safetensors", path / "weights.safetensors")
        writer.commit(dataclasses.replace(manifest(), entries={"forward": entries["scale"]}))
    with pytest.raises(DamagedArtifactError, match="tw_forward"):
        load(tmp_path / "other")


def test_not_an_artifact(tmp_path):
    with pytest.raises(ArtifactError, match="not a folder"):
        load(tmp_path / "absent")
    with pytest.raises(DamagedArtifactError, match=r"manifest\.json"):
        load(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtifactError, match="not a folder"):
        load(tmp_path / "file")


def test_moved_copied_and_read_only_folder_runs(tmp_path):
    path = save(tmp_path / "toy")
    moved = shutil.move(path, tmp_path / "moved")
    copy = shutil.copytree(moved, tmp_path / "näme with spaces" / "copy")
    for file in copy.rglob("*"):
        file.chmod(0o555 if file.is_dir() else 0o444)
    assert scale(moved) == scale(copy) == 2.0


def test_program_survives_its_folder(tmp_path):
    path = save(tmp_path / "toy")
    program = load(path)
    shutil.rmtree(path)
    with program.session(threads=1) as session:
        assert session("scale", x=np.ones((1, 8), np.float32))["y"][0, 1] == 2.25


def test_replaced_artifact_is_loaded_anew(tmp_path):
    """The dynamic linker caches libraries by name: each load must still get the file that is there now."""
    path = tmp_path / "toy"
    programs = []
    for factor in (2, 3, 5, 2, 3):
        save(path, factor)
        assert scale(path) == factor
        programs.append((factor, load(path), load(path)))
    del programs[::2]
    assert scale(path) == 3
    for factor, *loaded in programs:
        for program in loaded:
            with program.session(threads=1) as session:
                assert session("scale", x=np.ones((1, 8), np.float32))["y"][0, 0] == factor


def test_many_loads_leak_neither_descriptors_nor_libraries(tmp_path):
    path = save(tmp_path / "toy")
    scale(path)
    before = len(os.listdir("/proc/self/fd")), _mapped(path)
    for _ in range(20):
        scale(path)
    assert (len(os.listdir("/proc/self/fd")), _mapped(path)) == before
    assert before[1] == 0


def _mapped(path):
    with open("/proc/self/maps") as maps:
        return sum(str(path) in line for line in maps)


def test_loading_while_saving(tmp_path):
    """Every load during saves gets one whole artifact."""
    path = tmp_path / "toy"
    save(path, 2)
    stop = threading.Event()

    def read():
        seen = set()
        while not stop.is_set():
            seen.add(scale(path))
        return seen

    with ThreadPoolExecutor(1) as executor:
        seen = executor.submit(read)
        for turn in range(40):
            save(path, 2 + turn % 2)
        stop.set()
    assert seen.result() <= {2.0, 3.0}


def test_save_refuses_to_replace_what_is_no_artifact(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("x")
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "manifest.json").write_text('{"name": "an app"}')
    for name in ("precious", "web", "precious/thesis.txt"):
        with pytest.raises(ArtifactError, match="is not an artifact, so it is not replaced"):
            ArtifactWriter(tmp_path / name)
    assert (tmp_path / "precious" / "thesis.txt").read_text() == "x"


def test_save_into_empty_folder_new_parents_and_over_damage(tmp_path):
    (tmp_path / "empty").mkdir()
    assert scale(save(tmp_path / "empty")) == 2.0
    path = save(tmp_path / "a" / "b" / "toy")
    (path / "manifest.json").write_text("{")
    assert scale(save(path, 3)) == 3.0


def test_save_through_a_link_keeps_the_link(tmp_path):
    save(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    save(tmp_path / "link", 3)
    assert (tmp_path / "link").is_symlink()
    assert scale(tmp_path / "real") == 3.0


def interrupted(path):
    with ArtifactWriter(path) as writer:
        writer.add("kernels.so", b"half")
        raise RuntimeError("out of luck")


def without_weights(path):
    with ArtifactWriter(path) as writer:
        writer.add("kernels.so", b"")
        with writer.weights(plan()):
            pass


def without_a_file(path):
    with ArtifactWriter(path) as writer:
        writer.add("kernels.so", b"")
        writer.commit(manifest())


@pytest.mark.parametrize(
    ("fail", "error", "message"),
    [
        (interrupted, RuntimeError, "out of luck"),
        (without_weights, ValueError, "2 weights were not written, the first is 'odd'"),
        (without_a_file, ArtifactError, r"\['weights.safetensors'\] are not listed"),
    ],
)
def test_failed_save_leaves_the_old_one_and_no_litter(tmp_path, fail, error, message):
    path = save(tmp_path / "toy")
    with pytest.raises(error, match=message):
        fail(path)
    assert scale(path) == 2.0
    assert litter(tmp_path) == []


def test_file_systems_without_exchange(tmp_path, monkeypatch):
    monkeypatch.setattr("tilewright.runtime.artifact._exchange", lambda first, second: False)
    path = save(tmp_path / "toy")
    save(path, 3)
    assert scale(path) == 3.0
    assert litter(tmp_path) == []


def test_a_live_writer_is_left_alone(tmp_path):
    path = tmp_path / "toy"
    with ArtifactWriter(path) as slow:
        slow.add("note", "still here")
        save(path)
        assert (slow.folder / "note").read_text() == "still here"
    assert litter(tmp_path) == []


def test_similar_names_are_left_alone(tmp_path):
    names = [".toy.tmp-note", ".toys.tmp-1-0123abcd", ".toy.tmp-1-0123abcd.txt"]
    for name in names:
        (tmp_path / name).mkdir()
    (tmp_path / ".toy.tmp-1-0123abcd").mkdir()
    save(tmp_path / "toy")
    assert sorted(litter(tmp_path)) == sorted(names)


def test_runtime_needs_only_its_own_dependencies():
    """In a fresh interpreter the runtime brings in numpy, ml_dtypes and xxhash, and nothing of the compiler."""
    code = (
        "import sys, tilewright.runtime as r, tilewright.runtime.artifact;"
        "own = {n.split('.')[1] for n in sys.modules if n.startswith('tilewright.')};"
        "heavy = {'torch', 'tvm', 'sympy', 'llvmlite', 'transformers', 'tokenizers', 'safetensors'} & set(sys.modules);"
        "print(sorted(own), sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["['runtime']", "[]"]


def test_a_copied_file_may_be_written_again(tmp_path):
    with ArtifactWriter(tmp_path / "new") as writer:
        first = save(tmp_path / "toy")
        for name in ("kernels.so", "weights.safetensors", "program.c"):
            writer.copy(name, first / name)
        writer.add("program.c", "changed")
        writer.path("kernels.so").write_bytes(kernels(3))
        writer.commit(manifest())
    assert (tmp_path / "new" / "program.c").read_text() == "changed"
    assert load(tmp_path / "new").session()("scale", x=np.ones((1, 8), np.float32))["y"][0, 0] == 3


def test_large_files_are_copied_whole(tmp_path):
    """Larger than a block, and no multiple of it."""
    data = np.random.default_rng(0).integers(0, 256, (8 << 20) + 4097, np.uint8).tobytes()
    (tmp_path / "large").write_bytes(data)
    with ArtifactWriter(tmp_path / "new") as writer:
        first = save(tmp_path / "toy")
        for name in ("kernels.so", "weights.safetensors"):
            writer.copy(name, first / name)
        writer.copy("large", tmp_path / "large")
        writer.copy("empty", os.devnull)
        writer.commit(manifest())
    assert (tmp_path / "new" / "large").read_bytes() == data
    load(tmp_path / "new")
