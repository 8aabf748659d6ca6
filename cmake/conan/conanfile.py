"""Conan 2 recipe of the checkout that it lies in: conan create cmake/conan"""

import os
import re

from conan import ConanFile
from conan.tools.build import check_min_cppstd
from conan.tools.cmake import CMake, CMakeToolchain
from conan.tools.files import copy, load, rmdir


class TetrominoConan(ConanFile):
    name = "tetromino"
    description = "4-bit block quantization and expert placement for inference engines"
    license = "Apache-2.0"
    package_type = "header-library"
    settings = "os", "arch", "compiler", "build_type"
    options = {"io": [True, False]}
    default_options = {"io": True}
    no_copy_source = True

    @property
    def _checkout(self):
        return os.path.join(self.recipe_folder, "..", "..")

    def set_version(self):
        header = load(self, os.path.join(self._checkout, "include", "tetromino", "version.hpp"))
        self.version = ".".join(re.findall(r"VERSION_(?:MAJOR|MINOR|PATCH) (\d+)", header)[:3])

    def export_sources(self):
        for pattern in ("CMakeLists.txt", "LICENSE", "include/*", "cmake/*"):
            copy(self, pattern, self._checkout, self.export_sources_folder)

    def requirements(self):
        self.requires("xsimd/13.0.0")
        if self.options.io:
            self.requires("nlohmann_json/3.11.3")

    def validate(self):
        check_min_cppstd(self, 20)

    def package_id(self):
        self.info.clear()

    def generate(self):
        toolchain = CMakeToolchain(self)
        for part in ("TESTS", "EXAMPLES", "CPU", "CUDA"):
            toolchain.cache_variables["TETROMINO_" + part] = False
        toolchain.cache_variables["TETROMINO_INSTALL"] = True
        toolchain.generate()

    def build(self):
        cmake = CMake(self)
        cmake.configure()

    def package(self):
        CMake(self).install()
        copy(self, "LICENSE", self.source_folder, os.path.join(self.package_folder, "licenses"))
        rmdir(self, os.path.join(self.package_folder, "lib"))  # Conan makes its own package files
        rmdir(self, os.path.join(self.package_folder, "share"))

    def package_info(self):
        self.cpp_info.bindirs = self.cpp_info.libdirs = []
        self.cpp_info.set_property("cmake_file_name", "tetromino")
        self.cpp_info.components["headers"].set_property("cmake_target_name", "tetromino::tetromino")
        self.cpp_info.components["headers"].requires = ["xsimd::xsimd"]
        if self.options.io:
            self.cpp_info.components["io"].set_property("cmake_target_name", "tetromino::io")
            self.cpp_info.components["io"].requires = ["headers", "nlohmann_json::nlohmann_json"]
