"""Builds the compiled CPU kernels where there is a C++ compiler; everything else is in pyproject.toml."""

import copy
import platform
import runpy
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

# Sums may be reordered so that loops become vectors, but NaN and infinity keep their meaning, and no
# flag is given that would change the floating-point mode of the process when the library is loaded.
FLAGS = "-O3 -g0 -std=c++17 -fno-math-errno -fno-trapping-math -fno-signed-zeros -fassociative-math -freciprocal-math"
THREADS = [] if platform.system() == "Linux" else ["-pthread"]  # on Linux they are torch's: native/threads.h
BUILDS = {"generic": ""}
if platform.machine() in ("x86_64", "AMD64"):
    BUILDS["avx2"] = "-mavx2 -mfma"
    BUILDS["avx512"] = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mprefer-vector-width=512"
    BUILDS["avx512bf16"] = BUILDS["avx512"] + " -mavx512bf16"


def sources(pattern: str) -> list[str]:
    return sorted(str(path) for path in Path("src/kmixer/native").glob(pattern))


class BuildApart(build_ext):
    """Builds all kernels at once. They share their sources, so each has a folder for its object files."""

    def finalize_options(self) -> None:
        build_ext.finalize_options(self)
        self.parallel = self.parallel or len(BUILDS)  # an option given to setup() is lost where the install is editable

    def build_extension(self, extension: Extension) -> None:
        apart = copy.copy(self)
        apart.build_temp = str(Path(self.build_temp, extension.name))
        build_ext.build_extension(apart, extension)

    def get_ext_filename(self, name: str) -> str:
        """The libraries hold nothing of Python: their names say neither its version nor its system."""
        return str(Path(*name.split(".")).with_suffix(".so"))


class WheelForEveryPython(bdist_wheel):
    """One wheel a platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


# The package itself is not installed yet: only this file of it is run.
DIGEST = runpy.run_path("src/kmixer/native/digest.py")["sources_digest"](Path("src/kmixer/native"))

setup(
    ext_modules=[
        Extension(
            f"kmixer.native._kernels_{name}",
            sources("*.cpp"),
            depends=sources("*.h"),
            define_macros=[("SOURCES_DIGEST", f'"{DIGEST}"')],
            extra_compile_args=[*FLAGS.split(), *THREADS, *machine.split()],
            extra_link_args=THREADS,
            optional=True,  # without a compiler the library works, with torch alone
        )
        for name, machine in BUILDS.items()
    ],
    cmdclass={"build_ext": BuildApart, "bdist_wheel": WheelForEveryPython},
)
