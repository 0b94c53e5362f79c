"""What a wheel holds beside the modules of the package; all else stands in pyproject.toml.

The experiment files, `train_net.py` and the tools lie beside the package in the repository. A wheel
has them in `contrast_d2/share`, where `contrast_d2.resources` finds them and `contrast-d2` runs
them: a folder of its own, since Python puts the folder of a program on its import path.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

# They run the tests' own programs, which no wheel has.
OF_THE_REPOSITORY = ("compare_processes.py", "fuzz.py", "kill_points.py")


class BuildWithPrograms(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return  # the repository itself is what is imported
        target = Path(self.build_lib) / "contrast_d2/share"
        shutil.rmtree(target, ignore_errors=True)  # of an earlier build
        for folder in ("configs", "tools"):
            ignored = shutil.ignore_patterns("__pycache__", *OF_THE_REPOSITORY)
            shutil.copytree(folder, target / folder, ignore=ignored)
        shutil.copy("train_net.py", target)


setup(cmdclass={"build_py": BuildWithPrograms})
