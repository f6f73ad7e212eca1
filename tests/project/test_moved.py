"""Import paths of the first edition: they work, and say where their names are now."""

from __future__ import annotations

import importlib
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from flora_core.moved import MOVED

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("old", sorted(MOVED))
def test_an_old_path_gives_the_new_module_and_names_it(old: str):
    sys.modules.pop(f"flora_core.{old}", None)
    before = {name: getattr(sys.modules["flora_core"], name, None) for name in [old.split(".")[0]]}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of a parent, and flwr's own
            importlib.import_module(f"flora_core.{MOVED[old]}")
            importlib.import_module(f"flora_core.{old.rpartition('.')[0]}".rstrip("."))
        with pytest.warns(DeprecationWarning, match=rf"^flora_core\.{old} is now flora_core\.{MOVED[old]}; "):
            module = importlib.import_module(f"flora_core.{old}")
        new = importlib.import_module(f"flora_core.{MOVED[old]}")
        names = getattr(new, "__all__", None) or [name for name in vars(new) if not name.startswith("__")]
        assert names
        assert all(getattr(module, name) is getattr(new, name) for name in names)
    finally:
        sys.modules.pop(f"flora_core.{old}", None)
        for name, value in before.items():
            if value is not None:
                setattr(sys.modules["flora_core"], name, value)


def test_the_function_aggregate_can_still_be_called_after_its_old_module_is_imported():
    code = (
        "import warnings, flora_core; warnings.simplefilter('ignore')\n"
        "from flora_core.aggregate import get_strategy, inputs\n"
        "import flora_core.aggregate.product, flora_core.streaming.shards, flora_core.recipes\n"
        "from flora_core.recipes import load, Recipe\n"
        "from flora_core.streaming import merge_into_checkpoint\n"
        "try:\n    flora_core.aggregate([], 'flora')\nexcept ValueError as error:\n    print(error)\n"
    )
    path = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'kernels')!r}]\n"
    done = subprocess.run([sys.executable, "-c", path + code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_warning_points_at_the_line_that_imports():
    sys.modules.pop("flora_core.recipes", None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        import flora_core.recipes  # noqa: F401  # pyright: ignore[reportMissingImports]
    assert [Path(warning.filename).name for warning in caught] == [Path(__file__).name]
    sys.modules.pop("flora_core.recipes", None)
