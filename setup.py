"""Puts the scripts, configs and tasks into the wheel, inside the package, where gpt_arc.files.resource finds them.

Everything else about the distribution is in pyproject.toml. An editable install uses the clone's own files.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

RESOURCES = ("new.py", "train.py", "sample.py", "stages", "prepare", "tools", "configs", "tasks")


class BuildWithResources(build_py):
    def run(self):
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib, "gpt_arc", "resources")
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for name in RESOURCES:
            if Path(name).is_dir():
                shutil.copytree(name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(name, target / name)


setup(cmdclass={"build_py": BuildWithResources})
