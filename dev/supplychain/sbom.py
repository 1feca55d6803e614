"""Lists what is in an image as a CycloneDX 1.6 document:  python dev/supplychain/sbom.py ARCHIVE... --into FOLDER

What is listed is read from the image itself, not from what should be in it. The hashes of Python packages are those
that uv.lock demands of the downloaded wheel; files of Debian's packages, and files of none, have their SHA-256.
"""

import argparse
import sys
import tarfile
import tomllib
import uuid
from collections.abc import Iterator
from datetime import datetime
from email.parser import HeaderParser
from pathlib import Path, PurePosixPath
from typing import Any

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import HashAlgorithm, HashType, Property
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from image_archive import File, Image, read_image
from packageurl import PackageURL
from packaging.tags import parse_tag
from packaging.utils import canonicalize_name, parse_wheel_filename

ROOT = Path(__file__).resolve().parents[2]
# Properties of the document that dev/scan reads.
BASE = "wattlock:base"
DEBIAN_SUITE = "wattlock:debian-suite"


def sha256(content: str) -> list[HashType]:
    return [HashType(alg=HashAlgorithm.SHA_256, content=content)]


def file_component(file: File) -> Component:
    return Component(
        name=f"/{file.path}", type=ComponentType.FILE, hashes=sha256(file.sha256), bom_ref=f"file:/{file.path}"
    )


def locked_wheels() -> dict[tuple[str, str], list[tuple[str, str]]]:
    """Return file name and SHA-256 of the wheels in uv.lock, by name and version of their package."""
    lock = tomllib.loads((ROOT / "uv.lock").read_text())
    return {
        (package["name"], package["version"]): [
            (PurePosixPath(wheel["url"]).name, wheel["hash"].removeprefix("sha256:"))
            for wheel in package.get("wheels", [])
        ]
        for package in lock["package"]
    }


def wheel_hash(wheels: list[tuple[str, str]], installed_tags: list[str]) -> list[HashType]:
    """Return the hash of the wheel with these tags; nothing if none or several have them."""
    installed = {tag for text in installed_tags for tag in parse_tag(text)}
    matching = [hash_ for name, hash_ in wheels if parse_wheel_filename(name)[3] == installed]
    return sha256(matching[0]) if len(matching) == 1 else []


def python_packages(image: Image) -> Iterator[tuple[Component, set[str]]]:
    """Give each installed Python package, with the paths that its RECORD names."""
    wheels = locked_wheels()
    for path in sorted(path for path in image.files if path.endswith(".dist-info/METADATA")):
        about = HeaderParser().parsestr(image.text(path))
        name, version = canonicalize_name(about["Name"]), about["Version"]
        folder = PurePosixPath(path).parent
        tags = HeaderParser().parsestr(image.text(f"{folder}/WHEEL")).get_all("Tag", [])
        licence = about["License-Expression"]
        component = Component(
            name=name,
            version=version,
            type=ComponentType.LIBRARY,
            purl=PackageURL("pypi", name=name, version=version),
            bom_ref=f"pypi:{name}",
            hashes=wheel_hash(wheels.get((name, version), []), tags),
            licenses=[LicenseFactory().make_from_string(licence)] if licence else [],
        )
        recorded = [
            line.rpartition(",")[0].rpartition(",")[0].strip('"')
            for line in image.text(f"{folder}/RECORD").splitlines()
        ]
        yield component, {normal(folder.parent / entry) for entry in recorded}


def normal(path: PurePosixPath) -> str:
    """Return a path without "..": programs of Python packages are named by one."""
    parts: list[str] = []
    for part in path.parts:
        if part == "..":
            parts.pop()
        else:
            parts.append(part)
    return "/".join(parts)


def system(image: Image) -> dict[str, str]:
    """Return what the image says of its Debian."""
    lines = image.text("usr/lib/os-release").splitlines()
    return {name: value.strip('"') for name, _, value in (line.partition("=") for line in lines)}


def debian_packages(image: Image) -> Iterator[tuple[Component, set[str]]]:
    """Give each Debian package, with the paths of it that are in the image."""
    distro = f"{system(image)['ID']}-{system(image)['VERSION_ID']}"
    # One file for each package where only parts of packages are left, else one for all.
    records = [
        image.text(path)
        for path in image.files
        if path == "var/lib/dpkg/status"
        or (
            path.startswith("var/lib/dpkg/status.d/") and image.files[path].is_regular and not path.endswith(".md5sums")
        )
    ]
    for record in "\n\n".join(records).split("\n\n"):
        about = HeaderParser().parsestr(record.lstrip("\n"))
        if not about["Package"] or not about["Status"].endswith(" installed"):
            continue
        name, version = about["Package"], about["Version"]
        owned = set(owned_by_debian(image, name, about["Architecture"]))
        nested = [file_component(image.files[path]) for path in sorted(owned) if image.files[path].is_regular]
        source = (about["Source"] or name).split()
        qualifiers = {"arch": about["Architecture"], "distro": distro, "upstream": source[0]}
        component = Component(
            name=name,
            version=version,
            type=ComponentType.LIBRARY,
            purl=PackageURL("deb", "debian", name, version, qualifiers),
            bom_ref=f"deb:{name}:{about['Architecture']}",
            components=nested,
        )
        yield component, owned | {f"usr/share/doc/{name}/copyright"}


def owned_by_debian(image: Image, name: str, architecture: str) -> Iterator[str]:
    """Give the paths of a package that are in the image, under the names that they have there."""
    lists = [
        f"var/lib/dpkg/status.d/{name}.md5sums",
        f"var/lib/dpkg/info/{name}.list",
        f"var/lib/dpkg/info/{name}:{architecture}.list",
    ]
    for path in lists:
        if path in image.files:
            for line in image.text(path).splitlines():
                listed = line.partition("  ")[2] if path.endswith(".md5sums") else line.removeprefix("/")
                for place in (listed, f"usr/{listed}"):
                    if place in image.files and image.files[place].kind != tarfile.DIRTYPE:
                        yield place


def own_python(image: Image, unclaimed: set[str]) -> Component | None:
    """Return the Python that is no package of Debian, with its files; None where Debian's is used."""
    headers = [path for path in sorted(unclaimed) if path.endswith("/patchlevel.h")]
    if not headers:
        return None
    lines = image.text(headers[0]).splitlines()
    version = next(line.split('"')[1] for line in lines if line.startswith("#define PY_VERSION "))
    files = [path for path in sorted(unclaimed) if path.startswith("usr/local/")]
    return Component(
        name="cpython",
        version=version,
        type=ComponentType.PLATFORM,
        purl=PackageURL("generic", name="cpython", version=version),
        cpe=f"cpe:2.3:a:python:python:{version}:*:*:*:*:*:*:*",
        bom_ref="cpython",
        components=[file_component(image.files[path]) for path in files],
    )


def list_image(image: Image) -> tuple[Bom, set[str]]:
    """Return the document, and the regular files that it lists singly because no package owns them."""
    components: list[Component] = []
    claimed: set[str] = set()
    for component, paths in [*python_packages(image), *debian_packages(image)]:
        components.append(component)
        claimed |= paths
    sources = claimed | {path for path, file in image.files.items() if file.is_link}
    unclaimed = {
        path
        for path, file in image.files.items()
        if file.is_regular
        and path not in claimed
        and not path.startswith("var/lib/dpkg/")
        and not is_bytecode(path, sources)
    }
    if python := own_python(image, unclaimed):
        components.append(python)
        unclaimed -= {file.name.removeprefix("/") for file in python.components}
        unclaimed = {path for path in unclaimed if not path.startswith("usr/local/")}
    components += [file_component(image.files[path]) for path in sorted(unclaimed)]
    return document(image, components), unclaimed


def is_bytecode(path: str, sources: set[str]) -> bool:
    """Whether this was compiled from one of these."""
    place = PurePosixPath(path)
    source = place.parent.parent / f"{place.name.split('.cpython-')[0]}.py"
    return place.suffix == ".pyc" and place.parent.name == "__pycache__" and str(source) in sources


def document(image: Image, components: list[Component]) -> Bom:
    name = image.tag.rpartition("/")[2].partition(":")[0]
    subject = Component(
        name=name,
        version=image.tag.rpartition(":")[2],
        type=ComponentType.CONTAINER,
        bom_ref="image",
        properties=[
            Property(name=BASE, value=image.base or "unknown"),
            Property(name=DEBIAN_SUITE, value=system(image)["VERSION_CODENAME"]),
            *(Property(name="wattlock:layer", value=digest) for digest in image.layers),
        ],
    )
    bom = Bom(components=components, serial_number=uuid.uuid5(uuid.NAMESPACE_URL, "|".join(image.layers)))
    # The same image has the same document, whenever it is written.
    bom.metadata.timestamp = datetime.fromisoformat(image.config["created"].replace("Z", "+00:00"))
    bom.metadata.component = subject
    bom.register_dependency(subject, components)
    return bom


def write(bom: Bom, path: Path) -> None:
    """Write the document; ValueError if it does not fit CycloneDX' own schema."""
    text = JsonV1Dot6(bom).output_as_string(indent=2)
    if problem := JsonStrictValidator(SchemaVersion.V1_6).validate_str(text):
        raise ValueError(f"{path.name} would not be valid: {problem}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def count(components: Any, kind: str) -> int:
    return sum(1 for component in components if component.purl and component.purl.type == kind)


def main() -> int:
    parser = argparse.ArgumentParser(description="List what is in images.")
    parser.add_argument("archives", nargs="+", type=Path)
    parser.add_argument("--into", type=Path, default=ROOT / "dist" / "sbom")
    options = parser.parse_args()
    for archive in options.archives:
        image = read_image(archive)
        bom, unclaimed = list_image(image)
        path = options.into / f"{bom.metadata.component.name}.cdx.json"
        write(bom, path)
        unpinned = sorted(
            part.name for part in bom.components if part.purl and part.purl.type == "pypi" and not part.hashes
        )
        print(
            f"{path}: {count(bom.components, 'pypi')} Python packages, {count(bom.components, 'deb')} of Debian, "
            f"{len(unclaimed)} files of none; without the hash of a wheel: {', '.join(unpinned) or 'none'}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
