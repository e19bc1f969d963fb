import runpy
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from pipelines.cli.config import OutputPath, dump, help_text, load, parse, settings
from pipelines.recaption.config import RecaptionConfig
from vlv_model.config import Config
from vlv_model.errors import ConfigError


class Inner(Config):
    learning_rate: float = Field(1e-3, gt=0, description="how fast")
    schedule: Literal["cosine", "linear"] = Field("cosine", description="how it falls")
    steps: int | None = Field(None, ge=1, description="how long")

    removed: ClassVar[Mapping[str, str]] = {"patience": "half of train.steps decides"}


class Outer(Config):
    run_dir: OutputPath = Field(description="where")
    name: str | None = Field(None, description="what it is called")
    words: dict[str, int] = Field({}, description="how often")
    train: Inner = Inner()


def test_order_is_defaults_then_yaml_then_command_line(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("run_dir: /a\ntrain: {learning_rate: 3e-4, steps: 7}\n")
    config = load(Outer, str(file), ["train.steps=9"])
    assert config.train == Inner(learning_rate=3e-4, steps=9)
    assert config.run_dir == "/a"


def test_a_removed_setting_is_ignored_with_a_line_that_says_what_decides(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files that earlier versions printed with --print-config still open."""
    file = tmp_path / "c.yaml"
    file.write_text("run_dir: /a\ntrain:\n  steps: 7\n  patience: 2\n")
    config = load(Outer, str(file), ["train.patience=3"])
    assert config == Outer(run_dir="/a", train=Inner(steps=7))
    gone = "warning: setting 'train.patience' is gone{}: half of train.steps decides"
    in_file = gone.format(f" (--config {file} line 4)")
    assert capsys.readouterr().err.splitlines() == [in_file, gone.format("")]
    assert "patience" not in help_text(Outer, "", "")
    with pytest.raises(ConfigError, match=r"unknown setting 'patience'"):
        load(Outer, None, ["run_dir=/a", "patience=3"])


def test_config_is_frozen() -> None:
    config = load(Outer, None, ["run_dir=/a"])
    with pytest.raises(ValueError, match="frozen"):
        config.train.steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.lerning_rate=1", ["train.lerning_rate", "train.learning_rate"]),
        ("learning_rate=1", ["learning_rate", "train.learning_rate"]),
        ("trian.steps=1", ["trian", "train.steps"]),
        ("train.learning_rate=fast", ["train.learning_rate", "fast"]),
        ("train.learning_rate=-1", ["train.learning_rate", "-1", "greater than 0"]),
        ("train.schedule=step", ["train.schedule", "cosine", "linear"]),
        ("train=5", ["train"]),
        ("train.steps", ["train.steps", "key=value"]),
        ("train.steps=2020-99-99", ["train.steps"]),
        ("train.steps=!!int ''", ["train.steps"]),
        ("train.learning_rate=.inf", ["train.learning_rate"]),
        ("train.steps=true", ["train.steps"]),
        ("run_dir.x=1", ["run_dir"]),
    ],
)
def test_bad_setting_is_a_one_line_error_that_names_it(override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load(Outer, None, ["run_dir=/a", override])
    line = str(error.value)
    assert "\n" not in line
    assert all(word in line for word in words), line


def test_missing_setting_is_named() -> None:
    with pytest.raises(ConfigError, match=r"'run_dir' is required"):
        load(Outer, None, [])


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1\n", "\0", "just words"])
def test_unreadable_yaml_is_a_one_line_error(tmp_path: Path, text: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        load(Outer, str(file), [])
    assert "\n" not in str(error.value)
    assert str(file) in str(error.value)


def write_config(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "c.yaml"
    file.write_text(f"run_dir: /a\n{text}")
    return file


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("train: {steps: 1}\nname: x\ntrain: {schedule: linear}\n", "'train' .*lines 2 and 4"),
        ("train:\n  steps: 1\n  steps: 1\n", "'train.steps' .*lines 3 and 4"),
        ("train.steps: 1\ntrain:\n  steps: 2\n", "'train.steps' .*lines 2 and 4"),
        ("words: {a: 1, a: 2}\n", "'words.a' .*lines 2 and 2"),
        ("train:\n  steps: many\n", r"train.steps='many': .* \(--config .* line 3\)$"),
        ("train:\n\n  stpes: 1\n", r"unknown setting 'train.stpes': .* \(--config .* line 4\)$"),
        ("trian.steps: 1\n", r"unknown setting 'trian.steps': .*line 2\)$"),
        ("train: 5\ntrain.steps: 1\n", r"'train' is a single value, .*line 3\)$"),
        ("train:\n  steps:\n  schedule:\n", r"train.schedule=None: .*line 4\)$"),
    ],
)
def test_nothing_in_a_file_is_ignored(tmp_path: Path, text: str, line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        load(Outer, str(write_config(tmp_path, text)), [])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train:\n#  steps: 7\n", Inner()),
        ("train.steps: 7\n", Inner(steps=7)),
        ("train.steps: 7\ntrain: {schedule: linear}\n", Inner(steps=7, schedule="linear")),
        ("train: {steps: none}\n", Inner()),
        ("train: {steps: null}\n", Inner()),
        ("train: {learning_rate: 1e-4}\n", Inner(learning_rate=1e-4)),
        (
            "train: {<<: {steps: 1, schedule: linear}, steps: 2}\n",
            Inner(steps=2, schedule="linear"),
        ),
    ],
)
def test_values_in_a_file(tmp_path: Path, text: str, expected: Inner) -> None:
    assert load(Outer, str(write_config(tmp_path, text)), []).train == expected


def test_error_on_the_command_line_does_not_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.steps='many'") as raised:
        load(Outer, str(write_config(tmp_path, "train: {steps: 5}\n")), ["train.steps=many"])
    assert "--config" not in str(raised.value)


class Words(Config):
    resize: Literal["keep", "no"] = "keep"
    precision: Literal["on", "off", "none"] | None = "on"
    limit: float | None = 3.0
    enlarge: bool = True


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("resize", "no"),
        ("precision", "off"),
        ("precision", "none"),  # one of the choices
        ("limit", None),
        ("enlarge", False),
    ],
)
def test_choices_that_yaml_reads_as_other_types(
    tmp_path: Path, setting: str, value: object
) -> None:
    text = {None: "none", False: "no"}.get(value, value)  # type: ignore[call-overload]
    assert getattr(load(Words, None, [f"{setting}={text}"]), setting) == value
    file = tmp_path / "c.yaml"
    file.write_text(f"{setting}: {text}\n")
    assert getattr(load(Words, str(file), []), setting) == value


def test_two_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--config is given twice \(a\.yaml, b\.yaml\)"):
        parse(Outer, ["--config", "a.yaml", "--config=b.yaml"], "job", "")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["run_dir=/a", "b"], "cannot read 'b': .*key=value.*the word before it: 'run_dir=/a b'"),
        (
            ["linear", "b"],
            "cannot read 'b': train.schedule is already given .*'train.sch.*=linear b'",
        ),
        (["linear", "run_dir=/a", "b"], "cannot read 'b': .*the word before it: 'run_dir=/a b'"),
        (["train.schedule=linear", "cosine"], "cannot read 'cosine': .* already given"),
    ],
)
def test_second_positional_argument_is_a_one_line_error(words: list[str], line: str) -> None:
    aliases = {"": "train.schedule"} if "b" not in words[1:2] or "linear" in words else {}
    with pytest.raises(ConfigError, match=line):
        parse(Outer, words, "job", "", aliases)


@given(st.text(), st.text())
def test_any_override_gives_a_config_or_a_one_line_error(key: str, value: str) -> None:
    line = "fine"
    try:
        load(Outer, None, ["run_dir=/a", f"{key}={value}"])
    except ConfigError as error:
        line = str(error)
    assert len(line.splitlines()) == 1


def test_dump_can_be_loaded_again() -> None:
    config = load(Outer, None, ["run_dir=/a", "train.steps=3"])
    assert Outer.model_validate(dump(config)) == config


def test_help_shows_every_setting_with_type_default_and_meaning() -> None:
    text = help_text(Outer, "job", "Does it.")
    assert [s.key for s in settings(Outer)] == [
        "run_dir", "name", "words", "train.learning_rate", "train.schedule", "train.steps"
    ]  # fmt: skip
    for words in (
        "run_dir (text, required)",
        "train.learning_rate (number > 0, 0.001)",
        "train.schedule (cosine|linear, cosine)",
        "train.steps (integer >= 1, none)",
        "how fast",
    ):
        assert words in text


def test_options_set_their_settings(capsys: pytest.CaptureFixture[str]) -> None:
    aliases = {"": "train.schedule", "--to": "run_dir"}
    config = parse(Outer, ["linear", "--to", "/a=b", "train.steps=2"], "job", "", aliases)
    assert (config.train.schedule, config.run_dir, config.train.steps) == ("linear", "/a=b", 2)
    with pytest.raises(ConfigError, match="--too"):
        parse(Outer, ["--too", "x"], "job", "", aliases)
    with pytest.raises(SystemExit) as exit:
        parse(Outer, ["run_dir=/a", "--print-config"], "job", "")
    assert exit.value.code == 0
    assert "learning_rate: 0.001" in capsys.readouterr().out


class Listed(Config):
    """Settings of a job that takes many words."""

    files: tuple[str, ...] = ()
    steps: int = 1


def test_a_list_takes_all_words_that_are_no_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a=b,c.png", "-x.png", "steps=3"):
        Path(name).touch()
    words = ["one.png", "steps=2", "a=b,c.png", "-x.png", "--", "steps=3", "--files"]
    config = parse(Listed, words, "job", "", {"": "files"})
    assert config.files == ("one.png", "a=b,c.png", "-x.png", "steps=3", "--files")
    assert config.steps == 2
    for unknown in ("d=e.png", "-y.png"):  # no files
        with pytest.raises(ConfigError, match="unknown"):
            parse(Listed, [unknown], "job", "", {"": "files"})


def test_every_job_with_a_model_takes_it_as_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data.input=/i", "data.output=/o", "--model", "/m"]
    assert parse(RecaptionConfig, words, "job", "").model.path == "/m"
    with pytest.raises(SystemExit):
        parse(RecaptionConfig, ["--help"], "job", "")
    assert "  --model VALUE    model.path=VALUE\n" in capsys.readouterr().out


def test_relative_output_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load(Outer, None, ["run_dir=runs/a"]).run_dir == str(tmp_path / "runs/a")


def test_relative_output_in_the_copy_of_ray_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "session/runtime_resources/working_dir_files/_ray_pkg_0"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    with pytest.raises(ConfigError, match=r"run_dir.*'runs/a' is relative.*absolute"):
        load(Outer, None, ["run_dir=runs/a"])
    assert load(Outer, None, ["run_dir=/runs/a"]).run_dir == "/runs/a"


@pytest.mark.parametrize("path", ["/a #1", "2020-01-01", "001", "no", "*.x", "a: b", "[", "null"])
def test_paths_are_not_parsed_as_yaml(path: str) -> None:
    assert load(Outer, None, [f"run_dir={path}"]).run_dir == str(Path.cwd() / path)
    assert load(Outer, None, ["run_dir=/a", f"name={path}"]).name == (
        None if path == "null" else path
    )


@pytest.mark.parametrize("path", ["s3://b/a", "file:///a", "", " ", "~nobody-of-this-name/x"])
def test_paths_that_cannot_be_written_to_are_refused(path: str) -> None:
    with pytest.raises(ConfigError, match="run_dir"):
        load(Outer, None, [f"run_dir={path}"])


class Lists(Config):
    words: tuple[str, ...] = ()
    numbers: tuple[int, ...] = ()
    pair: tuple[float, float] = (0.0, 1.0)
    switch: bool | tuple[str, ...] = True


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("words=a,b", ("a", "b")),
        ("words=a, b:1 ,c_d", ("a", "b:1", "c_d")),
        ("words=[a, b]", ("a", "b")),
        ("words=007", ("007",)),
        ("numbers=-5", (-5,)),
        ("numbers=-5,7", (-5, 7)),
        ("numbers=[]", ()),
        ("switch=a", ("a",)),
        ("switch=a,b", ("a", "b")),
        ("switch=false", False),
    ],
)
def test_lists_of_any_length_need_no_brackets(setting: str, value: object) -> None:
    loaded = load(Lists, None, [setting])
    assert getattr(loaded, setting.partition("=")[0]) == value


@pytest.mark.parametrize("setting", ["pair=0.5", "pair=0.5,0.6", "numbers=1,x"])
def test_wrong_lists_are_refused(setting: str) -> None:
    with pytest.raises(ConfigError, match=setting.partition("=")[0]):
        load(Lists, None, [setting])


ALL = {"ingest", "precompute", "stage1", "stage2", "recaption", "reconstruct"}


@pytest.mark.parametrize(
    ("size", "jobs"),
    [
        ("tiny", ALL),
        ("full", ALL | {"recaption_vllm"}),
        ("full/reference", {"stage1", "stage2", "recaption"}),
    ],
)
def test_shipped_configs_name_settings_that_exist(
    size: str, jobs: set[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each YAML file passes its job's own --print-config once the user's paths are given."""
    root = Path(__file__).parents[3]
    files = sorted((root / "jobs/configs" / size).glob("*.yaml"))
    assert {f.stem for f in files} == jobs
    paths = ["data.input=/in"]
    for file in files:
        outputs = ["run_dir=/run"] if file.stem.startswith("stage") else ["data.output=/out"]
        script = str(root / f"jobs/{file.stem.partition('_')[0]}.py")
        given = ["--config", str(file), "--print-config", *paths, *outputs]
        monkeypatch.setattr(sys, "argv", [script, *given])
        with pytest.raises(SystemExit) as exit:
            runpy.run_path(script, run_name="__main__")
        captured = capsys.readouterr()
        assert not exit.value.code, captured.err
        assert "input: /in" in captured.out
