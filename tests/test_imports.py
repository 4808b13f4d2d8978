"""Dependencies point one way, and the library works without the cluster's packages.

All import statements are read from the source, including those inside functions and under
TYPE_CHECKING. So the check needs no package installed and runs no code.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("ptuning", "pipelines", "serve")
FACADES = ("ptuning",)  # a facade: it imports each public name on first use
# Third-party packages that only a few modules may import.
CONFINED = {
    "deepspeed": ("ptuning.train.zero",),
    "mlflow": ("ptuning.registry.mlflow",),
    "ray": ("pipelines", "serve"),
    "peft": (),
}
# Each module of ptuning has the tier of its longest prefix here. Imports never point upwards.
TIERS = {
    "ptuning.types": 0,
    "ptuning.errors": 0,
    "ptuning.system": 0,
    "ptuning.data": 1,
    "ptuning.methods": 1,
    "ptuning.model": 1,
    "ptuning.prefix": 1,
    "ptuning.prefix.peft_format": 2,
    "ptuning.store": 1,
    "ptuning.conditional": 1,
    "ptuning.champions": 2,
    "ptuning.store_identity": 1,
    "ptuning.gate": 1,
    "ptuning.train": 2,
    "ptuning.scoring": 2,
    "ptuning.generation": 2,
    "ptuning.registry": 2,
    "ptuning.identity": 2,
    "ptuning.pack": 2,
    "ptuning.tuning": 2,
}


@dataclass(frozen=True)
class Import:
    """One imported name: the importing module, the target and the line."""

    source: str
    target: str
    line: int
    typing_only: bool = False  # under `if TYPE_CHECKING`: not imported at run time

    def __str__(self) -> str:
        return f"{self.source}:{self.line} imports {self.target}"


@cache
def modules() -> dict[str, Path]:
    found = {}
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports_of(name: str, source: str, *, is_package: bool = False) -> list[Import]:
    """Every import of a module, as full dotted names; `from a import b` is `a.b`."""
    tree = ast.parse(source)
    guarded = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    return [
        Import(name, target, node.lineno, node in guarded)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom, ast.Call))
        for target in _targets(node, name, is_package)
    ]


def _targets(
    node: ast.Import | ast.ImportFrom | ast.Call, name: str, is_package: bool
) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            parts = name.split(".")
            above = parts[: len(parts) - node.level + (1 if is_package else 0)]
            base = ".".join([*above, *([base] if base else [])])
        return [f"{base}.{alias.name}" for alias in node.names]
    if _called(node) in ("import_module", "__import__") and node.args:
        argument = node.args[0]
        if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
            return [argument.value]
    return []


def _called(node: ast.Call) -> str:
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


@cache
def all_imports() -> tuple[Import, ...]:
    return tuple(
        one
        for name, file in modules().items()
        for one in imports_of(
            name, file.read_text(encoding="utf-8"), is_package=file.name == "__init__.py"
        )
    )


def module_of(target: str) -> str | None:
    """The module of ours that an imported name is or belongs to."""
    while target not in modules():
        target, dot, _ = target.rpartition(".")
        if not dot:
            return None
    return target


def lies_in(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def tier(module: str) -> int | None:
    parts = module.split(".")
    for length in range(len(parts), 1, -1):
        found = TIERS.get(".".join(parts[:length]))
        if found is not None:
            return found
    return None


def test_the_reader_of_imports_sees_every_kind() -> None:
    source = textwrap.dedent("""
        import ray
        import a.b as c, mlflow.tracking
        from ray import serve
        from . import near
        from ..up import thing
        if TYPE_CHECKING:
            import deepspeed
        def f():
            import peft.utils
            importlib.import_module("ray.train")
            __import__("mlflow")
    """)
    found = imports_of("pkg.sub.mod", source)
    assert [one.target for one in found if one.typing_only] == ["deepspeed"]
    targets = {one.target for one in found}
    assert targets == {
        "ray",
        "a.b",
        "mlflow.tracking",
        "ray.serve",
        "pkg.sub.near",
        "pkg.up.thing",
        "deepspeed",
        "peft.utils",
        "ray.train",
        "mlflow",
    }


def test_heavy_packages_are_imported_only_where_they_belong() -> None:
    wrong = [
        one
        for one in all_imports()
        for package, homes in CONFINED.items()
        if lies_in(one.target, package) and not lies_in(one.source, *homes)
    ]
    assert not wrong, "\n".join(map(str, wrong))


def test_the_library_knows_neither_the_pipelines_nor_the_service() -> None:
    wrong = [
        one
        for one in all_imports()
        if lies_in(one.source, "ptuning") and lies_in(one.target, "pipelines", "serve")
    ]
    assert not wrong, "\n".join(map(str, wrong))


def test_the_service_imports_no_training_no_packing_and_no_pipeline() -> None:
    forbidden = ("ptuning.train", "ptuning.data.packing", "pipelines")
    direct = [
        one
        for one in all_imports()
        if lies_in(one.source, "serve") and lies_in(one.target, *forbidden)
    ]
    assert not direct, "\n".join(map(str, direct))


def test_one_module_of_the_pipelines_knows_the_service() -> None:
    wrong = [
        one
        for one in all_imports()
        if lies_in(one.source, "pipelines")
        and lies_in(one.target, "serve")
        and one.source != "pipelines.service"
    ]
    assert not wrong, "\n".join(map(str, wrong))


def test_nobody_lets_ray_serve_shadow_our_serve() -> None:
    wrong = []
    for name, file in modules().items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == "ray":
                names = [alias for alias in node.names if alias.name == "serve"]
                wrong += [f"{name}:{node.lineno}" for _ in names]
            if isinstance(node, ast.Import):
                wrong += [
                    f"{name}:{node.lineno}"
                    for alias in node.names
                    if alias.name == "ray.serve" and alias.asname == "serve"
                ]
    assert not wrong, f"write `import ray.serve` in {wrong}"


def test_every_module_of_the_library_has_a_tier() -> None:
    library = [name for name in modules() if lies_in(name, "ptuning") and name not in FACADES]
    assert [name for name in library if tier(name) is None] == []
    gone = [name for name in TIERS if name not in modules()]
    assert gone == []


def test_imports_inside_the_library_never_point_to_a_higher_tier() -> None:
    wrong = []
    for one in all_imports():
        target = module_of(one.target)
        if not lies_in(one.source, "ptuning") or one.source in FACADES or target is None:
            continue
        if target in FACADES:
            wrong.append(f"{one} (the facade: import from the module itself)")
        elif (tier(target) or 0) > (tier(one.source) or 0):
            wrong.append(f"{one} (tier {tier(one.source)} -> {tier(target)})")
    assert not wrong, "\n".join(wrong)


def test_no_module_shares_its_name_with_what_it_defines() -> None:
    """`from package import name` must be unambiguous."""
    shared = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for top in ("ptuning", "pipelines", "serve", "infra")
        for path in sorted((ROOT / top).rglob("*.py"))
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        and node.name == path.stem
    ]
    assert shared == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    check_no_circle(one for one in all_imports() if not one.typing_only)


def test_modules_of_the_pipelines_know_each_other_one_way_even_for_types() -> None:
    check_no_circle(one for one in all_imports() if lies_in(one.source, "pipelines"))


def check_no_circle(imports: Iterable[Import]) -> None:
    graph: dict[str, set[str]] = {name: set() for name in modules()}
    for one in imports:
        target = module_of(one.target)
        if target is not None and target != one.source and one.source not in FACADES:
            graph[one.source].add(target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


_BLOCKED_SCRIPT = """
import importlib.abc
import sys

BLOCKED = {"ray", "mlflow", "deepspeed", "peft", "pyarrow", "fastapi", "pipelines", "serve"}


class Without(importlib.abc.MetaPathFinder):
    # Finds what is installed, less what is blocked.

    def __init__(self, finders):
        self.finders = finders

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            return None
        found = (finder.find_spec(name, path, target) for finder in self.finders)
        return next((spec for spec in found if spec is not None), None)

    def find_distributions(self, *context):
        for finder in self.finders:
            yield from getattr(finder, "find_distributions", lambda *_: ())(*context)


sys.meta_path[:] = [Without(list(sys.meta_path))]
try:
    import ray
except ImportError:
    pass
else:
    raise AssertionError("nothing is blocked")

import ptuning

assert "torch" not in sys.modules, "import ptuning is no longer instant"
import torch

torch.set_num_threads(1)
backbone = ptuning.load_backbone(sys.argv[1], dtype="float32", device="cpu")
rows = [ptuning.Example(prompt=f"q {n}", completion=" tea") for n in range(9)]
result = ptuning.tune(
    backbone,
    {"alice": rows, "bob": rows[:1]},
    method=ptuning.PrefixTuning(num_virtual_tokens=2),
    train=ptuning.TrainConfig(epochs=1),
)
assert [one.status for one in result.values()] == ["trained", "too_few"], result
prefix = result["alice"].prefix
texts = ptuning.generate(backbone, ["q 1", "q 2"], [prefix, None], max_new_tokens=2)
ptuning.save_peft(prefix, sys.argv[2], backbone)
again = ptuning.load_peft(sys.argv[2], backbone)
assert again.digest == prefix.digest
import ptuning.store

assert not {name.split(".")[0] for name in sys.modules} & BLOCKED
print("done", len(texts))
"""


def test_training_and_generating_work_without_ray_mlflow_deepspeed_and_peft(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _BLOCKED_SCRIPT, str(tiny_model_dir), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.split() == ["done", "2"]


def test_configuration_loads_without_transformers() -> None:
    """Importing Transformers takes seconds, which help and errors in settings must not wait for."""
    script = "import sys, pipelines.config; sys.exit('transformers' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", script], timeout=120, check=False, cwd=ROOT, env=environment
    )
    assert run.returncode == 0
