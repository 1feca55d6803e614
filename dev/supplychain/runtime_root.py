"""Collects into a folder what runs in Wattlock's images: Python, the libraries that it loads, and nothing else.

Used in the Dockerfile, by the Python of the base image and before anything of ours is there: standard library only.

    runtime_root.py root VENV ROOT    the root of the image: interpreter, standard library, the C libraries that these
                                      and VENV need, an /etc of ten files, Debian's records of what is there
    runtime_root.py venv VENV COPY    VENV without the programs in it (activate, kopf ...)
    runtime_root.py tidy FOLDER VENV  what was installed to FOLDER and will lie in VENV

All three leave the same files for the same inputs: bytecode without times, one time for all, no notes about the build.

What is there is a list of what is wanted, not of what is taken away, so nothing comes in with a new base image.
"""

import compileall
import os
import py_compile
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

# Parts of the standard library that serve people at a terminal, build packages or test Python itself.
UNUSED_MODULES = {
    "__pycache__", "dist-packages", "site-packages", "distutils", "ensurepip", "idlelib", "lib2to3", "pydoc_data",
    "sitecustomize.py", "test", "tests", "tkinter", "turtle.py", "turtledemo", "venv", "LICENSE.txt",
    "EXTERNALLY-MANAGED",
}  # fmt: skip
UNUSED_PREFIXES = ("config-", "_test", "_ctypes_test", "_xxtest", "xxlimited", "libpython")
# Extension modules that nothing of ours imports, and that bring large libraries: databases, terminals, NIS.
UNUSED_EXTENSIONS = {
    "_crypt", "_curses", "_curses_panel", "_dbm", "_gdbm", "_sqlite3", "_tkinter", "nis", "ossaudiodev", "readline",
    "spwd",
}  # fmt: skip
# Opened by name while running, so that no file says that it needs them: by glibc itself (threads that end, names of
# hosts) and by NVIDIA's driver library, which the container runtime or the chart mounts.
OPENED_BY_NAME = [
    "libgcc_s.so.1", "libm.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1", "libresolv.so.2", "libnss_dns.so.2",
    "libnss_files.so.2",
]  # fmt: skip
ETC = {
    "passwd": "root:x:0:0:root:/:/usr/sbin/nologin\nwattlock:x:65532:65532:wattlock:/:/usr/sbin/nologin\n",
    "group": "root:x:0:\nwattlock:x:65532:\n",
    "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
}


class Root:
    """A folder that becomes the root of an image; paths keep their places."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: set[Path] = set()
        for name in ("bin", "sbin", "lib", "lib64"):
            if (link := Path("/", name)).is_symlink():
                self.at(link).symlink_to(link.readlink())
                self.at(link.resolve()).mkdir(parents=True, exist_ok=True)

    def at(self, path: Path) -> Path:
        """Return where a path of the base image lies in the new root."""
        place = self.folder / path.relative_to("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        return place

    def add(self, path: Path) -> None:
        """Copy a file; of a link, all that it leads to as well."""
        place = path.parent.resolve() / path.name
        if place in self.files:
            return
        self.files.add(place)
        if place.is_symlink():
            self.at(place).symlink_to(place.readlink())
            self.add(place.parent / place.readlink())
        elif place.is_dir():
            for below in place.iterdir():
                self.add(below)
        else:
            shutil.copy2(place, self.at(place))


def needed(*binaries: Path) -> set[Path]:
    """Return the shared libraries that the loader finds for these files; ends the build where it misses one."""
    # ldd ends with 1 where a file is linked to nothing; what it could not find is in its lines.
    lines = subprocess.run(["ldd", *binaries], capture_output=True, text=True, timeout=120).stdout.splitlines()
    if missing := sorted({line.split()[0] for line in lines if "=> not found" in line}):
        sys.exit(f"error: the base image lacks {', '.join(missing)}: add the Debian package to the Dockerfile's base")
    words = [line.split(" => ")[-1].split() for line in lines if line.startswith("\t")]
    return {Path(word[0]) for word in words if word and word[0].startswith("/")}


def standard_library(folder: Path) -> list[Path]:
    """Return the files of Python's standard library that a service may load."""
    files = []
    for directory, names, leaves in os.walk(folder):
        names[:] = sorted(name for name in names if name not in UNUSED_MODULES and not name.startswith(UNUSED_PREFIXES))
        for leaf in sorted(leaves):
            unused = leaf in UNUSED_MODULES or leaf.startswith(UNUSED_PREFIXES)
            if not unused and not (leaf.endswith(".so") and leaf.split(".")[0] in UNUSED_EXTENSIONS):
                files.append(Path(directory, leaf))
    return files


def debian_records(root: Root) -> None:
    """Write what Debian knows about the files that are there, as the "distroless" images do; scanners read it."""
    names = {}
    for file in sorted(root.files):
        if file.is_file() and not file.is_symlink():
            # Debian's list still has the names from before /lib became a link to /usr/lib.
            names |= {str(file): file, str(file).removeprefix("/usr"): file}
    # It ends with 1 for files that belong to no package: a Python that was built in the base image.
    search = ["dpkg-query", "--search", *names]
    found = subprocess.run(search, capture_output=True, text=True, timeout=120).stdout.splitlines()
    owned: dict[str, set[Path]] = {}
    for line in found:
        owner, _, name = line.partition(": ")
        if name in names and not owner.startswith("diversion by"):
            owned.setdefault(owner.split(",")[0], set()).add(names[name])
    records = root.at(Path("/var/lib/dpkg/status.d"))
    records.mkdir(parents=True)
    for package, files in sorted(owned.items()):
        name = package.split(":")[0]
        status = subprocess.run(
            ["dpkg-query", "--status", package], capture_output=True, text=True, timeout=20, check=True
        )
        (records / name).write_text(status.stdout)
        sums = subprocess.run(["md5sum", *sorted(files)], capture_output=True, text=True, timeout=60, check=True).stdout
        (records / f"{name}.md5sums").write_text(sums.replace("  /", "  "))
        copyright_file = Path("/usr/share/doc", name, "copyright")
        if copyright_file.exists():
            target = root.at(copyright_file)
            shutil.copyfile(copyright_file, target)


def make_root(venv: Path, folder: Path) -> None:
    """Fill ``folder`` with all that the programs in ``venv`` need, ``venv`` itself not among it."""
    root = Root(folder)
    python = venv / "bin" / "python"
    while python.is_symlink():
        python = python.parent / python.readlink()
        if venv not in python.parents:
            root.add(python)
    library = Path(sysconfig.get_path("stdlib"))
    modules = standard_library(library)
    for module in modules:
        root.add(module)
    # Where a Python that is no package of Debian says its whole version, which the list of what is there needs.
    if (header := Path(sysconfig.get_path("include"), "patchlevel.h")).exists():
        root.add(header)
    compiled = [module for module in modules if module.suffix == ".so" or ".so." in module.name]
    compiled += [path for path in venv.rglob("*.so*") if path.is_file()]
    libraries = {path for path in needed(python.resolve(), *compiled) if venv not in path.parents}
    c_library = next(path for path in libraries if path.name == "libc.so.6")
    for name in OPENED_BY_NAME:
        libraries |= needed(c_library.parent / name) | {c_library.parent / name}
    for path in libraries:
        root.add(path)
    for name, text in ETC.items():
        root.at(Path("/etc", name)).write_text(text)
    for name in ("os-release", "debian_version", "ld.so.conf", "ld.so.conf.d"):
        root.add(Path("/etc", name))
    debian_records(root)
    # The loader's index: also what finds libraries of a Python in /usr/local.
    subprocess.run(["ldconfig", "-r", folder], check=True, timeout=60)
    shutil.rmtree(folder / "var/cache", ignore_errors=True)
    for name in ("dev", "proc", "sys", "run", "tmp"):
        root.at(Path("/", name)).mkdir(exist_ok=True)
    (folder / "tmp").chmod(0o1777)
    root.at(Path("/var/run")).symlink_to("/run")
    tidy(folder, Path("/"))


def copy_venv(venv: Path, copy: Path) -> None:
    """Copy a virtual environment: packages and the link to the interpreter, no programs."""
    shutil.copytree(venv / "lib", copy / "lib", symlinks=True)
    shutil.copy2(venv / "pyvenv.cfg", copy)
    (copy / "bin").mkdir()
    for link in (venv / "bin").glob("python*"):
        (copy / "bin" / link.name).symlink_to(link.readlink())
    tidy(copy, venv)


def tidy(folder: Path, place: Path) -> None:
    """Make the files depend on nothing but what was installed; ``place`` is where they will lie."""
    for path in folder.rglob("*"):
        # uv notes when and from where it installed; nothing reads it.
        if path.name in ("uv_cache.json", "direct_url.json") and path.parent.suffix == ".dist-info":
            path.unlink()
            record = path.parent / "RECORD"
            lines = record.read_text().splitlines(keepends=True)
            record.write_text("".join(line for line in lines if path.name not in line))
    (folder / ".lock").unlink(missing_ok=True)
    for cache in list(folder.rglob("__pycache__")):
        shutil.rmtree(cache)
    # The root is read-only when it runs, so nothing can be newer than its bytecode.
    unchecked = py_compile.PycInvalidationMode.UNCHECKED_HASH
    for library in sorted(folder.glob("**/python3.*")):
        if library.is_dir():
            compileall.compile_dir(
                library, stripdir=str(folder), prependdir=str(place), quiet=2, invalidation_mode=unchecked
            )
    for path in [folder, *folder.rglob("*")]:
        if not path.is_symlink():
            # Nothing is setuid, nothing but /tmp may be written by all, and only programs can be started. (The kernel
            # starts the loader, which is a shared library; some wheels call all of their files programs.)
            mode = path.stat().st_mode & (0o1777 if path.is_dir() else 0o777)
            startable = path.is_dir() or path.parent.name == "bin" or ".so" in path.name
            path.chmod(mode if mode & 0o1000 else mode & (0o755 if startable else 0o644))
        os.utime(path, (0, 0), follow_symlinks=False)


match sys.argv[1:]:
    case ["root", venv, folder]:
        make_root(Path(venv), Path(folder))
    case ["venv", venv, copy]:
        copy_venv(Path(venv), Path(copy))
    case ["tidy", folder, place]:
        tidy(Path(folder), Path(place))
    case _:
        sys.exit(__doc__)
