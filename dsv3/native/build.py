"""Compile the C++ of a folder once per machine, keep it in the user's cache, and say why where that is impossible.

A library's folder is named by a digest of all it depends on: the sources, the flags, torch and the compiler. It is
built under another name and renamed when complete, and a lock keeps a second process waiting instead of building too.
Which instructions are used is decided when it runs, so that the cache may be shared by machines of one kind of
processor.
"""

import functools
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import torch

SHARED = Path(__file__).parent  # headers for all
FLAGS = (
    "-O3",
    "-fopenmp",  # torch's threads; its libgomp is the one that is loaded already
    "-Wno-psabi",  # vectors longer than a register pass between inlined functions only
    "-Wno-maybe-uninitialized",  # g++ 12 warns of its own <immintrin.h>
)


@functools.cache
def why_not(name: str, folder: Path, what: str) -> str | None:
    """None once the operators `name` of a folder's C++ are compiled and loaded; otherwise why they cannot be. The first
    call may take a minute.

    A failure is said once on stderr, as the lack of a kernel for `what`, and remembered until the process ends.
    """
    try:
        _load(name, folder, what)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        print(f"dsv3: {what} without the C++ kernel: {reason}", file=sys.stderr, flush=True)
        return reason
    return None


def _load(name: str, source: Path, what: str) -> None:
    if sys.platform != "linux":
        raise RuntimeError(f"it is built on Linux only, not on {sys.platform}")
    compiler = shlex.split(os.environ.get("CXX", "c++"))  # one that goes through another: "ccache g++"
    if not compiler or shutil.which(compiler[0]) is None:
        raise RuntimeError("there is no C++ compiler; install g++, or name one in the environment variable CXX")
    folder = _root() / _digest(compiler, name, source)
    library = folder / f"{name}.so"
    if not library.exists():
        with _locked(folder.with_suffix(".lock")), _ninja_at_hand():
            if not library.exists():
                print(f"dsv3: compiling the kernel of {what}, once on this machine (about a minute)", file=sys.stderr)
                _compile(folder, name, source)
    torch.ops.load_library(library)


def _root() -> Path:
    from dsv3.data.prepare import cache_folder  # one place says where the user's cache is

    return cache_folder() / "kernels"


def _sources(source: Path) -> list[Path]:
    paths = (path for folder in (SHARED, source) for path in folder.iterdir())
    return sorted(path for path in paths if path.suffix in (".cpp", ".h"))


def _digest(compiler: list[str], name: str, source: Path) -> str:
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=True).stdout
    sources = _sources(source)
    parts = [name, torch.__version__, platform.machine(), *FLAGS, *(path.name for path in sources)]
    content = b"".join(path.read_bytes() for path in sources)
    return sha256(repr(parts).encode() + version + content).hexdigest()[:16]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    import fcntl  # of Linux, as the whole build

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _ninja_at_hand() -> Iterator[None]:
    """torch looks for ninja on PATH; pip puts it beside Python, which a PATH need not name."""
    before = os.environ.get("PATH", os.defpath)
    path = os.pathsep.join((before, str(Path(sys.executable).parent)))
    if shutil.which("ninja", path=path) is None:
        raise RuntimeError("ninja is missing, with which torch builds extensions; install it (pip install ninja)")
    os.environ["PATH"] = path
    try:
        yield
    finally:
        os.environ["PATH"] = before


def _compile(folder: Path, name: str, source: Path) -> None:
    from torch.utils import cpp_extension  # slow to import, and wanted here only

    temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's about compilers that it does not know
            cpp_extension.load(
                name,
                [str(path) for path in _sources(source) if path.suffix == ".cpp"],
                extra_cflags=list(FLAGS),
                extra_include_paths=[str(SHARED)],
                build_directory=str(temporary),
                is_python_module=False,
            )
        for path in temporary.iterdir():
            if path.suffix != ".so":
                path.unlink()
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
