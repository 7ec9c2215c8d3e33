"""The user's configuration: read strictly, written whole, and what it names reaches lmms-eval's index with no flag."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bitquake import cli, config
from bitquake.config import Config, ConfigError, load_config, save_config
from bitquake.plugin import add_tasks
from bitquake.tasks import expand, families

FAMILY = """
family: {name}
dataset: {path: someone/mine}
splits: {test: test, threshold: val}
columns: {answers: answers}
protocol: vqa
variants: {noise: {names: [fog], severities: [3]}}
"""


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)
    cache = tmp_path_factory.getbasetemp() / "config-cache"
    monkeypatch.setattr(expand, "cache_root", lambda: cache)
    # Two of the built-in families: all of them would only take longer.
    built_in = tmp_path / "built_in"
    for name in ("block_vqav2", "vqav2"):
        text = (families.BUILT_IN / name / "family.yaml").read_text()
        family(built_in, name, text)
    monkeypatch.setattr(families, "BUILT_IN", built_in)


def family(folder: Path, name: str, text: str = FAMILY) -> Path:
    (folder / name).mkdir(parents=True)
    (folder / name / "family.yaml").write_text(text.replace("{name}", name))
    return folder


def test_no_file_is_the_default() -> None:
    found = load_config()
    assert found == Config(file=config.config_file())
    assert not found.families and not found.split_ids


def test_written_and_read_again(tmp_path: Path) -> None:
    wanted = Config(file=config.config_file(), families=(tmp_path / "a b",), split_ids={"vqav2": tmp_path / "ü.json"})
    save_config(wanted)
    assert load_config() == wanted
    assert [path.name for path in config.config_file().parent.iterdir()] == ["config.yaml"]  # nothing left behind


def test_relative_paths_count_from_the_configuration(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("families: [mine, ~/other]\nsplit_ids: {vqav2: lists/paper.json}\n")
    found = load_config(file)
    assert found.families == (tmp_path / "mine", Path.home() / "other")
    assert found.split_ids == {"vqav2": tmp_path / "lists" / "paper.json"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("families: [", r"config.yaml:1: not plain YAML"),
        ("families: !!python/name:os.system x\n", "config.yaml:1: not plain YAML: tags"),
        ("families: mine\n", "config.yaml:1: families: .*got 'mine'"),
        ("split_ids:\n  vqav2: 3\n", "config.yaml:2: split_ids.vqav2: .*got '3'"),
        ("\nfamilies: []\nfamilys: []\n", "config.yaml:3: familys: unknown key; known: families, split_ids"),
        ("file: x\n", "expected the keys `families` and `split_ids`"),
        ("- a\n", "expected the keys"),
    ],
)
def test_what_is_not_valid_is_refused_with_its_line(text: str, message: str) -> None:
    config.config_file().parent.mkdir(parents=True)
    config.config_file().write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config()
    with pytest.raises(ConfigError, match=message):  # never evaluated on other rows than the user set
        add_tasks({})


def test_a_failed_write_leaves_the_old_file(monkeypatch: pytest.MonkeyPatch) -> None:
    save_config(Config(file=config.config_file(), families=(Path("/before"),)))

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(ConfigError, match=r"cannot be written \(No space left"):
        save_config(Config(file=config.config_file()))
    assert load_config().families == (Path("/before"),)
    assert [path.name for path in config.config_file().parent.iterdir()] == ["config.yaml"]


def test_configured_families_are_registered_and_broken_ones_hide_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    folder = family(tmp_path / "families", "mine")
    family(folder, "broken", "family: [")
    family(folder, "vqav2")
    assert cli.main(["config", "set", "families", "families"]) == 0
    said = capsys.readouterr()
    assert str(folder) in said.out
    assert f"left out: {folder}/broken/family.yaml:1" in said.err and f"{folder}/vqav2/family.yaml:2" in said.err
    index = add_tasks({})
    assert {"mine_clean", "mine_fog_3", "vqav2_clean", "block_vqav2_clean"} <= index.keys()
    assert index["mine_noise"]["task"] == ["mine_fog_3"]
    base = Path(index["vqav2_clean"]["yaml_path"]).with_name("_base_yaml").read_text()
    assert "lmms-lab-encoder/VQAv2" in base and "someone/mine" not in base
    warned = [str(warning.message) for warning in recwarn.list if "left out" in str(warning.message)]
    assert any(f"{folder}/broken/family.yaml:1: not plain YAML" in text for text in warned)
    assert any(
        f"{folder}/vqav2/family.yaml:2: family: the name 'vqav2' is a built-in family's" in text for text in warned
    )
    for name in ("broken", "vqav2"):
        (folder / name / "family.yaml").unlink()
    (folder / "mine" / "family.yaml").unlink()
    index = add_tasks({})  # a folder without families any more is named, with the way out
    assert "mine_clean" not in index and "block_vqav2_clean" in index
    assert any(f"bitquake config unset families {folder}" in str(warning.message) for warning in recwarn.list)


def test_set_and_unset_by_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = family(tmp_path / "one", "first"), family(tmp_path / "two", "second")
    lists = tmp_path / "paper.json"
    lists.write_text(json.dumps({"test": [1], "threshold": [2]}))
    assert cli.main(["config", "show"]) == 0
    assert "nothing is set" in capsys.readouterr().out
    assert cli.main(["config", "set", "families", "one", "two"]) == 0
    assert cli.main(["config", "set", "split_ids", "first", "paper.json"]) == 0
    assert load_config().families == (one, two)
    assert load_config().split_ids == {"first": lists}
    assert cli.main(["config", "path"]) == 0
    assert str(config.config_file()) in capsys.readouterr().out
    assert cli.main(["config", "unset", "families", "two"]) == 0
    assert load_config().families == (one,)
    assert cli.main(["config", "unset", "split_ids", "first"]) == 0
    assert cli.main(["config", "unset", "families"]) == 0
    assert load_config() == Config(file=config.config_file())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["set", "families", "nowhere"], "nowhere: is no folder"),
        (["set", "families", "."], "holds no family.yaml"),
        (["set", "split_ids", "vqav2"], "expected a family and a file"),
        (["set", "split_ids", "vqa2", "x.json"], "there is no family 'vqa2'; there are "),
        (["set", "split_ids", "vqav2", "x.json"], "x.json: cannot be read"),
        (["unset", "families", "nowhere"], "'nowhere' is not set; set are: none"),
        (["unset", "split_ids", "vqav2"], "'vqav2' is not set"),
    ],
)
def test_what_cannot_be_set_is_not_written(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", *arguments]) == 2
    assert said in capsys.readouterr().err
    assert not config.config_file().exists()
