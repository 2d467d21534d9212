"""The report of a real run, made from its files, whatever state they are in."""

import csv
import json
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from lit_rlhf.callbacks import WriteReport
from lit_rlhf.cli import main
from lit_rlhf.errors import UserError
from lit_rlhf.report.page import write_report
from lit_rlhf.report.run import read_run


def data_of(page):
    text = page.read_text(encoding="utf-8")
    return json.loads(text.partition('<script id="data" type="application/json">')[2].partition("</script>")[0])


def titles(page):
    return [
        chart["title"] if isinstance(chart["title"], str) else chart["title"]["text"]
        for chart in data_of(page)["charts"]
    ]


def test_fit_ends_with_the_report_and_names_it(run_of_ppo):
    folder, printed = run_of_ppo
    assert "report: runs/ppo/report.html" in printed.splitlines()
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert "In 3 iterations (24 responses, " in text
    assert "the training score" in text
    expected = {
        *("Score", "KL to the reference", "Score against KL", "Win rate against the reference", "Response length"),
        *("Entropy of the policy", "Clip fraction", "Explained variance of the critic", "Time by phase", "Speed"),
    }
    assert expected <= set(titles(folder / "report.html"))
    assert "KL coefficient" not in titles(folder / "report.html")  # it is constant


def test_the_report_has_the_numbers_of_the_files(run_of_ppo):
    data = data_of(run_of_ppo[0] / "report.html")
    with (run_of_ppo[0] / "metrics.csv").open() as file:
        expected = [float(row["objective/score"]) for row in csv.DictReader(file) if row["objective/score"]]
    field = next(chart for chart in data["charts"] if chart["title"]["text"] == "Score")["layer"][0]["encoding"]["y"][
        "field"
    ]
    assert [row[field] for row in data["rows"] if field in row] == pytest.approx(expected, rel=1e-4)
    lines = [json.loads(line) for line in (run_of_ppo[0] / "samples.jsonl").read_text().splitlines()]
    assert len(data["responses"]) == len(lines) == 24
    for shown, line in zip(data["responses"], sorted(lines, key=lambda line: line["stage"]), strict=True):
        assert shown == {"run": "ppo", **line}
        assert set(line["tokens"]) == {"text", "kl_to_ref"} | (
            {"advantage", "value"} if line["stage"] == "train" else set()
        )
        assert ("reference" in line) == (line["stage"] == "val")


def test_the_commands_of_the_page_need_no_torch_and_draw_pictures(run_of_ppo, other_run, tmp_path):
    """Those of docs/report.md, with its folders."""
    shutil.copytree(run_of_ppo[0], tmp_path / "runs" / "quickstart" / "ppo")
    shutil.copytree(other_run, tmp_path / "runs" / "careful")
    page = (Path(__file__).parents[2] / "docs" / "report.md").read_text(encoding="utf-8")
    commands = re.search(r"```sh\n(.*?)```", page, flags=re.DOTALL).group(1).splitlines()
    assert len(commands) == 2
    calls = "".join(f"main({command.split()[1:]}); " for command in commands)
    code = f"import sys; from lit_rlhf.cli import main; {calls}print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    expected = ["report: runs/quickstart/ppo/report.html", "report: comparison.html", "False"]
    assert done.stdout.splitlines() == expected
    for folder in (tmp_path / "runs" / "quickstart" / "ppo" / "report", tmp_path / "comparison"):
        assert {"score.png", "score_against_kl.png"} <= {path.name for path in folder.iterdir()}
        assert (folder / "score.png").read_bytes()[:4] == b"\x89PNG"
        assert len(list(folder.iterdir())) == len(data_of(folder.with_suffix(".html"))["charts"])


def test_half_written_lines_do_not_matter(run_of_ppo, tmp_path):
    """The run is under way: what it planned is not done, and the last line of each file is not finished."""
    shutil.copytree(run_of_ppo[0], tmp_path / "now")
    for name in ("metrics.csv", "samples.jsonl"):
        file = tmp_path / "now" / name
        file.write_bytes(file.read_bytes()[:-20])
    run = read_run(tmp_path / "now", "now")
    whole = read_run(run_of_ppo[0], "now")
    assert run.rows == whole.rows[:-1]
    assert run.samples == whole.samples[:-1]
    config = tmp_path / "now" / "config.yaml"
    config.write_text(config.read_text().replace("iterations: 3", "iterations: 50"))
    assert "After 3 of 50 iterations" in write_report([tmp_path / "now"], pictures=False).read_text(encoding="utf-8")


def test_a_run_of_a_thousand_iterations_stays_small(run_of_ppo, tmp_path):
    run = read_run(run_of_ppo[0], "long")
    train, val = ([row for row in run.rows if ("val/score" in row) == held] for held in (False, True))
    with (tmp_path / "metrics.csv").open("w") as file:
        writer = csv.DictWriter(file, sorted(run.columns))
        writer.writeheader()
        writer.writerows({**row, "progress/iteration": i} for i in range(1, 1201) for row in (train[i % 3], val[i % 3]))
    lines = [sample for sample in run.samples if sample["iteration"] == 1]
    for line in lines:
        line["tokens"] = {name: values * 12 for name, values in line["tokens"].items()}
    with (tmp_path / "samples.jsonl").open("w") as file:
        file.writelines(json.dumps(line | {"iteration": i}) + "\n" for i in range(1, 1201) for line in lines)
    page = write_report([tmp_path], pictures=False)
    assert page.stat().st_size < 5_000_000
    text, data = page.read_text(encoding="utf-8"), data_of(page)
    assert "responses are left out to keep this page small" in text
    assert "of the rows of metrics.csv are not drawn" in text
    for stage in ("train", "val"):
        iterations = sorted({r["iteration"] for r in data["responses"] if r["stage"] == stage})
        assert (iterations[0], iterations[-1]) == (1, 1200)
        gaps = {b - a for a, b in pairwise(iterations)}
        assert max(gaps) - min(gaps) <= 1


def test_other_methods_have_their_own_curves(tmp_path):
    rows = "progress/iteration,train/loss,train/accuracy,train/margin,val/accuracy,time/update\n"
    rows += "1,0.7,0.5,0.1,,2\n1,,,,0.75,\n"
    (tmp_path / "metrics.csv").write_text(rows)
    page = write_report([tmp_path], pictures=False)
    assert titles(page) == ["Loss", "Accuracy", "Margin", "Time by phase"]
    assert "In 1 iteration (2 s): the training loss is 0.70; the held-out accuracy is 75.0 %." in page.read_text(
        "utf-8"
    )


def test_mistakes_are_named(run_of_ppo, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path)])
    assert capsys.readouterr().err == (
        f"lit-rlhf: error: report: {tmp_path} has no metrics.csv; it should be the folder of a run of lit-rlhf fit\n"
    )
    with pytest.raises(UserError, match="a run is named twice"):
        write_report([run_of_ppo[0], run_of_ppo[0]])
    (tmp_path / "rows.jsonl").touch()
    for out, message in ((tmp_path, "out should be a file, such as"), (tmp_path / "rows.jsonl/x.html", "File exists")):
        with pytest.raises(UserError, match=message):
            write_report([run_of_ppo[0]], out)


def test_a_report_that_fails_does_not_end_the_run(make_module, fit, tmp_path, capsys):
    (tmp_path / "metrics.csv").write_text("progress/iteration\n1\n")
    (tmp_path / "samples.jsonl").write_text("this is not JSON\n")
    fit(make_module(iterations=1), [WriteReport()])
    assert "report: not written: UserError: report: line 1 of" in capsys.readouterr().out
    fit(make_module(iterations=1), [WriteReport(at_end=False)])
    assert "report:" not in capsys.readouterr().out
