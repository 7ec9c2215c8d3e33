"""The package as a user gets it: what imports what, what the wheel holds, what the type checker sees."""

from __future__ import annotations

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("noise", "metrics", "tasks", "model_wrappers", "reports", "leaderboard", "suites")
LIGHT = ("bitquake.noise", "bitquake.metrics", "bitquake.tasks.scoring", "bitquake.reports", "bitquake.leaderboard")


@pytest.mark.parametrize("module", [*LIGHT, "bitquake.cli", "bitquake.plugin"])
def test_light_rooms_import_neither_torch_nor_lmms_eval(module: str) -> None:
    code = (
        f"import sys, pkgutil, importlib; package = importlib.import_module({module!r})\n"
        "for info in pkgutil.walk_packages(getattr(package, '__path__', []), package.__name__ + '.'):\n"
        "    importlib.import_module(info.name)\n"
        "seen = {name.split('.')[0] for name in sys.modules}\n"
        "heavy = sorted(seen & {'torch', 'lmms_eval', 'transformers', 'datasets'})\n"
        "sys.exit(f'imports {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    # A copy of what git tracks or would track, so that a stale build folder cannot help.
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\n")
    for name in filter(None, files):
        path = ROOT / name
        if path.is_file() and not name.startswith("typings/"):
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    return built


def test_wheel_holds_every_module_and_data_file(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    missing = []
    for room in ("bitquake", *ROOMS):
        for path in (ROOT / room).rglob("*"):
            if not path.is_file() or "__pycache__" in path.parts or path.suffix in {".pyc", ".md"}:
                continue
            if room == "leaderboard" and "submissions" in path.parts:
                continue
            inside = path.relative_to(ROOT).as_posix()
            inside = inside if room == "bitquake" else f"bitquake/{inside}"
            if inside not in held:
                missing.append(inside)
    assert not missing
    assert not [name for name in held if name.startswith(("tests/", "benchmarks/"))]


def test_wheel_works_in_a_clean_environment(wheel: Path, tmp_path: Path) -> None:
    """Installed by pip without its dependencies, the wheel finds its YAML and templates (through this environment's
    light libraries, which a .pth file lends it)."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    install = [str(python), "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", str(wheel)]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    import jinja2

    (site / "lent.pth").write_text(str(Path(jinja2.__file__).parents[1]) + "\n")
    code = (
        "import bitquake, sys; from pathlib import Path\n"
        f"assert Path(bitquake.__file__).is_relative_to({str(site)!r}), bitquake.__file__\n"
        "from bitquake.tasks.families import load_families\n"
        "found, problems = load_families(); assert not problems, problems\n"
        "assert {'block_vqav2', 'block_refcocoplus'} <= {one.family.family for one in found}\n"
        "from bitquake.model_wrappers.quantizers import list_specs; assert 'rtn-int4-g64' in list_specs()\n"
        "from bitquake.model_wrappers.checkpoints import names; assert names(), 'no checkpoint'\n"
        "import bitquake.reports as reports; root = Path(reports.__file__).parent\n"
        "assert list(root.glob('templates/*.html*')), 'no templates'\n"
        "from bitquake.tasks.world.build import data_file; assert data_file('block_vqav2', 'test').is_file()\n"
        "assert 'torch' not in sys.modules\n"
        "from importlib.metadata import entry_points\n"
        "[ours] = [e for e in entry_points(group='lmms_eval.models', name='bitquake')"
        " if Path(e.dist.locate_file('')).samefile(sys.argv[1])]\n"
        "assert ours.load().__module__ == 'bitquake.plugin'\n"
    )
    command = [str(python), "-I", "-c", code, str(site)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    script = [str(tmp_path / "venv" / "bin" / "bitquake"), "quants", "list"]
    done = subprocess.run(script, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0 and "rtn-int4-g64" in done.stdout, done.stderr


def test_every_package_folder_is_listed() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    for room in ("bitquake", *ROOMS):
        for init in (ROOT / room).rglob("__init__.py"):
            name = ".".join(init.parent.relative_to(ROOT).parts)
            name = name if room == "bitquake" else f"bitquake.{name}"
            assert f'"{name}"' in text, f"{name} is missing from [tool.setuptools] packages in pyproject.toml"


def test_typings_link_every_module_of_the_front_door() -> None:
    linked = {path.name for path in (ROOT / "typings" / "bitquake").iterdir()}
    front = ROOT / "bitquake"
    packages = {path.parent.name for path in front.glob("*/__init__.py")}
    expected = {path.name for path in front.glob("*.py")} | packages | set(ROOMS) | {"py.typed"}
    assert linked == expected, "typings/bitquake must hold one link per module and package of bitquake/ and per room"


def test_type_checker_catches_a_wrong_argument_across_rooms(tmp_path: Path) -> None:
    script = tmp_path / "wrong.py"
    script.write_text(
        "from bitquake.noise import SampleKey\nfrom bitquake.records import SampleRecord\n"
        "SampleKey('vqav2', 'test', 17)\n"
        "SampleRecord(family=3)\n"
    )
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--config-file",
        str(ROOT / "pyproject.toml"),
        "--no-incremental",
        str(script),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert 'Argument 3 to "SampleKey" has incompatible type "int"; expected "str"' in done.stdout, done.stdout
    assert 'Argument "family" to "SampleRecord" has incompatible type "int"' in done.stdout, done.stdout


def test_no_file_names_a_machine_or_a_registry() -> None:
    import re

    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    forbidden = re.compile(r"(?<![\w.])/(?:work|root)/|(?:pypi|pythonhosted|npmjs)\.org")
    found = []
    for name in filter(None, names):
        path = ROOT / name
        text = path.suffix in {".py", ".md", ".toml", ".yaml", ".json", ".html", ".css"} and path.is_file()
        if text and path != Path(__file__) and forbidden.search(path.read_text(encoding="utf-8")):
            found.append(name)
    assert not found
