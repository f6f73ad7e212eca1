"""Imports: what they load, and that they run downward and through the packages' faces only."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Every package from the ground up, and its modules by floor. A module imports lower floors of its own package, and the
# faces of packages that stand before its own.
FLOORS = {
    "common": [
        ("cache changes checks data_paths digests errors extras files formatting package_index seeds tensor_checks"),
        "devices safetensors_header segments states tables",
    ],
    "config": ["other_names privacy strategy_names", "adapter federation loading training", "recipe"],
    "ops": [
        "aliasing autotune backends types",
        "fusion merging validation",
        "autograd dropout",
        "dispatch",
        "custom_ops",
        "api",
    ],
    "testing": ["budget cases dropout rounding", "linear merge"],
    "adapters": ["base peft_config peft_keys penalty", "update", "bank peft"],
    "data": [
        "demo messages partition sources",
        "forms",
        "records",
        "layout splits",
        "answers tokens",
        "chat",
        "template",
        "pack",
    ],
    "distributed": ["world", "sharding"],
    "model": [
        "accepted client deterministic recompute weights",
        "attention_kernels layer loss",
        "attention targets",
        "cohort forward",
        "attachment evaluation",
        "with_adapter",
    ],
    "training": ["cuda_graphs optimizer pause planner", "client static_steps", "explanation steps", "trainer"],
    "aggregation": [
        "norms terms",
        "certificate svd",
        "downlink",
        "strategy",
        "flora global_adapter",
        "average flora_warm frozen redistribute",
    ],
    "merge": [
        "in_place shards staging",
        "names sharded sources",
        "targets tokenizer",
        "bases findings writer",
        "verify",
        "checkpoint",
        "export",
    ],
    "runs": [
        "events fingerprint recipe saving",
        "metrics record snapshot summary",
        "event_log folder plots progress",
        "demo_model report",
        "loading",
        "build",
    ],
    "federation": [
        "evaluation exchange global_model judge model_card protocol replay result",
        "model_copy rebase server",
        "clients party privacy",
        "local_clients parties resume",
        "callable_clients rank_clients",
        "quarantine",
        "output",
        "rounds",
    ],
    "flower": ["certificates messages", "certificate_checks link node"],
    "cli": ["adapter deploy doctor dry_run", "aggregate", "main", "__main__"],
}
PACKAGES = list(FLOORS)
MODULES = {
    f"{package}.{name}": (place, floor)
    for place, package in enumerate(PACKAGES)
    for floor, names in enumerate(FLOORS[package])
    for name in names.split()
}
# Beyond what the floors say: aggregation knows nothing of models and training, the ops nothing of transformers.
NEVER = {"aggregation": "model training ops data transformers", "ops": "transformers", "training": "aggregation runs"}
HEAVY = {"transformers", "peft", "safetensors", "rich", "yaml", "matplotlib", "tokenizers", "flwr", "scipy", "psutil"}


def run(code: str) -> str:
    """Run code in a fresh process of this interpreter."""
    path = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'kernels')!r}]\n"
    done = subprocess.run([sys.executable, "-c", path + code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded_by(code: str) -> list[str]:
    """The modules that code loads on top of what torch loads by itself."""
    return run(f"import torch\nbefore = set(sys.modules)\n{code}\nprint(*sorted(set(sys.modules) - before))").split()


USE = """
import flora_core as flora
y = flora.lora_linear(torch.ones(3, 4), torch.ones(2, 4), None, torch.ones(1, 4, requires_grad=True), torch.ones(1, 2),
                      flora.Segments([3]), flora.Segments([1]), [2.0], dropout_C=[0.5], dropout_seed_C=[1])
y.sum().backward()
weight = torch.ones(2, 4)
flora.stacked_merge_(weight, torch.ones(1, 4), torch.ones(1, 2), torch.ones(1))
bank = flora.AdapterBank(["a"], {"m": [1]}, {"m": [1.0]}, {"m": (2, 4)})
bank.reset("a", 0)
flora.ClientUpdate("a", bank.adapters("a"), bank.scaling("a"))
"""


def test_a_run_from_python_needs_nothing_of_the_command_s():
    run(
        "sys.modules |= dict.fromkeys(('rich', 'yaml', 'matplotlib'))\n"
        "from flora_core.federation import Federation\n"
        "from flora_core.merge import export_adapter, merge_into_checkpoint\n"
        "from flora_core.runs import History, build_run, save_inputs, summary_tables, write_report\n"
    )


def test_import_loads_torch_and_nothing_of_ours():
    loaded = loaded_by("import flora_core")
    assert [name for name in loaded if name.startswith("flora_")] == [
        "flora_core",
        "flora_core.lazy",
        "flora_core.moved",
        "flora_core.version",
    ]
    assert not {name.split(".")[0] for name in loaded} & HEAVY


def test_torch_alone_is_enough_for_the_ops_and_the_bank():
    loaded = loaded_by(USE)
    assert "flora_core.ops" in loaded
    assert not {name.split(".")[0] for name in loaded} & HEAVY


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # flwr's own
@pytest.mark.parametrize("package", ["", *PACKAGES])
def test_a_face_has_the_names_that_it_lists(package: str):
    face = importlib.import_module(f"flora_core.{package}".rstrip("."))
    assert face.__doc__
    assert len(face.__all__) == len(set(face.__all__))
    for name in face.__all__:
        assert getattr(face, name) is not None
    assert set(face.__all__) <= set(dir(face))
    with pytest.raises(AttributeError, match="no_such_name"):
        face.no_such_name  # noqa: B018


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # flwr's own
def test_a_lazy_face_gives_a_function_and_not_the_module_of_its_name():
    for package in ("", *PACKAGES):
        face = importlib.import_module(f"flora_core.{package}".rstrip("."))
        if "face" not in vars(face):
            continue
        for name in face.__all__:
            is_module = isinstance(getattr(face, name), ModuleType)
            assert is_module or f"{package}.{name}" not in MODULES, f"{face.__name__}.{name} is a module's name too"


def imports(tree: ast.AST, package: tuple[str, ...], types: bool = True) -> Iterator[tuple[int, str, str]]:
    """Line, absolute dotted module and name of every import, at any depth; for types alone if ``types``."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test) and not types:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) + 1 - node.level]] if node.level else []
            home = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, home, alias.name) for alias in node.names)
        else:
            yield from imports(node, package, types)


def test_every_form_of_import_is_seen():
    code = "from .. import ops\nfrom ..ops import x\nfrom .pack import y\nimport a.b\ndef f():\n    from . import z\n"
    typed = "if TYPE_CHECKING:\n    from ..trainer import T\n"
    found = [(home, name) for _, home, name in imports(ast.parse(code + typed), ("flora_core", "data"))]
    assert found == [
        ("flora_core", "ops"),
        ("flora_core.ops", "x"),
        ("flora_core.data.pack", "y"),
        ("a.b", ""),
        ("flora_core.data", "z"),
        ("flora_core.trainer", "T"),
    ]


@cache
def sources(folder: str) -> list[tuple[Path, tuple[str, ...], ast.Module]]:
    """Every file of a package with the package that it is in."""
    top = ROOT / folder
    return [
        (path, (top.name, *path.relative_to(top).parent.parts), ast.parse(path.read_text()))
        for path in sorted(top.rglob("*.py"))
    ]


@cache
def arrows() -> list[tuple[str, str, str, str]]:
    """Every import of the engine from itself: where it stands, from which module, and the module and name imported."""
    found = []
    for path, package, tree in sources("flora_core"):
        relative = path.relative_to(ROOT / "flora_core")
        if path.name != "__init__.py" and len(relative.parts) > 1:
            source = ".".join(relative.with_suffix("").parts)
            for line, home, name in imports(tree, package):
                if home.split(".")[0] == "flora_core":
                    target = f"{home}.{name}".removeprefix("flora_core.")
                    module = target if target in MODULES else home.removeprefix("flora_core").removeprefix(".")
                    found.append((f"{relative}:{line}", source, module, name))
    return found


def test_every_package_and_module_has_one_floor():
    listed = [f"{package}.{name}" for package, floors in FLOORS.items() for names in floors for name in names.split()]
    assert len(listed) == len(set(listed))
    paths = [path.relative_to(ROOT / "flora_core") for path, _, _ in sources("flora_core")]
    there = {".".join(path.with_suffix("").parts) for path in paths if len(path.parts) > 1}
    assert set(listed) == {name for name in there if not name.endswith("__init__")}
    assert {str(path) for path in paths if len(path.parts) == 1} == {"__init__.py", "lazy.py", "moved.py", "version.py"}


def test_packages_import_only_those_before_them():
    place = {package: number for number, package in enumerate(PACKAGES)}
    up = [
        f"{where} imports {module}"
        for where, source, module, _ in arrows()
        if place.get(module.split(".")[0], -1) > place[source.split(".")[0]]
    ]
    assert not up, f"a package imports only packages that stand before it in FLOORS: {up}"


def test_modules_import_only_lower_floors_of_their_package():
    up = [
        f"{where} imports {module}"
        for where, source, module, _ in arrows()
        if module in MODULES and MODULES[module][0] == MODULES[source][0] and MODULES[module][1] >= MODULES[source][1]
    ]
    assert not up, f"a module imports only lower floors of its own package: {up}"


def test_other_packages_are_imported_through_their_faces():
    past = []
    for where, source, module, name in arrows():
        package = module.split(".")[0]
        if package in FLOORS and package != source.split(".")[0]:
            face = importlib.import_module(f"flora_core.{package}")
            if name not in face.__all__ or module not in (package, f"{package}.{name}"):
                past.append(f"{where} imports {name} of {module}")
    assert not past, f"import from the package, and list the name in its __init__: {past}"


def test_packages_keep_out_of_what_is_not_theirs():
    trespass = []
    for path, package, tree in sources("flora_core"):
        for line, home, _ in imports(tree, package):
            target = home.split(".")[1] if home.startswith("flora_core.") else home.split(".")[0]
            if len(package) > 1 and target in NEVER.get(package[1], "").split():
                trespass.append(f"{path.name}:{line} imports {home}")
    assert not trespass


def test_kernels_never_import_the_engine():
    found = [
        f"{path.name}:{line} imports {home}"
        for path, package, tree in sources("kernels/flora_kernels")
        for line, home, _ in imports(tree, package, types=False)
        if home.split(".")[0] == "flora_core"
    ]
    assert not found


def test_nobody_imports_the_library_that_is_called_kernels():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    for _, package, tree in sources("flora_core"):
        assert not [home for _, home, _ in imports(tree, package) if home.split(".")[0] == "kernels"]


def test_only_safe_formats_are_read():
    """Never a pickle: torch.load and its kin have no place in the engine."""
    unsafe = {"pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib"}
    for path, package, tree in [*sources("flora_core"), *sources("kernels/flora_kernels")]:
        assert not {home.split(".")[0] for _, home, _ in imports(tree, package)} & unsafe, path
        calls = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
        assert not {"torch.load", "torch.save", "yaml.unsafe_load", "yaml.full_load", "eval", "exec"} & set(calls), path
