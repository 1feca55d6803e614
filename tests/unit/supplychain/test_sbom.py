"""The list of what is in an image, from an image made here."""

import hashlib
import io
import json
import tarfile

import pytest
import sbom
from image_archive import read_image

OS_RELEASE = 'ID=debian\nVERSION_ID="12"\nVERSION_CODENAME=bookworm\n'
STATUS = "Package: libc6\nStatus: install ok installed\nArchitecture: amd64\nSource: glibc (2.36-1)\nVersion: 2.36-9\n"
SITE = "app/.venv/lib/python3.11/site-packages"
WHEEL = "Wheel-Version: 1.0\nTag: cp311-cp311-manylinux_2_17_x86_64\nTag: cp311-cp311-manylinux2014_x86_64\n"
FILES = {
    "usr/lib/os-release": OS_RELEASE,
    "usr/lib/libc.so.6": "the C library",
    "var/lib/dpkg/status.d/libc6": STATUS,
    "var/lib/dpkg/status.d/libc6.md5sums": "0  lib/libc.so.6\n1  lib/not-in-this-image\n",
    f"{SITE}/spam/__init__.py": "import eggs",
    f"{SITE}/spam/__pycache__/__init__.cpython-311.pyc": "bytecode",
    f"{SITE}/spam-1.2.dist-info/METADATA": "Name: Spam\nVersion: 1.2\nLicense-Expression: MIT\n",
    f"{SITE}/spam-1.2.dist-info/WHEEL": WHEEL,
    f"{SITE}/spam-1.2.dist-info/RECORD": "spam/__init__.py,sha256=x,1\nspam-1.2.dist-info/METADATA,,\n"
    "spam-1.2.dist-info/WHEEL,,\nspam-1.2.dist-info/RECORD,,\n../../../bin/spam,,\n",
    "app/.venv/bin/spam": "#!",
    "etc/passwd": "root:x:0:0:root:/:/\n",
}


def layer(files, modes=None, links=None):
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for name, text in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(text), (modes or {}).get(name, 0o644)
            tar.addfile(entry, io.BytesIO(text.encode()))
        for name, target in (links or {}).items():
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = tarfile.SYMTYPE, target
            tar.addfile(entry)
    return data.getvalue()


def archive(path, *layers, base="docker.io/library/python:3.11"):
    config = {
        "created": "2026-01-02T03:04:05.678Z",
        "config": {"Labels": {"org.opencontainers.image.base.name": base}, "User": "65532:65532"},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(data).hexdigest()}" for data in layers]},
    }
    names = [f"{number}.tar" for number in range(len(layers))]
    manifest = [{"Config": "c.json", "RepoTags": ["localhost/wattlock-spam:dev"], "Layers": names}]
    with tarfile.open(path, "w") as tar:
        for name, data in [
            ("manifest.json", json.dumps(manifest).encode()),
            ("c.json", json.dumps(config).encode()),
            *zip(names, layers, strict=True),
        ]:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return read_image(path)


@pytest.fixture
def wheels(monkeypatch):
    """A lock in which Spam has a wheel for this platform and one for another."""
    names = [
        "spam-1.2-cp311-cp311-manylinux2014_x86_64.manylinux_2_17_x86_64.whl",
        "spam-1.2-cp312-cp312-win_amd64.whl",
    ]
    locked = {("spam", "1.2"): [(names[0], "a" * 64), (names[1], "b" * 64)]}
    monkeypatch.setattr(sbom, "locked_wheels", lambda: locked)


def test_a_later_layer_hides_what_it_removes_and_replaces(tmp_path):
    first = layer({"a/old": "1", "a/kept": "2", "b/x": "3", "c": "4", "d/y": "5"})
    second = layer({"a/.wh.old": "", "b/.wh..wh..opq": "", "b/new": "6", "c": "seven", ".wh.d": ""}, links={"e": "c"})
    image = archive(tmp_path / "i.tar", first, second)
    assert {path for path, file in image.files.items() if file.is_regular} == {"a/kept", "b/new", "c"}
    assert image.files["c"].sha256 == hashlib.sha256(b"seven").hexdigest()
    assert image.files["e"].is_link
    assert image.size_bytes == len("2") + len("6") + len("seven")


def test_modes_are_told(tmp_path):
    image = archive(tmp_path / "i.tar", layer({"su": "", "run": "", "text": ""}, {"su": 0o4755, "run": 0o755}))
    assert [path for path, file in image.files.items() if file.is_setuid] == ["su"]
    assert [path for path, file in image.files.items() if file.is_executable] == ["su", "run"]


def test_what_is_no_image_is_refused_with_a_sentence_that_helps(tmp_path):
    with tarfile.open(tmp_path / "i.tar", "w"):
        pass
    with pytest.raises(ValueError, match="docker save or dev/images"):
        read_image(tmp_path / "i.tar")


def test_every_file_has_an_owner_or_is_listed_itself(tmp_path, wheels):
    stray = f"{SITE}/spam/__pycache__/stray.cpython-311.pyc"
    image = archive(tmp_path / "i.tar", layer(FILES | {"opt/tool": "somebody's", stray: "no source"}))
    document, unclaimed = sbom.list_image(image)
    assert unclaimed == {"usr/lib/os-release", "etc/passwd", "opt/tool", stray}
    parts = {part.bom_ref.value: part for part in document.components}
    assert set(parts) == {"pypi:spam", "deb:libc6:amd64", *(f"file:/{path}" for path in unclaimed)}
    assert [hash_.content for hash_ in parts["pypi:spam"].hashes] == ["a" * 64]
    assert [licence.id for licence in parts["pypi:spam"].licenses] == ["MIT"]
    libc = parts["deb:libc6:amd64"]
    assert str(libc.purl) == "pkg:deb/debian/libc6@2.36-9?arch=amd64&distro=debian-12&upstream=glibc"
    assert [(file.name, next(iter(file.hashes)).content) for file in libc.components] == [
        ("/usr/lib/libc.so.6", hashlib.sha256(b"the C library").hexdigest())
    ]


def test_a_package_that_was_removed_but_for_its_settings_is_not_listed(tmp_path, wheels):
    gone = STATUS.replace("install ok installed", "deinstall ok config-files")
    image = archive(tmp_path / "i.tar", layer(FILES | {"var/lib/dpkg/status.d/libc6": gone}))
    assert "deb:libc6:amd64" not in {part.bom_ref.value for part in sbom.list_image(image)[0].components}


def test_a_python_that_debian_did_not_make_is_listed_with_its_version(tmp_path, wheels):
    own = {
        "usr/local/include/python3.11/patchlevel.h": '#define PY_VERSION             "3.11.16"\n',
        "usr/local/bin/python3.11": "elf",
        "usr/local/lib/python3.11/os.py": "code",
        "usr/local/lib/python3.11/__pycache__/os.cpython-311.pyc": "bytecode",
    }
    document, unclaimed = sbom.list_image(archive(tmp_path / "i.tar", layer(FILES | own)))
    (python,) = [part for part in document.components if part.name == "cpython"]
    assert python.version == "3.11.16"
    assert {file.name for file in python.components} >= {"/usr/local/bin/python3.11", "/usr/local/lib/python3.11/os.py"}
    assert not {path for path in unclaimed if path.startswith("usr/local")}


def test_the_document_is_valid_and_the_same_each_time(tmp_path, wheels):
    image = archive(tmp_path / "i.tar", layer(FILES))
    texts = []
    for name in ("first", "second"):
        sbom.write(sbom.list_image(image)[0], tmp_path / name)
        texts.append((tmp_path / name).read_text())
    assert texts[0] == texts[1]
    told = json.loads(texts[0])
    assert told["specVersion"] == "1.6"
    assert told["metadata"]["component"]["name"] == "wattlock-spam"


def test_a_document_that_is_not_valid_is_not_written(tmp_path, wheels, monkeypatch):
    document, _ = sbom.list_image(archive(tmp_path / "i.tar", layer(FILES)))
    output = sbom.JsonV1Dot6.output_as_string
    monkeypatch.setattr(
        sbom.JsonV1Dot6, "output_as_string", lambda self, **how: output(self, **how).replace('"MIT"', '"No licence"')
    )
    with pytest.raises(ValueError, match="would not be valid"):
        sbom.write(document, tmp_path / "document")
    assert not (tmp_path / "document").exists()


def test_wheels_of_the_lock_are_found():
    wheels = sbom.locked_wheels()
    name, hash_ = wheels["pyyaml", next(version for name, version in wheels if name == "pyyaml")][0]
    assert name.startswith("pyyaml-")
    assert len(hash_) == 64
