"""Settings from files and flags: every form that works, every mistake and its message."""

import ast
import dataclasses
import inspect
import re
import shlex
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest

from gpt_arc.errors import UserError
from gpt_arc.files import point
from gpt_arc.nn.meta import meta_device
from gpt_arc.settings import nearest, values_of
from gpt_arc.training.command_line import read_command_line
from gpt_arc.training.config import SETTINGS, TABLES, Config, build_config, read_settings, write_settings
from gpt_arc.training.options import ExampleOptions
from gpt_arc.training.runs import Lock, write_record
from gpt_arc.weights.directory import save_model
from helpers import ROOT
from model import GPT, GPTConfig

CONFIGS = sorted((ROOT / "configs").glob("*.toml"))


def test_names_are_unique_across_tables():
    names = [field.name for table in TABLES.values() for field in dataclasses.fields(table)]
    assert len(names) == len(set(names)) == len(SETTINGS)


def undocumented(cls: type) -> list[str]:
    """Names of the fields of `cls` and its nested dataclasses that have no docstring on the next line."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
    documented = {
        node.target.id
        for node, following in zip(body, body[1:])
        if isinstance(node, ast.AnnAssign)
        and isinstance(following, ast.Expr)
        and isinstance(following.value, ast.Constant)
    }
    missing = []
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            missing += undocumented(field.type)
        elif field.name not in documented:
            missing.append(f"{cls.__name__}.{field.name}")
    return missing


def test_every_setting_is_documented(capsys):
    with pytest.raises(SystemExit) as stop:
        read_command_line(["--help-all"], "description")
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for name in SETTINGS.keys() - {"mixture"}:  # lists of tables can only be set in files
        assert f"--{name} " in shown
    assert undocumented(Config) == []


@pytest.mark.parametrize("columns", [1, 79, 1000])
def test_help_is_drawn_at_any_width(monkeypatch, capsys, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit):
        read_command_line(["--help-all"], "A description of some length, which is wrapped to the width of the terminal")
    lines = [
        line
        for line in capsys.readouterr().out.splitlines()
        if " " in line.strip() and "{" not in line and "usage" not in line
    ]
    assert max(map(len, lines)) <= max(40, min(columns, 100))


@pytest.mark.parametrize(
    ("args", "compiled"),
    [
        (["--compile"], True), (["--compile", "--bias"], True), (["--compile=1"], True), (["--compile", "true"], True),
        (["--compile", "auto"], "auto"), (["--compile=False"], False), (["--compile", "0"], False),
    ],
)  # fmt: skip
def test_a_truth_value_may_stand_alone(args, compiled, tmp_path):
    (tmp_path / "a.toml").write_text("n_layer = 2")
    launch = read_command_line([*args, str(tmp_path / "a.toml")], None)
    assert launch.config.training.compile == compiled and launch.config.model.n_layer == 2


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_builds(path):
    config = build_config(read_settings(path), str(path))
    with meta_device():
        model = GPT(config.model)
    expected = {
        "char_tiny": 208_961, "gpt1": 116_534_784, "gpt2": 124_439_808, "gpt2_medium": 354_823_168,
        "gpt2_large": 774_030_080, "gpt2_xl": 1_557_611_200, "gpt3_small": 125_226_240, "gpt3_medium": 355_871_744,
        "gpt3_large": 760_300_032, "gpt3_xl": 1_315_723_264, "gpt3_2.7b": 2_651_553_280, "gpt3_6.7b": 6_658_404_352,
        "gpt3_13b": 12_853_386_240, "gpt3_175b": 174_604_259_328, "modern": 114_115_584, "gpt2_modern": 123_552_768,
        "llama": 134_515_008,
    }  # fmt: skip
    assert model.num_parameters() == expected.get(path.stem, model.num_parameters())
    assert config.sequences_per_step % config.data.batch_size == 0


def test_the_configs_named_in_the_readme_exist():
    names = {path.stem for path in CONFIGS}
    assert names >= {"quickstart", "char_tiny", "tinyshakespeare", "tinyshakespeare_cpu"}
    assert names >= {"gpt1", "gpt2", "gpt2_medium", "gpt2_large", "gpt2_xl", "modern", "gpt3_mixture"}
    sizes = ("small", "medium", "large", "xl", "2.7b", "6.7b", "13b", "175b")
    assert names >= {f"gpt3_{size}" for size in sizes}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_setting_of_a_config_has_a_nearby_comment(path):
    """A setting's line, or another line of its block, ends in a comment."""
    block, undocumented = [], []
    for line in [*path.read_text().splitlines(), ""]:
        if "=" in line and not line.startswith("#"):
            block.append(line)
        elif block:
            if not any("#" in setting for setting in block):
                undocumented += block
            block = []
    assert not [line for line in undocumented if "eval" not in line and "log_" not in line]


def launch(*args):
    return read_command_line(list(args), None)


def write(path, text):
    path.write_text(text)
    return str(path)


def test_later_files_override_earlier_ones_and_flags_override_files(workplace):
    file_1 = write(workplace / "one.toml", "[model]\nn_layer = 1\nn_head = 2\n[training]\nlearning_rate = 1\n")
    file_2 = write(workplace / "two.toml", "n_layer = 2\n[model]\nn_embd = 8\n")
    config = launch(file_1, file_2, "--n_embd=16").config
    assert (config.model.n_layer, config.model.n_head, config.model.n_embd) == (2, 2, 16)
    assert config.training.learning_rate == 1


def test_every_form_of_a_flag(workplace):
    config = launch(
        "sums.toml", "--n_layer=6", "--n-head", "4", "--n_embd", "32", "--compile=False", "--bias", "False", "--dtype",
        "float32", "--min-lr=1e-5", "--wandb_log=True", "--n_kv_head=2",
    ).config  # fmt: skip
    assert (config.model.n_layer, config.model.n_head, config.model.n_kv_head) == (6, 4, 2)
    assert config.training.compile is False and config.model.bias is False and config.logging.wandb_log is True
    assert launch("sums.toml", "--compile=auto").config.training.compile == "auto"
    assert launch("sums.toml", "--compile=True").config.training.compile is True


def test_overrides_are_flags_that_differ_from_the_files(workplace):
    launched = launch("sums.toml", "--n_layer=3", "--dataset=sums", "--out_dir=x", "--min_lr=None")
    assert launched.overrides == {"n_layer": 3}
    assert launched.name == "sums" and launched.resumed is None


def test_written_settings_read_back_the_same(workplace):
    config = launch(
        "sums.toml", "--n_layer=3", "--learning_rate=3e-4", '--wandb_run_name=a "b" ü', "--compile=False"
    ).config
    path = write(workplace / "again.toml", write_settings(values_of(config)))
    assert set(tomllib.loads((workplace / "again.toml").read_text())) == set(TABLES)
    assert build_config(read_settings(workplace / "again.toml"), path) == config


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("learing_rate = 1", "there is no setting learing_rate; did you mean learning_rate"),
        ("[training]\nlearing_rate = 1", "there is no setting learing_rate; did you mean learning_rate"),
        ("[model]\nqwertyuiop = 1", "there is no setting qwertyuiop; --help-all lists them all"),
        ('[model]\nn_layer = "six"', 'n_layer = "six" must be a whole number'),
        ("[model]\nn_layer = 6.5", "n_layer = 6.5 must be a whole number"),
        ("[model]\nn_layer = true", "n_layer = true must be a whole number"),
        ("[model]\nbias = 1", "bias = 1 must be true or false"),
        ('[model]\nnorm = "batchnorm"', 'norm = "batchnorm" must be one of "layernorm", "rmsnorm"'),
        ('[training]\ncompile = "yes"', 'compile = "yes" must be true or false or one of "auto", "blocks"'),
        ("[training]\nlearning_rate = true", "learning_rate = true must be a number"),
        ("[model]\nlearning_rate = 1.0", r"learning_rate stands in \[model\] and belongs in \[training\]"),
        ("n_layer = 1\n[model]\nn_layer = 2", "n_layer is set twice"),
        ("[modell]\nn_layer = 2", r"there is no table \[modell\]; the tables are \[model\]"),
        ("n_layer = ", "is not valid TOML"),
        ("[model]\nn_head = 5\nn_embd = 16", "n_head = 5 does not divide n_embd = 16"),
        ("[training]\nmin_lr = 1.0\nlearning_rate = 0.1", "min_lr = 1.0 lies above learning_rate = 0.1"),
        ("[training]\nbeta2 = 1.0", "beta2 = 1.0 must be between 0 and 1, 1 excluded"),
        ("[data]\nbatch_size = 0", "batch_size = 0 must be at least 1"),
        ("[data]\ntokens_per_step = 1000\nbatch_size = 4\n[model]\nblock_size = 16", "the nearest is 1024"),
        (
            "[data]\ntokens_per_step = 128\nbatch_size = 4\ngradient_accumulation_steps = 3\n[model]\nblock_size = 16",
            "contradicts gradient_accumulation_steps = 3",
        ),
        ("[data]\nmixture = 3", "mixture = 3 must be a list of tables with name and weight"),
        ('[[data.mixture]]\nname = "a"', "number 1 of mixture: weight is missing"),
        ('[[data.mixture]]\nname = "a"\nweight = "b"', 'number 1 of mixture: weight = "b" must be a number'),
        ('[[data.mixture]]\nname = "a"\nweight = -1', "number 1 of mixture: weight = -1 must be more than 0"),
        ('[[data.mixture]]\nname = "a"\nweight = 1\n[[data.mixture]]\nname = "a"\nweight = 2', "names a twice"),
        ('[data]\ndataset = "a"\n[[data.mixture]]\nname = "b"\nweight = 1', "dataset = a contradicts the mixture of b"),
    ],
)
def test_mistakes_in_files(workplace, content, sentence):
    path = write(workplace / "bad.toml", content + "\n")
    with pytest.raises(UserError, match=sentence) as error:
        launch(path)
    assert path in str(error.value) and "\n" not in str(error.value)


LSTM = "--mixer=lstm"


@pytest.mark.parametrize(
    ("flags", "start"),
    [
        (["--attention_sinks=4"], "attention_sinks = 4 are seen beside an attention_band: set one"),
        ([LSTM], "modern.toml, --mixer: mixer = lstm doesn't suit positions = rotary, qk_norm = True: leave"),
        ([LSTM, "--attention_sinks=4", "--positions=none"], "modern.toml, --mixer, --attention_sinks: mixer = lstm"),
        ([LSTM, "--positions=alibi", "--qk_norm=False"], "mixer = lstm doesn't suit positions = alibi"),
        (["--n_head=5"], "modern.toml, --n_head: n_head = 5 does not divide n_embd = 32"),
    ],
)
def test_a_contradiction_names_where_its_settings_were_set(workplace, flags, start):
    write(workplace / "modern.toml", 'positions = "rotary"\nqk_norm = true\nn_embd = 32\nn_head = 4\n')
    with pytest.raises(UserError, match=f"^{re.escape(start)}") as refused:
        launch("sums.toml", "modern.toml", *flags)
    if mend := re.search("or set (--.*)", str(refused.value)):
        assert launch("sums.toml", "modern.toml", *flags, *mend[1].split()).config.model.mixer == "lstm"


@pytest.mark.parametrize(
    ("flags", "needed"),
    [
        (["--rotary_context=4"], "rotary_scaling"),
        (["--positions=rotary", "--rotary_slow=2"], "rotary_scaling"),
        (["--rotary_base=100"], "positions = rotary"),
        ([LSTM, "--attention_dropout=0.1"], "mixer = attention"),
        (["--balance_loss=0.1"], "n_experts"),
        (["--ngram_rows=9"], "ngrams"),
        (["--mask_rate=0.3"], "attention = bidirectional"),
        (["--momentum=0.9"], "optimizer = muon"),
        (["--cooldown=0.5"], "schedule = wsd"),
        (["--devices=4"], "accelerator"),
        (["--device_price=2.5"], "accelerator"),
        (["--device_mfu=0.5"], "dry_run = true"),
    ],
    ids=" ".join,
)
def test_a_setting_without_effect_is_refused(workplace, flags, needed):
    name, value = flags[-1].removeprefix("--").split("=")
    advice = f"has no effect without {needed}: set it, or leave {name} out"
    with pytest.raises(UserError, match=f"^--{name} = {value}.* {advice}$"):
        launch("sums.toml", *flags)
    others = (flag.removeprefix("--").replace("=", ' = "') + '"\n' for flag in flags[:-1])
    file = write(workplace / "idle.toml", "".join([*others, f"{name} = {value.lower()}\n"]))
    launch("sums.toml", file)  # for a flag or another file to go with


def test_a_run_that_is_no_dry_run_is_planned_for_no_accelerator(workplace):
    with pytest.raises(UserError, match="^--accelerator = h100 has no effect without dry_run = true: set it"):
        launch("sums.toml", "--accelerator=h100")
    file = write(workplace / "h100.toml", 'accelerator = "h100"\ndevices = 2\n')
    run = launch("sums.toml", file).config.run
    assert (run.planned_accelerator, run.planned_devices) == (None, None)
    run = launch("sums.toml", file, "--dry_run=true").config.run
    assert (run.planned_accelerator, run.planned_devices) == ("h100", 2)


def test_muon_after_a_file_that_offloads_the_optimizer(workplace):
    flags = "sums.toml", write(workplace / "offload.toml", "offload_optimizer = true"), "--optimizer=muon"
    with pytest.raises(UserError, match="set offload_optimizer = false, or optimizer = adamw"):
        launch(*flags)
    assert launch(*flags, "--offload_optimizer=false").config.training.optimizer == "muon"


def test_a_default_may_be_stated_where_it_has_no_effect(workplace):
    launch("sums.toml", "--rotary_slow=1", "--mask_rate=0.15", "--momentum=0.95", LSTM, "--dropout=0.1")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--init_from=nowhere"], "there is no model directory nowhere"),
        (["--lr=1"], "there is no flag --lr; did you mean --learning_rate"),
        (["--epochs=3"], "there is no flag --epochs; did you mean --max_iters"),
        (["--num_train_epochs=3"], "there is no flag --num_train_epochs; did you mean --max_iters"),
        (["--learing_rate=1"], "there is no flag --learing_rate; did you mean --learning_rate"),
        (["--n-layers", "3"], "there is no flag --n_layers; did you mean --n_layer"),
        (["--n_layer=six"], "--n_layer = six must be a whole number"),
        (["--n_layer"], "--n_layer needs a value: --n_layer=VALUE"),
        (["--compile=maybe"], '--compile = maybe must be true or false or one of "auto", "blocks"'),
        (["--n_layer="], "--n_layer is empty: give it a value, or leave it out"),
        (["--no-compile"], "there is no flag --no_compile; did you mean --compile=False"),
        (["--n_head=5"], "n_head = 5 does not divide n_embd = 768"),
        (["--overwrite=True", "--init_from=resume"], "choose one"),
        (["--overwrite=True"], "overwrite needs out_dir"),
        (["--max_iters=0"], "--max_iters = 0 must be at least 1"),
        (["stray"], "stray is not a config file"),
        (["quickstrat"], "quickstrat is not a config file .*; did you mean quickstart"),
        (["config/train_gpt2.py"], "convert a config of nanoGPT with: python"),
    ],
)
def test_mistakes_in_flags(workplace, flags, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        launch("sums.toml", *flags)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "meant"),
    [("max_iters", "epochs"), ("max_steps", "epochs"), ("num_epochs", "epochs"), ("warmup_steps", "warmup")],
)
def test_stages_answer_names_of_other_programs_and_of_train_py_with_their_own(name, meant):
    assert nearest(name, ExampleOptions, "--") == f"; did you mean --{meant}?"


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ((), "sums"),
        (("--dataset=sums",), "sums"),
        (("--dataset=book",), "sums-book"),
        (("--dataset=../a/b/",), "sums-b"),
    ],
)
def test_a_run_is_named_after_its_config_and_another_dataset(workplace, flags, name):
    assert launch("sums.toml", *flags).run_name == name


def test_a_missing_config_is_named_with_the_nearest_existing_one(workplace):
    Path("pyproject.toml").write_text("")
    with pytest.raises(UserError, match="there is no config file myproject.toml; did you mean sums.toml"):
        launch("myproject.toml")
    with pytest.raises(UserError, match="there is no config file sumz.toml; did you mean sums.toml"):
        launch("sumz.toml")
    with pytest.raises(UserError, match="name a config file"):
        launch("--n_layer=2")


def test_derived_settings():
    config = build_config({"tokens_per_step": 4096, "batch_size": 4, "block_size": 128, "learning_rate": 0.01}, "")
    assert config.sequences_per_step == 32
    assert config.training.final_lr == pytest.approx(0.001) and config.training.decay_end == 600_000
    assert build_config({"batch_size": 4, "gradient_accumulation_steps": 3}, "").sequences_per_step == 12
    assert config.model.mlp_width == 4 * 768 and config.model.kv_heads == 12 and config.model.head_width == 64


def test_a_dataset_and_a_mixture_replace_each_other_and_read_back_the_same(workplace):
    dataset = write(workplace / "one.toml", '[data]\ndataset = "a"\nbatch_size = 3\n')
    mixture = write(
        workplace / "two.toml", '[[data.mixture]]\nname = "b"\nweight = 2\n[[data.mixture]]\nname = "c"\nweight = 1\n'
    )
    mixed = read_command_line([str(dataset), str(mixture)], None).config
    assert [(s.name, s.weight) for s in mixed.data.sources] == [("b", 2), ("c", 1)] and mixed.data.batch_size == 3
    single = read_command_line([str(mixture), str(dataset)], None).config
    assert [(s.name, s.weight) for s in single.data.sources] == [("a", 1)]
    path = Path(write(workplace / "again.toml", write_settings(values_of(mixed))))
    assert build_config(read_settings(path), "again") == mixed
    flagged = read_command_line([str(mixture), "--dataset=python_manual"], None).config
    assert [source.name for source in flagged.data.sources] == ["python_manual"]


def test_warmup_is_a_number_of_steps_or_a_share_of_the_run(workplace):
    assert build_config({"warmup_iters": 30}, "").training.warmup_steps == 30
    assert build_config({"warmup": 0.1, "max_iters": 50}, "").training.warmup_steps == 5
    with pytest.raises(UserError, match="warmup = 0.1 and warmup_iters = 30 both set the warmup"):
        build_config({"warmup": 0.1, "warmup_iters": 30}, "")


def test_both_forms_of_the_resume_flag_work(workplace):
    run = workplace / "out" / "old"
    (run / "last").mkdir(parents=True)
    (run / "last" / "config.json").write_text("{}")
    (run / "run.json").write_text('{"config": "sums", "overrides": {"n_layer": 3, "learning_rate": 1}}')
    (run / "config.toml").write_text("[training]\nwarmup_iters = 7\n")
    forms = ["--resume=out/old"], ["--init_from=resume", "--out_dir=out/old"], ["--init_from=resume"]
    for form in forms:
        launched = launch(*form)
        assert launched.resumed.resolve() == run.resolve() and launched.config.model.n_layer == 3
        assert launched.config.training.warmup_steps == 7 and launched.config.training.learning_rate == 1
    for flags, sentence in (
        (["--resume=out/old", "--overwrite=True"], "choose one"),
        (["--resume=out/old", "--out_dir=elsewhere"], "name two runs"),
        (["--resume=out/old", "--init_from=gpt2"], "name two models"),
        (["--resume=nowhere"], "there is no checkpoint to resume from in nowhere"),
    ):
        with pytest.raises(UserError, match=sentence):
            launch(*flags)


def test_a_divided_model_shows_no_samples(capsys):
    """A line says so if a config asks for them; the command line's wish is refused."""
    assert launch("quickstart").config.logging.sample_interval == 200 and not capsys.readouterr().out
    settings = ("parallel", "fsdp"), ("expert_processes", 2), ("tensor_processes", 2)
    for flag, dividing in ((f"--{name}={value}", f"{name} = {value}") for name, value in settings):
        launched = launch("quickstart", "--n_experts=4", flag)
        assert launched.config.logging.sample_interval == launched.overrides["sample_interval"] == 0
        assert capsys.readouterr().out == f"samples        none: {dividing} divides the model\n"
        with pytest.raises(UserError, match=f"sample_interval = 3 samples from a whole model, and {dividing} divides"):
            launch("quickstart", "--n_experts=4", flag, "--sample_interval=3")


def test_a_folder_that_cant_be_resumed_names_the_command_that_can(workplace, monkeypatch):
    """Each command is run, as far as its plan."""
    monkeypatch.setattr(sys, "argv", ["train.py"])
    (workplace / "small.toml").write_text("n_layer = 2")

    def refusal(*flags):
        with pytest.raises(UserError) as error:
            read_command_line(list(flags), None)
        return str(error.value)

    run = workplace / "out" / "begun"
    run.mkdir(parents=True)
    lock = Lock(run)
    write_record(run, build_config({"n_layer": 2}, ""), "small", {"max_iters": 7})
    assert "another process is training in" in refusal("--resume=out/begun")
    del lock
    for file in ("out/begun/config.toml", "small.toml"):
        _, _, command = refusal("--resume=out/begun").partition("start it over with: python train.py ")
        launch = read_command_line(shlex.split(command), None)
        assert launch.config.run.overwrite and launch.config.training.max_iters == 7 and launch.files == (file,)
        assert launch.config.model.n_layer == 2
        (run / "config.toml").unlink(missing_ok=True)

    (run / "step-00000001").mkdir()
    save_model(GPT(GPTConfig(8, 11, 1, 1, 4)), None, run / "step-00000001")
    (run / "step-00000001" / "training_state.pt").touch()
    point(run / "last", "step-00000001")
    assert refusal("--resume=out/begun/last").endswith("name the folder of its run, --resume=out/begun")
    _, _, command = refusal("--resume=out/begun").partition("for instance: python train.py ")
    assert read_command_line(shlex.split(command), None).resumed == Path("out/begun")
    (run / "run.json").write_text('{"stage": "sft", "options": {}}')
    assert refusal("--resume=out/begun").endswith("resume it with: python stages/sft.py --resume=out/begun")
