"""pass@k and majority@n of held-out prompts."""

import itertools
import json
from collections import Counter, defaultdict

import lightning
import pytest
import torch

from lit_rlhf.data import Prompts
from lit_rlhf.generation import Sampling
from lit_rlhf.modules.held_out import measure_answers
from lit_rlhf.modules.metrics import Metrics
from lit_rlhf.rewards import ExactAnswer, NumericAnswer, RewardFunction, Scores, ScoreShaping, make_reward_inputs


class HeldOut(lightning.Callback):
    """Records the text of each response in validation, and whether it is correct, by the number of its prompt."""

    def __init__(self):
        self.groups = defaultdict(list)

    def on_validation_batch_end(self, trainer, pl_module, outputs, *_):
        inputs = outputs["reward_inputs"]
        columns = inputs.columns["number"], inputs.responses, inputs.columns["answer"]
        for number, response, answer in zip(*columns, strict=True):
            self.groups[number].append((response.strip(), response.strip() == answer.strip()))


def share_of_subsets(group, k):
    """Return the share of the sets of k responses that contain a correct one."""
    subsets = list(itertools.combinations([is_correct for _, is_correct in group], k))
    return sum(any(subset) for subset in subsets) / len(subsets)


def share_of_most_frequent(group):
    """Return the share of the most frequent answers that are correct."""
    counts = Counter(group)
    most = [is_correct for (_, is_correct), count in counts.items() if count == max(counts.values())]
    return sum(most) / len(most)


def test_validation_of_a_fit(make_module, make_trainer, prompt_file, tmp_path):
    """The answers are words that the model often says; each metric is counted from the responses."""
    sampling, low_words = Sampling(max_tokens=1, responses=4, temperature=0.7), "lit_rlhf.testing.runs:low_words"
    module = make_module(sampling=sampling, rewards=[RewardFunction(low_words), ExactAnswer()], iterations=1)
    data = Prompts(predict=str(prompt_file), validation_batch_size=20)
    said = {r["number"]: r["response"] for batch in make_trainer().predict(module, data) for r in batch}
    records = [json.loads(line) for line in prompt_file.read_text().splitlines()]
    file, held_out = tmp_path / "answered.jsonl", HeldOut()
    file.write_text("".join(json.dumps(record | {"answer": said[record["number"]]}) + "\n" for record in records))
    data = Prompts(train=str(file), validation=str(file), batch_size=48, validation_batch_size=20)
    trainer = make_trainer([held_out])
    trainer.fit(module, datamodule=data)
    groups = list(held_out.groups.values())
    assert [len(group) for group in groups] == [4] * 48
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    majorities = [share_of_most_frequent(group) for group in groups]
    expected = {f"val/pass_at_{k}": sum(share_of_subsets(group, k) for group in groups) / 48 for k in (1, 2, 4)}
    expected["val/majority_at_4"] = sum(majorities) / 48
    assert {name: value for name, value in metrics.items() if "_at_" in name} == pytest.approx(expected)
    assert 0.1 < metrics["val/pass_at_1"] < metrics["val/pass_at_2"] < metrics["val/pass_at_4"] < 1
    assert metrics["val/rewards/ExactAnswer"] == pytest.approx(metrics["val/pass_at_1"])
    assert set(majorities) > {0.0, 1.0}  # and ties


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
