"""The command line as a user meets it: wrong arguments, unknown names, and the commands that need no model."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from bitquake import __version__, cli
from bitquake.noise import SampleKey, apply, image_noises, text_noises
from bitquake.tasks import catalog
from bitquake.tasks.strict_yaml import load_task_yaml


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "bitquake", *arguments], capture_output=True, text=True, check=False)


def test_help_and_version_are_light() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "bitquake", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == f"bitquake {__version__}"
    assert "torch" not in done.stderr and "jinja2" not in done.stderr and "numpy" not in done.stderr


@pytest.mark.parametrize(
    "arguments", [(), ("report",), ("report", "runs"), ("tasks",), ("quants", "show"), ("frobnicate",)]
)
def test_wrong_usage_ends_with_code_2_and_says_what_is_missing(arguments: tuple[str, ...]) -> None:
    done = _run(*arguments)
    assert done.returncode == 2
    assert "usage:" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("quants", "show", "rtn-int5-g64"), "did you mean"),
        (("report", "no/such/folder", "--out", "x"), "no/such/folder"),
        (("tasks", "validate", "no/such.yaml"), "no/such.yaml"),
        (("tasks", "list", "--families", "no/such"), "no/such: is no folder"),
        (("tasks", "path", "--families", "."), "holds no family.yaml"),
        (("tasks", "show", "block_vqav2_fgo_3"), "did you mean block_vqav2_fog_3"),
        (("tasks", "show", "--yaml", "nothing_like_it"), "there is no family and no task 'nothing_like_it'"),
        (("tasks", "new", "Bad Name"), "'Bad Name' cannot be a family's name"),
        (("tasks", "new", "mine", "--protocol", "essay"), "unknown protocol 'essay'"),
        (("tasks", "check", "no/such.yaml"), "no/such.yaml: cannot be read"),
        (("tasks", "check", "no/such.yaml", "--samples", "-1"), "--samples: give 0 or more, got -1"),
        (("config", "set", "families", "no/such"), "no/such: is no folder"),
        (("config", "set", "families"), "expected folders"),
        (("report", ".", "--out", "x"), "no complete result"),
        (("report", ".", "--out", "x", "--replicates", "0"), "replicates must be at least 1, got 0"),
        (("noise", "show", "gausian_noise"), "Did you mean 'gaussian_noise'"),
        (("noise", "sheet", "no/such.png"), "no/such.png"),
        (("noise", "sheet", "."), ".: Is a directory"),
        (("noise", "apply", "no/such.png", "fog", "--severity", "1", "--out", "x.png"), "no/such.png"),
        (("demo", "--limit", "0"), "--limit"),
        (("demo", "--limit", "99999"), "2000"),
        (("train-reference", "x", "--set", "rat=1"), "unknown key 'rat'"),
        (("train-reference", "x", "--set", "rate=fast"), "expected a float, got 'fast'"),
    ],
)
def test_bad_input_gets_one_clear_line(
    arguments: tuple[str, ...],
    said: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    code = cli.main(arguments)
    captured = capsys.readouterr()
    assert code in (1, 2)
    assert said in captured.err + captured.out
    assert "Traceback" not in captured.err


def test_quants_list_names_every_bit_width(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["quants", "list"]) == 0
    listed = capsys.readouterr().out
    assert all(f"{method}-int{bits}-g64" in listed for method in ("rtn", "hqq") for bits in (8, 4, 3, 2))


def test_tasks_path_holds_the_expanded_yaml(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tasks", "path"]) == 0
    folder = Path(capsys.readouterr().out.strip())
    assert list(folder.rglob("block_vqav2_gaussian_noise_3.yaml"))


def test_tasks_show_a_family_a_task_and_their_yaml(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tasks", "show", "vqav2"]) == 0
    said = capsys.readouterr().out
    for text in (
        "lmms-lab-encoder/VQAv2",
        "Answer the question using a single word",
        "5000 questions",
        "vqav2_noise_3",
    ):
        assert text in said
    assert "validation, pictures with hash in [0.4, 0.5)" in said
    assert cli.main(["tasks", "show", "vqav2_fog_3"]) == 0
    said = capsys.readouterr().out
    assert "name fog, severity 3, seed 0" in said and "5000 questions" in said
    assert cli.main(["tasks", "show", "vqav2_noise_3"]) == 0
    tag = capsys.readouterr().out
    assert "15 tasks" in tag and "vqav2_fog_3" in tag and "vqav2_low_light_3" not in tag
    assert cli.main(["tasks", "show", "vqav2_fog_3_full"]) == 0
    assert "5000" not in capsys.readouterr().out
    assert cli.main(["tasks", "show", "vqav2_fog_3", "--yaml"]) == 0
    written, base = capsys.readouterr().out.split("---\n")
    assert load_task_yaml(written)["task"] == "vqav2_fog_3"
    assert load_task_yaml(base)["dataset_path"] == "lmms-lab-encoder/VQAv2"


def test_tasks_list_names_families_and_with_all_every_task(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tasks", "list"]) == 0
    families = capsys.readouterr().out
    assert "block_refcocoplus" in families and "block_refcocoplus_fog_3" not in families
    assert cli.main(["tasks", "list", "--all"]) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("block_refcocoplus_fog_3 ")]
    assert "block_refcocoplus_noise_3" in line


def test_a_new_family_from_new_to_export(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["tasks", "new", "mine", "--protocol", "choice"]) == 0
    assert "mine/family.yaml" in capsys.readouterr().out
    assert cli.main(["tasks", "validate", "mine"]) == 0
    assert capsys.readouterr().out == "mine: valid\n"
    # Nobody has its data: the check says so, and what it did check.
    assert cli.main(["tasks", "check", "mine/family.yaml"]) == 0
    said = capsys.readouterr().out
    assert "Not tried on samples: the dataset 'someone/mine' is not in this machine's cache" in said
    assert cli.main(["tasks", "export", "out", "--families", "mine"]) == 0
    assert "tasks written to out" in capsys.readouterr().out
    exported = tmp_path / "out" / "mine" / "mine_fog_3.yaml"
    assert cli.main(["tasks", "check", str(exported)]) == 0
    # A model-named key in a task file would switch the noise off for that model.
    lines = exported.read_text().splitlines()
    place = lines.index("  default:")
    exported.write_text("\n".join([*lines[:place], "  qwen2_vl:", "    pre_prompt: ''", *lines[place:]]))
    assert cli.main(["tasks", "check", str(exported)]) == 1
    said = capsys.readouterr().out
    assert f"{exported}:{place + 1}: lmms_eval_specific_kwargs.qwen2_vl: the model 'qwen2_vl' gets this mapping" in said
    (tmp_path / "out" / "mine" / "other.yaml").write_text("task: other\n")
    assert cli.main(["tasks", "check", "out/mine/other.yaml"]) == 1
    assert "no task file of bitquake" in capsys.readouterr().out


def test_an_unknown_noise_and_severity_6_are_named_and_hide_no_other_family(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "family.yaml").write_text(
        "family: mine\nworld: real\ndataset: {path: someone/data}\nsplits: {test: test, threshold: val}\n"
        "columns: {answers: answers}\nprotocol: vqa\nvariants: {noise: {names: [rain, fog], severities: [1, 6]}}\n"
    )
    for arguments in (
        ["validate", str(tmp_path / "mine")],
        *([a, "--families", str(tmp_path)] for a in ("list", "path")),
    ):
        assert cli.main(["tasks", *arguments]) == 1
        captured = capsys.readouterr()
        said = captured.err + captured.out
        assert "unknown noise 'rain'" in said
        assert "noises have severities 1 to 5 (integers), not 6" in said
        if arguments[0] == "list":
            assert "block_vqav2" in captured.out
        if arguments[0] == "path":  # what a shell puts behind --include_path
            assert list(Path(captured.out.strip()).rglob("block_vqav2_fog_1.yaml"))


def test_a_closed_pipe_is_no_error() -> None:
    done = subprocess.run(
        f"{sys.executable} -m bitquake tasks list | true", shell=True, capture_output=True, text=True, check=False
    )
    assert "Traceback" not in done.stderr and "Errno" not in done.stderr


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    file = tmp_path / "photo.png"
    Image.linear_gradient("L").resize((60, 40)).convert("RGB").save(file)
    return file


def test_noise_list_and_show_name_every_noise(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["noise", "list"]) == 0
    listed = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert {name: (int(number), group) for name, number, _, group, *_ in listed} == {
        noise.name: (noise.id, noise.group) for noise in [*image_noises().values(), *text_noises().values()]
    }
    for name, parts in (("fog", ("id 4", "imagenet_c", "decay", "ImageNet-C")), ("spoken", ("text", "0.7", "filler"))):
        assert cli.main(["noise", "show", name]) == 0
        shown = capsys.readouterr().out
        assert all(part in shown for part in (name, "severity", *parts))


def test_noise_apply_writes_what_the_library_computes(photo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = photo.with_name("out.png")
    arguments = ["noise", "apply", str(photo), "fog", "--severity", "4", "--out", str(out)]
    for extra, key, seed in (([], "photo.png", 0), (["--key", "7", "--seed", "2"], "7", 2)):
        assert cli.main([*arguments, *extra]) == 0 and capsys.readouterr().out.strip() == str(out)
        expected = apply(Image.open(photo), "fog", severity=4, key=SampleKey("", "", key), seed=seed)
        assert Image.open(out).tobytes() == expected.tobytes()


def test_noise_sheet_shows_the_noises_asked_for(photo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = []
    for extra in ([], ["--noises", "camera"], ["--noises", "fog", "--severities", "all", "--width", "700"]):
        out = photo.with_name("sheet.png")
        assert cli.main(["noise", "sheet", str(photo), "--out", str(out), *extra]) == 0
        assert capsys.readouterr().out.strip() == str(out)
        sizes.append(Image.open(out).size)
    assert sizes[0][0] == sizes[1][0] == 1280 and sizes[2][0] == 700
    assert sizes[0][1] > sizes[1][1] > sizes[2][1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sheet", "PHOTO", "--severities", "6"], "expected numbers from 1 to 5, or all, got '6'"),
        (["sheet", "PHOTO", "--noises", "fogg"], "Did you mean 'fog'"),
        (["sheet", "PHOTO", "--width", "10"], "at least 480"),
        (["sheet", "PHOTO", "--out", "sheet.xyz"], "cannot write .xyz"),
        (["sheet", "TEXT"], "no image Pillow can open"),
        (["apply", "PHOTO", "spoken", "--severity", "1", "--out", "x.png"], "spoken is a text noise"),
        (["apply", "PHOTO", "fog", "--severity", "9", "--out", "x.png"], "severities 1 to 5"),
        (["apply", "TEXT", "fog", "--severity", "1", "--out", "x.png"], "words.txt"),
    ],
)
def test_noise_mistakes_end_with_code_2(
    arguments: list[str], said: str, photo: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(photo.parent)
    words = photo.with_name("words.txt")
    words.write_text("no image at all")
    places = {"PHOTO": str(photo), "TEXT": str(words)}
    assert cli.main(["noise", *(places.get(argument, argument) for argument in arguments)]) == 2
    captured = capsys.readouterr()
    assert said in captured.err and not captured.out
    assert {file.name for file in photo.parent.iterdir()} == {"photo.png", "words.txt"}


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "README.md"])
def test_what_the_pages_show_is_true(page: str, tmp_path: Path) -> None:
    """Every family file on the page is valid, and every `bitquake` command on it is one that the parser knows."""
    text = (Path(__file__).parents[2] / page).read_text(encoding="utf-8")
    families = re.findall(r"```yaml\n(family: .*?)```", text, re.DOTALL)
    assert families or page == "README.md"
    for family in families:
        (tmp_path / "family.yaml").write_text(family, encoding="utf-8")
        assert catalog.validate(tmp_path) == []
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL))
    commands = [line.split("#")[0].split() for line in blocks.splitlines() if line.startswith("bitquake ")]
    assert commands
    for command in commands:
        cli._parser().parse_args(command[1:])
