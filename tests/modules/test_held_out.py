"""pass@k and majority@n of held-out prompts."""

import itertools
import json
from collections import Counter

import lightning
import pytest
import torch

from lit_rlhf.data import Prompts
from lit_rlhf.generation import Sampling
from lit_rlhf.modules.held_out import measure_answers
from lit_rlhf.modules.metrics import Metrics
from lit_rlhf.rewards import ExactAnswer, NumericAnswer, RewardFunction, Scores, ScoreShaping, make_reward_inputs
from lit_rlhf.testing import Recorder


class HeldOut(lightning.Callback):
    """Records the responses, answers and rewards of the validation steps."""

    def __init__(self):
        self.rows = []

    def on_validation_batch_end(self, trainer, pl_module, outputs, *_):
        inputs = outputs["reward_inputs"]
        columns = inputs.columns["number"], inputs.responses, inputs.columns["answer"]
        self.rows += zip(*columns, outputs["rewards"]["ExactAnswer"].tolist(), strict=True)


def test_validation_of_a_fit(make_module, make_trainer, prompt_file, tmp_path):
    """The answers are words that the model often says; each metric is counted from the responses."""
    sampling = Sampling(max_tokens=1, responses=4, temperature=0.7)
    rewards = [RewardFunction("lit_rlhf.testing.runs:low_words"), ExactAnswer()]
    module = make_module(sampling=sampling, rewards=rewards, iterations=1)
    data = Prompts(predict=str(prompt_file), validation_batch_size=20)
    said = {r["number"]: r["response"] for batch in make_trainer().predict(module, data) for r in batch}
    records = [json.loads(line) for line in prompt_file.read_text().splitlines()]
    files = {split: str(tmp_path / f"{split}.jsonl") for split in ("train", "validation")}
    lines = [json.dumps(record | {"answer": said[record["number"]]}) for record in records]
    for file in files.values():
        (tmp_path / file).write_text("\n".join(lines))
    held_out, recorder = HeldOut(), Recorder()
    trainer = make_trainer([held_out, recorder])
    trainer.fit(module, datamodule=Prompts(**files, batch_size=48, validation_batch_size=20))
    groups = [[row[1:] for row in rows] for _, rows in itertools.groupby(held_out.rows, key=lambda row: row[0])]
    assert [len(group) for group in groups] == [4] * 48
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    names = {name for name in metrics if "_at_" in name}
    assert names == {"val/pass_at_1", "val/pass_at_2", "val/pass_at_4", "val/majority_at_4"}
    for k in (1, 2, 4):
        shares = []
        for group in groups:
            subsets = list(
                itertools.combinations([response.strip() == answer.strip() for response, answer, _ in group], k)
            )
            shares.append(sum(any(subset) for subset in subsets) / len(subsets))
        assert metrics[f"val/pass_at_{k}"] == pytest.approx(sum(shares) / 48)
    assert 0.1 < metrics["val/pass_at_1"] < metrics["val/pass_at_2"] < metrics["val/pass_at_4"] < 1
    assert metrics["val/rewards/ExactAnswer"] == pytest.approx(metrics["val/pass_at_1"])
    shares = []
    for group in groups:
        counts = Counter(response.strip() for response, _, _ in group)
        most = [response for response, count in counts.items() if count == max(counts.values())]
        shares.append((group[0][1].strip() in most) / len(most))
    assert metrics["val/majority_at_4"] == pytest.approx(sum(shares) / 48)
    assert len(set(shares)) > 2  # there are ties


def measured(rewards, responses, texts):
    metrics, scores = Metrics(torch.device("cpu")), Scores(rewards, ScoreShaping())
    inputs = make_reward_inputs(texts, answer=["72"] * len(texts))
    measure_answers(metrics, scores, inputs, scores.judge(inputs)[0], responses)
    return metrics.compute()


def test_the_first_reward_that_checks_answers_decides():
    """Two of three responses to the first prompt give the answer in the format, and one to the second."""
    length = RewardFunction(lambda responses, **_: [float(len(text)) for text in responses])
    texts = ["#### 72", "#### 7", "it is #### 72.0", "#### 72", "none", "72"]
    numeric = {"pass_at_1": 0.5, "pass_at_2": pytest.approx(5 / 6), "pass_at_3": 1.0, "majority_at_3": 1.0}
    assert measured([length, NumericAnswer(format_score=0.1), ExactAnswer()], 3, texts) == numeric
    exact = {"pass_at_1": pytest.approx(1 / 6), "pass_at_2": pytest.approx(1 / 3), "pass_at_3": 0.5}
    assert measured([ExactAnswer(), NumericAnswer()], 3, texts) == exact | {"majority_at_3": pytest.approx(1 / 6)}


def test_nothing_is_measured_without_answers_or_with_one_response():
    length = RewardFunction(lambda responses, **_: [float(len(text)) for text in responses])
    assert measured([length], 2, ["72", "7"]) == {}
    assert measured([ExactAnswer()], 1, ["72", "7"]) == {}


def test_names_for_a_number_of_responses_that_is_no_power_of_2():
    found = measured([ExactAnswer()], 6, ["72"] * 6)
    assert list(found) == ["pass_at_1", "pass_at_2", "pass_at_4", "pass_at_6", "majority_at_6"]
