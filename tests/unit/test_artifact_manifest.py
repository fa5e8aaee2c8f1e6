"""Malformed manifests: each is refused with the field's path and what was expected there."""

from __future__ import annotations

import json

import pytest
import xxhash

from tests.toy_artifact import manifest
from tilewright.runtime import ArtifactVersionError, DamagedArtifactError, ManifestError
from tilewright.runtime.artifact import DimSpec, EntrySpec, FileSpec, Manifest, TargetSpec, TensorSpec

FILE = FileSpec(1, "0" * 32)


def whole():
    """A valid manifest as plain JSON."""
    files = {"kernels.so": FILE, "weights.safetensors": FILE}
    base = manifest()
    return Manifest(base.target, base.entries, base.states, base.meta, files).json()


def sign(data):
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return json.dumps(data | {"checksum": xxhash.xxh3_128_hexdigest(text.encode())})


def test_whole_manifest_is_read():
    assert Manifest.from_text(sign(whole())).entries == manifest().entries


REMOVE = object()
BAD = [
    ("format", "zip", r"\"format\" must be"),
    ("format", REMOVE, r"\"format\" must be"),
    ("version", "1", "version: expected an integer"),
    ("version", True, "version: expected an integer.*a truth value"),
    ("version", REMOVE, "\"version\" is missing"),
    ("extra", 1, r"the fields \['extra'\] are unknown"),
    ("target", REMOVE, "'target'"),
    ("target", "cpu", "target: expected an object, got 'cpu'"),
    ("target.features", "avx2", "target.features: expected a list"),
    ("target.features", ["AVX 2"], r"target.features\[0\].*does not have the form"),
    ("target.text", None, "target.text: expected a string, got null"),
    ("entries", [], "entries: expected an object, got a list"),
    ("entries.2x", {}, "'2x' is not a valid name"),
    ("entries.scale.dims", REMOVE, r"entries.scale: the fields \['dims'\] are missing"),
    ("entries.scale.batch", REMOVE, r"entries.scale: the fields \['batch'\] are missing"),
    ("entries.scale.dims.0.min", 0, r"dims\[0\].min: expected an integer from 1"),
    ("entries.scale.dims.0.max", 0, r"dims\[0\].max: expected an integer from 1"),
    ("entries.scale.dims.0.max", 2.5, r"dims\[0\].max: expected an integer.*2.5"),
    ("entries.scale.dims.0.max", 10**30, r"dims\[0\].max: expected an integer"),
    ("entries.scale.dims.0.name", "n n", r"dims\[0\].name"),
    ("entries.scale.dims", [], r"the dims \['N'\] are used and not declared"),
    ("entries.scale.dims.1", {"name": "M", "min": 1, "max": 2}, r"no input has the dims \['M'\]"),
    ("entries.scale.dims.1", {"name": "N", "min": 1, "max": 2}, "'N' is there twice"),
    ("entries.scale.inputs.0.dtype", "float32", r"inputs\[0\].dtype: expected one of \['f64'"),
    ("entries.scale.inputs.0.dtype", ["f32"], r"inputs\[0\].dtype: expected one of"),
    ("entries.scale.inputs.0.shape", "N8", r"inputs\[0\].shape: expected a list"),
    ("entries.scale.inputs.0.shape.1", -8, r"shape\[1\]: expected an integer from 0"),
    ("entries.scale.inputs.0.shape.1", 1.5, r"shape\[1\]: expected an integer"),
    ("entries.scale.inputs.0.shape.1", True, r"shape\[1\]: expected an integer"),
    ("entries.scale.inputs.0.shape.1", None, "null in the shape of an input"),
    ("entries.scale.inputs.0.shape.1", "K", r"the dims \['K'\] are used and not declared"),
    ("entries.scale.inputs.0.low", "0", r"inputs\[0\].low: expected an integer"),
    ("entries.scale.outputs.1.name", "y", "'y' is there twice"),
    ("entries.scale.outputs.0.name", "", r"outputs\[0\].name"),
    ("entries.scale.outputs.0.unit", "m", r"the fields \['unit'\] are unknown; known: \['name'"),
    ("entries.decode.batch", "Z", r"the dims \['Z'\] are used and not declared"),
    ("states", {}, "states: expected a list"),
    ("states", [], r"entries.prefill.batch: set, but the artifact has no states"),
    ("states.0.length", 0, r"states\[0\].length: expected an integer from 1"),
    ("states.0.dtype", "fp4", r"states\[0\].dtype: expected one of"),
    ("states.0.k_shape_bytes_per_sequence", -1, r"states\[0\].k_shape_bytes_per_sequence: expected"),
    ("meta", None, "meta: expected an object, got null"),
    ("meta.model", 3, "meta.model: expected a string, got 3"),
    ("files", REMOVE, r"the fields \['files'\] are missing"),
    ("files", {}, r"the files \['kernels.so', 'weights.safetensors'\] are not listed"),
    ("files.kernels.so", REMOVE, r"the files \['kernels.so'\] are not listed"),
    ("files.kernels.so.bytes", "1", "kernels.so.bytes: expected an integer"),
    ("files.kernels.so.xxh3_128", "xyz", "kernels.so.xxh3_128"),
    ("files.kernels.so.xxh3_128", REMOVE, "missing"),
    ("files./etc/passwd", {"bytes": 1, "xxh3_128": "0" * 32}, "is not a relative path inside"),
    ("files.a/../../b", {"bytes": 1, "xxh3_128": "0" * 32}, "is not a relative path inside"),
    ("files.", {"bytes": 1, "xxh3_128": "0" * 32}, "is not a relative path inside"),
]


@pytest.mark.parametrize(("path", "value", "message"), BAD, ids=[f"{p}={v!r:.20}" for p, v, _ in BAD])
def test_bad_field_is_named(path, value, message):
    data = whole()
    put(data, path, value)
    with pytest.raises(ManifestError, match=message) as caught:
        Manifest.from_text(sign(data), "folder/manifest.json")
    assert str(caught.value).startswith("folder/manifest.json")


def put(data, path, value):
    """Sets or removes the field at ``path``; a file's name has dots of its own."""
    head, _, rest = path.partition(".")
    if head == "files" and rest.startswith(("kernels.so.", "kernels.so")) and rest != "":
        keys = ["files", "kernels.so", *filter(None, [rest.removeprefix("kernels.so").lstrip(".")])]
    elif head == "files" and "." in path:
        keys = ["files", rest]
    else:
        keys = path.split(".")
    for key in keys[:-1]:
        data = data[int(key)] if isinstance(data, list) else data[key]
    key = keys[-1]
    if isinstance(data, list):
        data[int(key) : int(key) + 1] = [value]
    elif value is REMOVE:
        del data[key]
    else:
        data[key] = value


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b"nul", b'{"a": NaN}', b'{"a": 1, "a": 2}', b"[" * 100_000])
def test_what_is_not_json_is_damaged(text):
    with pytest.raises(DamagedArtifactError, match="not readable as JSON"):
        Manifest.from_text(text, "manifest.json")


@pytest.mark.parametrize("text", [b"[]", b"3", b"null", b'"x"'])
def test_what_is_no_object_is_refused(text):
    with pytest.raises(ManifestError, match="expected an object"):
        Manifest.from_text(text, "manifest.json")


def test_edited_manifest_is_refused():
    text = sign(whole()).replace('"max": 64', '"max": 65')
    with pytest.raises(DamagedArtifactError, match="checksum"):
        Manifest.from_text(text)


def test_other_layout_of_the_same_json_is_read():
    data = json.loads(sign(whole()))
    assert Manifest.from_text(json.dumps(data, indent=8, sort_keys=True)) == Manifest.from_text(sign(whole()))


def test_newer_version_is_told_apart_even_with_unknown_fields():
    with pytest.raises(ArtifactVersionError, match=r"version 7 .* reads version 2; use a newer tilewright"):
        Manifest.from_text(json.dumps(whole() | {"version": 7, "checksum": None, "news": 1}))


def test_writing_refuses_what_reading_would():
    entry = EntrySpec((DimSpec("N", 1, 4),), (TensorSpec("x", "f32", (3,)),), (), None)
    files = {"kernels.so": FILE, "weights.safetensors": FILE}
    with pytest.raises(ManifestError, match=r"no input has the dims \['N'\]"):
        Manifest(TargetSpec("cpu"), {"f": entry}, files=files).to_text()
