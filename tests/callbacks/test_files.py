import csv
import json

import pytest
from transformers import AutoModelForCausalLM

from lit_rlhf.callbacks import ExportAtEnd, MetricsFile, Predictions, Samples
from lit_rlhf.callbacks.files import TableFile
from lit_rlhf.testing import Recorder


def rows(path):
    return list(csv.DictReader(path.open()))


def test_metrics_file_has_a_row_an_iteration_and_one_a_validation(make_module, fit, tmp_path):
    recorder = Recorder()
    fit(make_module(iterations=4), [MetricsFile(), recorder], validation=True, val_check_interval=2)
    table = rows(tmp_path / "metrics.csv")
    assert [(r["progress/iteration"], bool(r["val/score"]), bool(r["policy/loss"])) for r in table] == [
        ("1.0", False, True),
        ("2.0", False, True),
        ("2.0", True, False),
        ("3.0", False, True),
        ("4.0", False, True),
        ("4.0", True, False),
    ]
    trained = [r for r in table if r["policy/loss"]]
    for row, metrics in zip(trained, recorder.metrics, strict=True):
        assert float(row["objective/score"]) == metrics["objective/score"]
    expected = {
        "objective": "score reward kl_to_ref kl_coef entropy advantage_std",
        "policy": "loss kl_to_old clip_fraction ratio_max entropy grad_norm lr",
        "value": "loss explained_variance clip_fraction grad_norm lr",
        "response": "length truncated_fraction",
        "time": "generate judge update",
        "perf": "tokens_per_second responses_per_second peak_memory_gib",
        "progress": "iteration responses",
        "val": "score kl_to_ref length win_rate",
    }
    for group, names in expected.items():
        assert {f"{group}/{name}" for name in names.split()} <= set(table[0])
    assert float(trained[-1]["progress/responses"]) == 4 * 8


def test_a_table_grows_columns_and_is_cut_back(tmp_path):
    file = TableFile(tmp_path / "t.csv")
    file.append({"a": 1.0})
    file.append({"a": 2.0, "b": 3.0})
    assert rows(file.path) == [{"a": "1.0", "b": ""}, {"a": "2.0", "b": "3.0"}]
    other = TableFile(file.path)
    other.restore(["a"], 1)
    other.append({"a": 5.0})
    assert rows(file.path) == [{"a": "1.0"}, {"a": "5.0"}]


def test_samples_are_the_first_responses_with_their_scores(make_module, fit, tmp_path):
    recorder, fitted = Recorder(), make_module(iterations=2, critic=None)
    fit(fitted, [Samples(count=3), recorder], validation=True, val_check_interval=2)
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [(x["iteration"], x["stage"]) for x in lines] == [(1, "train")] * 3 + [(2, "train")] * 3 + [(2, "val")] * 3
    scored = recorder.outputs[1]["scored_rollout"]
    for i, line in enumerate(lines[3:6]):
        assert line["response"] == scored.reward_inputs.responses[i]
        assert line["prompt"] == scored.reward_inputs.prompts[i]
        assert line["score"] == pytest.approx(float(scored.scores[i]))
        assert line["rewards"] == {"low_words": pytest.approx(float(scored.scores[i]))}
        n = int(scored.rollout.response_lengths[i])
        kl = (scored.old_logprobs[i, :n] - scored.ref_logprobs[i, :n]).sum()
        assert line["kl_to_ref"] == pytest.approx(float(kl), abs=1e-5)
        assert sum(line["tokens"]["kl_to_ref"]) == pytest.approx(float(kl), abs=1e-3)
        assert len(line["tokens"]["text"]) == len(line["tokens"]["advantage"]) == n
        words = [text.strip() for text in line["tokens"]["text"]]  # one token is one word, and <eos> is one, too
        texts = [[word for word in part if word.startswith("w")] for part in (words, line["response"].split())]
        assert texts[0] == texts[1]
        assert set(line["tokens"]) == {"text", "kl_to_ref", "advantage"}  # and, with a critic, the value
    for line in lines[6:]:
        assert set(line["tokens"]) == {"text", "kl_to_ref"}
        assert set(line["reference"]) == {"response", "score"}
    answers, scores = fitted.reference_answers[0]
    assert [x["reference"] for x in lines[6:]] == [
        {"response": answers.responses[i], "score": pytest.approx(float(scores[i]))} for i in range(3)
    ]


def test_predictions_are_lines(make_module, fit, prompt_file, tmp_path):
    module = make_module(iterations=1)
    trainer = fit(module, [Predictions()])
    trainer.datamodule.sources["predict"] = str(prompt_file)
    for _ in range(2):  # the second run starts a new file
        trainer.predict(module, datamodule=trainer.datamodule, return_predictions=False)
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [line["number"] for line in lines] == list(range(48))
    assert all(isinstance(line["response"], str) for line in lines)


def test_export_at_end_loads_with_transformers(make_module, fit, tmp_path):
    module = make_module(iterations=1)
    fit(module, [ExportAtEnd()])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "export").state_dict()
    assert all((loaded[name] == value).all() for name, value in module.actor.model.state_dict().items())
