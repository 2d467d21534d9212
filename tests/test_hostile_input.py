"""Hostile input is refused in one line, in seconds and without much memory, and an older run's files stay as they are.

What is only unusual, such as half a character of UTF-16, is trained on.
"""

import gzip
import json
import os
from pathlib import Path

import preloaded
import pytest
import test_wrong_input as wrong

from lit_rlhf.cli import main

pytestmark = pytest.mark.usefixtures("without_plans")
folder = wrong.folder
MEASURED = str(Path(__file__).with_name("measured.py"))
SECONDS = 10.0
"""The processor time, beyond that of a normal run, that a refusal may take."""
MEMORY = 1024.0
"""The memory in MiB, beyond that of a normal run, that a refusal may take."""
GOOD = b'{"prompt": "w1 w2"}\n'
TURN = json.dumps({"prompt": [{"role": "user", "content": "w1"}]}).encode() + b"\n"
PAIRS = list(zip("abcdefgh", "bcdefghi", strict=True))
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(f"{b}: &{b} [{','.join(9 * ['*' + a])}]\n" for a, b in PAIRS)
VALUE_BOMB = "[&a [1, 1, 1, 1, 1, 1, 1, 1, 1]" + "".join(f", &{b} [{','.join(9 * ['*' + a])}]" for a, b in PAIRS)


@pytest.fixture
def older(folder):
    """Return a working folder with the files of an older run, which the test must leave as they are."""
    (folder / "run").mkdir()
    (folder / "run" / "config.yaml").write_text("model: older\n")
    (folder / "run" / "metrics.csv").write_text("iteration,score\n1,0.5\n")
    before = files(folder / "run")
    yield folder
    assert files(folder / "run") == before
    assert not (folder / "run.1").exists()
    assert not (folder / "executed").exists()


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def put(name, *parts):
    """Return a function that writes these bytes, or this text, to a file of the working folder."""
    data = b"".join(part if isinstance(part, bytes) else part.encode() for part in parts)
    return lambda folder: (folder / name).write_bytes(data)


def config(right, wrong_part):
    return lambda folder: (folder / "c.yaml").write_text(
        (folder / "config.yaml").read_text().replace(right, wrong_part, 1)
    )


FILE = ["fit", "--config=c.yaml"]


@pytest.mark.parametrize(
    ("prepare", "patterns"),
    [
        (put("c.yaml", BOMB), [r"c\.yaml, line 5", "20000 values", "aliases"]),
        (put("c.yaml", "model: &a [*a]\n"), [r"c\.yaml, line 1", r"\*a", "around it"]),
        (put("c.yaml", "model: &a {class_path: SFT, init_args: *a}\n"), [r"c\.yaml, line 1", r"\*a"]),
        (put("c.yaml", "model: ", "[" * 5000, "]" * 5000), [r"c\.yaml, line 1", "50 lists and mappings"]),
        (put("c.yaml", "model: ", "{a: " * 300, "1", "}" * 300), [r"c\.yaml, line 1", "50 lists and mappings"]),
        (put("c.yaml", "model: SFT\n#", "x" * 10**6), [r"c\.yaml", "262144 characters"]),
        (put("c.yaml", b"model: SFT\n# caf\xe9\n"), [r"c\.yaml, line 2", "UTF-8"]),
        (put("c.yaml", "model: SFT\n".encode("utf-16")), [r"c\.yaml, line 1", "UTF-8"]),
        (put("c.yaml", gzip.compress(b"model: SFT\n", mtime=0)), [r"c\.yaml, line 1", "UTF-8"]),
        (put("c.yaml", "model: SFT\n\0"), [r"c\.yaml, line 2", "not printable"]),
        (put("c.yaml", "model:\n\tclass_path: SFT\n"), [r"c\.yaml, line 2", r"'\\t'"]),
        (put("c.yaml", "model: SFT\n---\nmodel: DPO\n"), [r"c\.yaml", "another document"]),
        (put("c.yaml", "model: !!python/object/apply:os.system ['touch executed']\n"), [r"line 1", "tag .*os.system"]),
        (config("iterations: 1", "iterations: 2020-13-45"), [r"c\.yaml", "month must be in 1..12"]),
        (config("iterations: 1", f"iterations: {'9' * 5000}"), [r"c\.yaml", "4300 digits"]),
        (
            config("iterations: 1", f"iterations: {'9' * 400}"),
            [r"model\.iterations is 9{300,}… but", "9223372036854775807"],
        ),
        (config("iterations: 1", "iterations: 1e400"), [r"model\.iterations", "whole number", "inf"]),
        (config("iterations: 1", "iterations: true"), [r"model\.iterations", "whole number", "True"]),
        (config("iterations: 1", "iterations: 1\n    iterations: 2"), [r"line 9", "'iterations' is given twice"]),
        (config("trainer:", "trainer: {max_epochs: 1}\ntrainer:"), [r"line 13", "'trainer' is given twice"]),
        (config("trainer:", "1: 2\ntrainer:"), [r"c\.yaml", "name of an option", "not 1"]),
        (config("trainer: {", "trainer: 5\nx: {"), ["trainer should be a mapping|no option 'x"]),
        (config("trainer:", "checkpoint: 5\ntrainer:"), ["checkpoint should be a mapping of options, not 5"]),
        (config("PolicyGradient", "[PolicyGradient]"), [r"model\.class_path", "name of a class", "PolicyGradient"]),
        (config("PolicyGradient", "os.system"), ["model", "os.system"]),
        (config("{train:", "[1]\n  x: {train:"), [r"data\.init_args", "mapping", r"\[1\]"]),
        (lambda folder: (folder / "c.yaml").mkdir(), [r"no file c\.yaml"]),
        (lambda folder: (folder / "c.yaml").symlink_to("c.yaml"), [r"no file c\.yaml"]),
        (lambda folder: (folder / "c.yaml").symlink_to("/dev/zero"), [r"no file c\.yaml"]),
    ],
)
def test_config_files(older, capsys, prepare, patterns):
    prepare(older)
    wrong.check(wrong.refusal(capsys, FILE), *patterns)


@pytest.mark.parametrize(
    ("changes", "patterns"),
    [
        ({"model__rewards": VALUE_BOMB + "]"}, [r"model\.rewards", "20000 values"]),
        ({"model__rewards": "[" * 3000 + "]" * 3000}, [r"model\.rewards", "50 lists"]),
        ({"model__guard": "null"}, [r"model\.guard should be a mapping of options \(responses, bound\), not null"]),
        ({"model__" + "a" * 10**5: 3}, ["no option '--model.aaaa"]),
        ({"a." * 3000 + "b": 3}, [r"no option '--a\.a\.a"]),
        ({"model__a\nb": 3}, [r"no option 'model\.a\\n", "actor"]),
        ({"model__sampling__temperature": ".nan"}, [r"model\.sampling\.temperature", "nan"]),
        ({"model__actor_optimizer": "AdamW", "model__actor_optimizer__lr": ".nan"}, [r"actor_optimizer\.lr", "nan"]),
        ({"model__actor_optimizer": "AdamW", "model__actor_optimizer__lr": -1}, [r"actor_optimizer: Invalid .* -1"]),
        ({"data__batch_size": "true"}, [r"data\.batch_size", "whole number", "True"]),
        ({"data__template": "{0.__class__}"}, [r"data\.template", r"0\.__class__", "has: answer, prompt"]),
        ({"data__template": "{prompt.__class__.__mro__}"}, [r"data\.template", "__mro__", "has: answer, prompt"]),
        ({"data__template": "{prompt:>9999999999}"}, [r"data\.template", "five digits"]),
        ({"data__template": "{" * 500 + "prompt" + "}" * 500}, [r"data\.template", "50 lists"]),
        ({"data__column": "a" * 10**5}, ["no column 'a{300,}…"]),
        ({"data__train": "a" * 5000 + ".jsonl"}, [r"data\.train", "no file aaa", "too long"]),
        ({"data__train": "../" * 40 + "etc/passwd"}, [r"data\.train", r"\.\./etc/passwd", r"\.jsonl"]),
        ({"model__actor": "../" * 40 + "nowhere"}, [r"model\.actor", r"\.\./nowhere does not exist"]),
        ({"trainer__default_root_dir": "."}, [r"trainer\.default_root_dir", "own, not the working folder"]),
        ({"trainer__default_root_dir": ""}, [r"trainer\.default_root_dir", "own, not the working folder"]),
        ({"trainer__default_root_dir": "prompts.jsonl"}, [r"trainer\.default_root_dir", r"prompts\.jsonl", "exists"]),
        ({"trainer__default_root_dir": "a" * 5000}, [r"trainer\.default_root_dir", "too long"]),
        ({"trainer__check_val_every_n_epoch": 0}, [r"trainer\.check_val_every_n_epoch", "1 or more", "null", "0"]),
        (
            {"trainer__val_check_interval": 0},
            [r"trainer\.val_check_interval must be positive, not 0; .*limit_val_batch"],
        ),
        ({"trainer__devices": -3}, [r"trainer\.devices", "> 0"]),
        ({"seed_everything": -1}, ["seed_everything", "-1", "4294967295"]),
        ({"weights_only": "false"}, ["weights_only", "true or null", "execute code"]),
        ({"ckpt_path": "a" * 5000}, ["aaa", "too long"]),
    ],
)
def test_options(older, capsys, changes, patterns):
    wrong.check(wrong.refusal(capsys, wrong.fit(**changes)), *patterns)


def test_a_metric_that_does_not_exist(folder, capsys):
    message = wrong.refusal(
        capsys, wrong.fit(trainer__callbacks="[{class_path: EarlyStopping, init_args: {monitor: scor}}]")
    )
    wrong.check(message, r"trainer\.callbacks", "monitor is 'scor'", "metrics are .*, objective/reward,")


@pytest.mark.parametrize(
    ("name", "data", "patterns"),
    [
        ("x.jsonl", GOOD + b'{"prompt": "w1", "a": ' + b"[" * 10**4 + b"]" * 10**4 + b"}", ["line 2", "deeply"]),
        ("x.jsonl", GOOD + b"\0", ["line 2", "not JSON"]),
        ("x.jsonl", GOOD.decode().encode("utf-16"), ["line 1", "UTF-8"]),
        ("x.jsonl", gzip.compress(GOOD, mtime=0), ["line 1", "UTF-8"]),
        ("x.jsonl", b'{"prompt": "w1 \xed\xa0\x80"}', ["line 1", "UTF-8"]),
        ("x.jsonl", b'{"prompt": "w1", "a": ' + b"9" * 5000 + b"}", ["line 1", "4300 digits"]),
        ("x.jsonl", b'{"prompt": 1e400}', ["record 1", "text", "inf"]),
        ("x.jsonl", b'{"\x1b[2Jprompt": "w1"}', ["line 1", "not JSON"]),
        ("x.jsonl", rb'{"\u001b[2Jprompt": "w1"}', ["record 1", r"\\x1b\[2Jprompt"]),
        ("x.json", b"null", [r"record 1 of x\.json", "JSON object", "NoneType"]),
        ("x.json", b'[Infinity, {"prompt": "w1"}]', [r"record 1 of x\.json", "JSON object", "float"]),
        ("x.json", b"[" * 10**5, [r"x\.json", "cannot be read", "deeply"]),
        ("x.json", b'[{"prompt": "w1"}, {"prom', [r"x\.json", "cannot be read"]),
        ("x.csv", b"a,b\n1,2\n" * 2, ["record 1", "'prompt'", "a, b"]),
        ("x.csv", b"prompt,b\nw1,2\nw1,2,3\n", [r"x\.csv", "line 3"]),
        ("x.csv", b"prompt\ncaf\xe9\n", [r"x\.csv", "utf-8"]),
        ("x.parquet", b"PAR1" + b"\0" * 99 + b"PAR1", [r"x\.parquet", "cannot be read as parquet"]),
        ("x.jsonl.gz", gzip.compress(GOOD, mtime=0), [r"x\.jsonl\.gz", r"\.jsonl, "]),
    ],
)
def test_data_files(older, capsys, name, data, patterns):
    (older / name).write_bytes(data)
    wrong.check(wrong.refusal(capsys, wrong.fit(data__train=name)), r"data\.train", *patterns)


@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.mkdir(),
        lambda path: path.symlink_to(path.name),
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: os.mkfifo(path),
    ],
)
def test_what_is_no_file(older, capsys, make):
    make(older / "x.jsonl")
    wrong.check(wrong.refusal(capsys, wrong.fit(data__train="x.jsonl")), r"data\.train", r"no file x\.jsonl")


def test_what_is_harmless_is_trained_on(folder):
    prompts = {
        b"\xef\xbb\xbf" + b'{"prompt": "w1"}\r': "w1",
        rb'{"prompt": "w1 \ud800 w2"}': "w1 � w2",
        rb'{"prompt": "w1 \u0000 w2"}': "w1 \0 w2",
        b'{"prompt": "w0", "prompt": "w2"}': "w2",
        b'{"prompt": "w3", "a": 1e400, "b": NaN}': "w3",
        b'{"prompt": "w1 {prompt} {{ 7 * 7 }}"}': "w1 {prompt} {{ 7 * 7 }}",
        b'{"prompt": "w4", "image": "../../../etc/passwd", "path": "/dev/zero"}': "w4",
    }
    (folder / "x.jsonl").write_bytes(b"\n".join(prompts))
    main([*wrong.fit(data__train="x.jsonl", data__batch_size=7), "--report.at_end=false", "--samples.count=7"])
    samples = (folder / "run" / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert sorted(json.loads(sample)["prompt"] for sample in samples) == sorted(prompts.values())


def tokens(folder):
    """Give the model a tokenizer with a million more tokens."""
    path = folder / "model" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    tokenizer["added_tokens"] += [{"id": 99 + i, "content": f"<{i}>", **flags} for i in range(10**6)]
    path.unlink()
    path.write_text(json.dumps(tokenizer))
    (folder / "x.jsonl").write_bytes(GOOD * 4)


def template(text):
    """Return a function that gives the model a chat template, and writes a conversation."""

    def prepare(folder):
        (folder / "model" / "chat_template.jinja").write_text(text)
        (folder / "x.jsonl").write_bytes(TURN * 4)

    return prepare


LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}REST{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("prepare", "patterns"),
    [
        (put("x.jsonl", GOOD, b'{"prompt": "', b"w1 " * (34 * 2**20), b'"}'), ["line 2", "32 MiB"]),
        (put("x.jsonl", GOOD, b'{"prompt": "', b"w1 " * (4 * 2**20), b'"}'), ["record 2", "4194304"]),
        (put("x.jsonl", GOOD, b"[" * (100 * 2**20)), ["line 2", "32 MiB"]),
        (tokens, [r"model\.actor", "1000004 tokens", "50000"]),
        (template("{% for i in range(10**9) %}{% endfor %}"), ["record 1", "Range too big"]),
        pytest.param(
            template(LOOP.replace("REST", "")), ["record 1", "more than 3 s", "does it loop"], marks=pytest.mark.long
        ),
        (template(LOOP.replace("REST", "{{ messages[0].content }}" * 99)), ["record 1", "more than (3 s|512 MiB)"]),
        (template("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"), ["record 1", "recursion"]),
        (template("{{ messages.__class__.__mro__ }}"), ["record 1", "__class__", "unsafe"]),
        (template("{% include '/etc/passwd' %}"), ["record 1", "no loader"]),
    ],
)
def test_what_would_take_long_or_much_memory(older, normal, prepare, patterns):
    prepare(older)
    done, used = measure(older, wrong.fit(data__train="x.jsonl"))
    (*_, message) = done.stderr.strip().splitlines()
    assert done.returncode == 1
    assert message.startswith("lit-rlhf: error: "), done.stderr
    wrong.check(message, *patterns)
    assert "Traceback" not in done.stdout + done.stderr
    assert used["seconds"] < normal["seconds"] + SECONDS
    assert used["peak"] < normal["peak"] + MEMORY


@pytest.fixture(scope="module")
def normal(tiny_model, tmp_path_factory):
    """Return the processor time and the peak memory of a run with nothing wrong."""
    path = tmp_path_factory.mktemp("normal")
    (path / "rewards.py").write_text(wrong.REWARDS)
    (path / "prompts.jsonl").write_bytes(GOOD * 8)
    done, used = measure(path, wrong.fit(model__actor=str(tiny_model("llama"))))
    assert done.returncode == 0, done.stderr
    return used


def measure(folder, words):
    done = preloaded.run(MEASURED, str(folder / "used.json"), *words, cwd=folder, timeout=60)
    return done, json.loads((folder / "used.json").read_text())
