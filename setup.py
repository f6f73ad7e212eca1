"""Build flora_core and flora_kernels. Needs no torch: build isolation would fetch it anew."""

from setuptools import find_packages, setup

# `kernels` is the import name of another library, so flora_kernels lies in it without being part of it;
# recipes lie at the top where a newcomer looks, and travel as a data-only package inside flora_core.
setup(
    packages=[
        "flora_core",
        *(f"flora_core.{name}" for name in find_packages("flora_core")),
        "flora_core.packaged_recipes",
        "flora_kernels",
        *(f"flora_kernels.{name}" for name in find_packages("kernels/flora_kernels")),
    ],
    package_dir={"flora_kernels": "kernels/flora_kernels", "flora_core.packaged_recipes": "recipes"},
    package_data={"flora_core.packaged_recipes": ["*.yaml"]},
)
