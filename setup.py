"""The packages of the wheel, among them `conf/` as `sdft/conf`; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["sdft", "sdft.*"]), "sdft.conf"], package_dir={"sdft.conf": "conf"})
