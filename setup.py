"""Build the C core: one object per instruction set, each with its own flags, then one extension.

Switches, for developers: SINGLEQUANT_DEBUG=1 (-O1 -g, assertions), SINGLEQUANT_SANITIZE=1
(address and undefined), SINGLEQUANT_WERROR=1, SINGLEQUANT_GENERIC_ONLY=1 (no instruction sets),
SINGLEQUANT_EMULATE_AMX=1 (tiles in plain C: slow, to test that table on a CPU without them).
"""

import os
import platform
import shutil
import sys
from pathlib import Path

import numpy
import scipy_openblas32
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
COMMON_FLAGS = [
    "-std=c11", "-D_GNU_SOURCE", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno",
    "-Wall", "-Wextra", "-pthread", "-Icsrc",
]
X86_64 = ("x86_64", "amd64")  # 32-bit x86 takes the generic table: the others move 64-bit registers
ARM = ("aarch64", "arm64")
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512_VNNI = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni",
               "-mprefer-vector-width=512"]
# Instruction set -> (machine prefixes it exists on, flags of its one file, the set that it needs).
KERNEL_FLAGS = {
    "avx2": (X86_64, AVX2, None),
    "avxvnni": (X86_64, [*AVX2, "-mavxvnni"], "avx2"),
    "avx512vnni": (X86_64, AVX512_VNNI, "avx2"),
    "amx": (X86_64, AVX512_VNNI, "avx512vnni"),  # the tile instructions are inline assembly
    "neon": (ARM, ["-march=armv8.2-a+dotprod"], None),
}


def switch(name):
    return os.environ.get(f"SINGLEQUANT_{name}", "0") not in ("", "0")


def kernel_sets():
    if switch("GENERIC_ONLY"):
        return {}
    machine = platform.machine().lower()
    return {isa: (flags, base) for isa, (hosts, flags, base) in KERNEL_FLAGS.items()
            if machine in hosts}


class BuildExt(build_ext):
    """Compile each kernel file with its own flags; bring OpenBLAS along, found beside it."""

    def build_extensions(self):
        # Python's own flags may name folders of this machine, where a wheel must not look.
        linker = self.compiler.linker_so
        self.compiler.linker_so = [word for word in linker if not word.startswith("-Wl,-rpath")]
        super().build_extensions()

    def build_extension(self, ext):
        ext.extra_objects = list(ext.extra_objects)
        built = set()
        for isa, (flags, base) in kernel_sets().items():
            if base and base not in built:
                print(f"singlequant: no {isa} kernels, as they need those of {base}")
                continue
            source = f"csrc/kernels/kernels_{isa}.c"
            try:
                objects = self.compiler.compile(
                    [source], output_dir=self.build_temp, include_dirs=ext.include_dirs,
                    extra_postargs=ext.extra_compile_args + flags, depends=ext.depends,
                )
            except Exception as error:  # the compiler rejects the flags: say so, go on without
                if switch("WERROR"):
                    raise
                print(f"singlequant: no {isa} kernels, the compiler refused {flags}: {error}")
                continue
            built.add(isa)
            ext.extra_objects += objects
            ext.define_macros.append((f"SQ_HAVE_{isa.upper()}", "1"))
        super().build_extension(ext)

    def run(self):
        super().run()
        source = Path(scipy_openblas32.get_lib_dir()) / scipy_openblas32.get_library(fullname=True)
        in_source = self.inplace or getattr(self, "editable_mode", False)
        package = ROOT / "singlequant" if in_source else Path(self.build_lib) / "singlequant"
        (package / "libs").mkdir(parents=True, exist_ok=True)
        made = package / "libs" / f"{source.name}.new"
        shutil.copy2(source, made)
        made.replace(package / "libs" / source.name)  # programs that run keep the file they have


compile_flags = list(COMMON_FLAGS)
beside = "@loader_path" if sys.platform == "darwin" else "$ORIGIN"
link_flags = [f"-Wl,-rpath,{beside}/libs", "-pthread", "-lm"]
if switch("DEBUG") or switch("SANITIZE"):
    compile_flags += ["-O1", "-g", "-UNDEBUG", "-DSQ_DEBUG"]
else:
    compile_flags += ["-O3", "-DNDEBUG", "-g0"]
    if sys.platform == "linux":  # wheels run on systems that are older than the one that builds
        compile_flags += ["-include", "csrc/core/sq_old_glibc.h"]
if switch("SANITIZE"):
    # Python's own flags hold -fwrapv, under which signed overflow would go unseen.
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-wrapv"]
    compile_flags += [*sanitize, "-fno-omit-frame-pointer"]
    link_flags += sanitize
if switch("WERROR"):
    compile_flags += ["-Werror"]
if switch("EMULATE_AMX"):
    compile_flags += ["-DSQ_AMX_EMULATED"]

setup(
    cmdclass={"build_ext": BuildExt},
    ext_modules=[
        Extension(
            "singlequant._C",
            sources=sorted(
                p.relative_to(ROOT).as_posix()
                for p in ROOT.glob("csrc/*/*.c")
                if p.name == "kernels_generic.c" or not p.name.startswith("kernels_")
            ),
            depends=sorted(
                p.relative_to(ROOT).as_posix()
                for p in [*ROOT.glob("csrc/**/*.h"), *ROOT.glob("csrc/kernels/*.c")]
            ),
            include_dirs=["csrc", numpy.get_include(), scipy_openblas32.get_include_dir()],
            define_macros=[("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION"),
                           ("NPY_TARGET_VERSION", "NPY_2_0_API_VERSION")],
            library_dirs=[scipy_openblas32.get_lib_dir()],
            libraries=[scipy_openblas32.get_library()],
            extra_compile_args=compile_flags,
            extra_link_args=link_flags,
        )
    ],
)
