"""Reads an image as "docker save" and "dev/images" write it: what files it has, whatever layer they come from."""

import hashlib
import json
import re
import stat
import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

# What is looked into; everything else is only counted and hashed.
_DESCRIPTIONS = re.compile(
    r"\.dist-info/(METADATA|RECORD|WHEEL)$|^var/lib/dpkg/(status$|status\.d/|info/.*\.(list|md5sums)$)|^(usr/lib|etc)/os-release$"
    r"|patchlevel\.h$|^etc/(passwd|group)$"
)
_LONGEST_DESCRIPTION_BYTES = 4 << 20


@dataclass(frozen=True)
class File:
    """A file, link or folder in an image."""

    path: str
    mode: int
    kind: bytes
    size_bytes: int
    link: str
    sha256: str = ""
    text: str | None = None

    @property
    def is_regular(self) -> bool:
        return self.kind in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.LNKTYPE)

    @property
    def is_link(self) -> bool:
        return self.kind == tarfile.SYMTYPE

    @property
    def is_setuid(self) -> bool:
        """Whether it runs as somebody else than who starts it."""
        return self.is_regular and bool(self.mode & (stat.S_ISUID | stat.S_ISGID))

    @property
    def is_executable(self) -> bool:
        return self.is_regular and bool(self.mode & 0o111)


@dataclass(frozen=True)
class Image:
    """An image: its tag, its configuration, and its files by path, without the "/" before it."""

    tag: str
    config: dict[str, Any]
    files: dict[str, File]

    @property
    def layers(self) -> list[str]:
        layers: list[str] = self.config["rootfs"]["diff_ids"]
        return layers

    @property
    def base(self) -> str:
        """The base image that it was built on, as its label says."""
        labels = self.config["config"].get("Labels") or {}
        return str(labels.get("org.opencontainers.image.base.name", ""))

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files.values())

    def text(self, path: str) -> str:
        """Return a description's text; KeyError where there is none."""
        text = self.files[path].text
        if text is None:
            raise KeyError(path)
        return text


def read_image(archive: Path) -> Image:
    """Read the one image in an archive.

    Raises:
        ValueError: it is no archive of one image.
    """
    with tarfile.open(archive) as outer:
        try:
            (manifest,) = json.load(_member(outer, "manifest.json"))
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"{archive} is no archive of one image: write one with docker save or dev/images"
            ) from error
        config = json.load(_member(outer, manifest["Config"]))
        files: dict[str, File] = {}
        for name in manifest["Layers"]:
            with tarfile.open(fileobj=_member(outer, name)) as layer:
                _apply(layer, files)
    return Image(tag=(manifest.get("RepoTags") or ["untagged"])[0], config=config, files=files)


def _member(tar: tarfile.TarFile, name: str) -> IO[bytes]:
    """Open a member; a layer that occurs twice is a link to its first occurrence."""
    opened = tar.extractfile(name)
    if opened is None:
        raise ValueError(f"{name} in the archive is no file")
    return opened


def _apply(layer: tarfile.TarFile, files: dict[str, File]) -> None:
    for member in layer:
        path = PurePosixPath(member.name.removeprefix("/"))
        name = str(path)
        if path.name == ".wh..wh..opq":
            _remove_below(files, str(path.parent))
        elif path.name.startswith(".wh."):
            hidden = str(path.parent / path.name.removeprefix(".wh."))
            files.pop(hidden, None)
            _remove_below(files, hidden)
        elif name != ".":
            if not member.isdir():
                _remove_below(files, name)
            files[name] = _file(layer, member, name, files)


def _remove_below(files: dict[str, File], folder: str) -> None:
    for name in [name for name in files if name.startswith(f"{folder}/")]:
        del files[name]


def _file(layer: tarfile.TarFile, member: tarfile.TarInfo, name: str, files: dict[str, File]) -> File:
    if member.islnk():
        first = files[member.linkname.removeprefix("/").removeprefix("./")]
        return File(name, member.mode, member.type, 0, member.linkname, first.sha256, first.text)
    content = b""
    if member.isreg():
        opened = layer.extractfile(member)
        content = opened.read() if opened else b""
    described = _DESCRIPTIONS.search(name) and len(content) <= _LONGEST_DESCRIPTION_BYTES
    return File(
        path=name,
        mode=member.mode,
        kind=member.type,
        size_bytes=member.size if member.isreg() else 0,
        link=member.linkname,
        sha256=hashlib.sha256(content).hexdigest() if member.isreg() else "",
        text=content.decode(errors="replace") if described else None,
    )
