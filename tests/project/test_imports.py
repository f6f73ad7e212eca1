"""What an import pulls in, and that imports run downward only."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# From the ground up; a module may import its own floor and those below. A name stands for a package as well.
FLOORS = [
    "checks data_paths extras other_names strategy_names package_index peft_keys repeatable",
    (
        "tensor_checks seeds segments update adapter_config bank backends config strict files history progress penalty "
        "arguments attention_ways calls fingerprint fused headers keys keys_check library merge_ways pausing "
        "peft_config recompute sharding snapshot tuning ways"
    ),
    "ops",
    (
        "models linear attention optimizer loss data forward cohort attach planner beside explaining federation_config "
        "graphs local"
    ),
    (
        "steps trainer evaluate aggregate validate privacy peft_io saving merge checkpoint identity demo_model device "
        "testing adapter_command aggregate_command card exchange flower_messages incoming rebase replay server "
        "sharded_merge site streaming"
    ),
    "loading",
    "federation distributed report remote resuming training_round",
    "recipes splits build dry_run flower deploy_command flower_node",
    "cli",
]
FLOOR_OF = {name: number for number, names in enumerate(FLOORS) for name in names.split()}
# Beyond what the floors say: the server's mathematics knows nothing of training, nor a client's training of rounds.
NEVER = {
    "aggregate": "trainer evaluate attach cohort planner linear optimizer loss data transformers",
    "trainer": "aggregate federation checkpoint validate",
    "steps": "aggregate federation checkpoint validate",
    "ops": "transformers",
}
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


def test_import_loads_torch_and_nothing_of_ours():
    loaded = loaded_by("import flora_core")
    assert [name for name in loaded if name.startswith("flora_")] == ["flora_core"]
    assert not {name.split(".")[0] for name in loaded} & HEAVY


def test_torch_alone_is_enough_for_the_ops_and_the_bank():
    loaded = loaded_by(USE)
    assert "flora_core.ops" in loaded
    assert not {name.split(".")[0] for name in loaded} & HEAVY


def test_every_public_name_has_a_home_that_defines_it():
    import flora_core

    assert set(flora_core.__all__) == {*flora_core._HOME_OF, "ops"}
    assert set(flora_core._HOME_OF) <= set(dir(flora_core))
    for name, home in flora_core._HOME_OF.items():
        path = ROOT / "flora_core" / f"{home}.py"
        path = path if path.is_file() else ROOT / "flora_core" / home / "__init__.py"
        if path.is_file():
            tree = ast.parse(path.read_text())
            defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
            imported = {
                alias.asname or alias.name
                for node in tree.body
                if isinstance(node, ast.ImportFrom)
                for alias in node.names
            }
            assert name in defined | imported, f"{home} does not define {name}"


def test_a_function_wins_over_the_module_that_it_is_named_after():
    import flora_core

    for name, home in flora_core._HOME_OF.items():
        if name == home and importlib.util.find_spec(f"flora_core.{home}"):
            importlib.import_module(f"flora_core.{home}")
            assert callable(getattr(flora_core, name)), f"flora_core.{name} must stay a function"


def imports(tree: ast.AST, package: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of every import, at any depth but under TYPE_CHECKING."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) + 1 - node.level]] if node.level else []
            home = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{home}.{alias.name}") for alias in node.names)
        else:
            yield from imports(node, package)


def test_every_form_of_import_is_seen():
    code = "from .. import ops\nfrom ..bank import x\nfrom .pack import y\nimport a.b\ndef f():\n    from . import z\n"
    hidden = "if TYPE_CHECKING:\n    from ..trainer import T\n"
    found = [name for _, name in imports(ast.parse(code + hidden), ("flora_core", "data"))]
    assert found == [
        "flora_core.ops",
        "flora_core.adapters.bank.x",
        "flora_core.data.pack.y",
        "a.b",
        "flora_core.data.z",
    ]


@cache
def sources(folder: str) -> list[tuple[Path, tuple[str, ...], ast.Module]]:
    """Every file of a package with the package that it is in."""
    top = ROOT / folder
    return [
        (path, (top.name, *path.relative_to(top).parent.parts), ast.parse(path.read_text()))
        for path in sorted(top.rglob("*.py"))
    ]


def room(dotted: str) -> str | None:
    """The module or package of flora_core that a dotted name lies in."""
    parts = dotted.split(".")
    return parts[1] if parts[0] == "flora_core" and len(parts) > 1 else None


def edges() -> Iterator[tuple[str, str, str]]:
    """Every import of flora_core: where it stands, from which room, and the dotted name that is imported."""
    for path, package, tree in sources("flora_core"):
        relative = path.relative_to(ROOT / "flora_core")
        if relative != Path("__init__.py"):
            for line, name in imports(tree, package):
                yield f"{relative}:{line}", relative.parts[0].removesuffix(".py"), name


@cache
def below() -> dict[str, set[str]]:
    """The rooms that each room imports."""
    found: dict[str, set[str]] = {}
    for _, source, name in edges():
        target = room(name)
        if target is not None and target != source and target in rooms():
            found.setdefault(source, set()).add(target)
    return found


@cache
def rooms() -> set[str]:
    """The modules and packages of flora_core."""
    return {path.relative_to(ROOT / "flora_core").parts[0].removesuffix(".py") for path, _, _ in sources("flora_core")}


def test_every_room_has_one_floor():
    named = [name for names in FLOORS for name in names.split()]
    assert len(named) == len(set(named))
    assert set(named) == rooms() - {"__init__"}, set(named) ^ (rooms() - {"__init__"})


def test_imports_run_downward_only():
    up = [
        f"{where} imports {target}"
        for where, source, name in edges()
        if (target := room(name)) in rooms() and target and FLOOR_OF.get(target, 0) > FLOOR_OF.get(source, 0)
    ]
    assert not up, f"imports must go to the same floor or below: {up}"


def test_no_two_rooms_import_each_other():
    def reach(start: str) -> set[str]:
        seen, todo = set(), list(below().get(start, ()))
        while todo:
            if (here := todo.pop()) not in seen:
                seen.add(here)
                todo += below().get(here, ())
        return seen

    circles = sorted(name for name in below() if name in reach(name))
    assert not circles, f"these import one another in a circle: {circles}"


def test_the_guide_names_every_file_once():
    table = (ROOT / "docs" / "engine.md").read_text().partition("## Which file holds what")[2].partition("\n## ")[0]
    named = re.findall(r"`(\w+)/?`", table.partition("|---|")[2])
    assert len(named) == len(set(named)), "a file is named twice"
    assert set(named) == rooms() - {"__init__"}, set(named) ^ (rooms() - {"__init__"})


def test_rooms_keep_out_of_what_is_not_theirs():
    trespass = [
        f"{where} imports {name}"
        for where, source, name in edges()
        if (room(name) or name.split(".")[0]) in NEVER.get(source, "").split()
    ]
    assert not trespass


def test_kernels_never_import_the_engine():
    found = [
        f"{path.name}:{line} imports {name}"
        for path, package, tree in sources("kernels/flora_kernels")
        for line, name in imports(tree, package)
        if name.split(".")[0] == "flora_core"
    ]
    assert not found


def test_nobody_imports_the_library_that_is_called_kernels():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not [where for where, _, name in edges() if name.split(".")[0] == "kernels"]


def test_only_safe_formats_are_read():
    """Never a pickle: torch.load and its kin have no place in the engine."""
    unsafe = {"pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib"}
    assert not [where for where, _, name in edges() if name.split(".")[0] in unsafe]
    for path, _, tree in [*sources("flora_core"), *sources("kernels/flora_kernels")]:
        calls = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
        assert not {"torch.load", "torch.save", "yaml.unsafe_load", "yaml.full_load", "eval", "exec"} & set(calls), path
