"""Numbers that are not finite stop real fits before the step, and a file says which rows have them."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import preloaded
import pytest
import torch

from lit_rlhf import (
    DPO,
    GAE,
    SFT,
    TRPO,
    Clip,
    Demonstrations,
    ExportAtEnd,
    Guard,
    NativeEngine,
    OnPolicyCallback,
    Preferences,
    Reward,
    RewardModeling,
    Sampling,
    UserError,
)
from lit_rlhf.generation.sampling import draw
from lit_rlhf.modules import incidents
from lit_rlhf.testing.runs import low_words

pytestmark = pytest.mark.usefixtures("without_plans")
NAN, INFINITY = float("nan"), float("inf")
FIRST_PAIR = {"prompt": "w1", "chosen": " w2", "rejected": " w3"}
BAD_PAIR = {"prompt": "w4 w5", "chosen": " w30 w7", "rejected": " w9 w9 w8"}


class Watch(OnPolicyCallback):
    """Plants numbers at the start of an iteration, and keeps the weights and the optimizers' states of that time."""

    def __init__(self, plant=lambda module: None, at=1):
        self.plant, self.at, self.rollout = plant, at, None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if int(pl_module.iteration) == self.at:
            self.plant(pl_module)
        self.module = pl_module
        self.before = self.state()

    def on_rollout_end(self, trainer, pl_module, rollout):
        self.rollout = rollout

    def state(self):
        states = [value for o in self.module.trainer.optimizers for s in o.state.values() for value in s.values()]
        return [torch.as_tensor(x).clone() for x in (*self.module.state_dict().values(), *states)]

    def unchanged(self):
        after = self.state()
        equal = [torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8)) for a, b in
                 zip(self.before, after, strict=True)]  # fmt: skip
        return all(equal) and all(p.grad is None for p in self.module.parameters())


@pytest.fixture
def stopped(fit, tmp_path):
    """Return a function: a module and its callback -> the line and the content of the file with which a fit stops."""

    def run(module, watch=None, run=fit, **options):
        watch = watch or Watch(at=0)
        with pytest.raises(UserError) as error:
            run(module, callbacks=[watch], **options)
        assert watch.unchanged()
        (path,) = tmp_path.glob("incident*")
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)
        return str(error.value), json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))

    return run


def forbid_token(name, token=30):
    """Return a function that makes the embedding of one token of a module's model NaN."""

    def plant(module):
        trunk = getattr(module, name)
        trunk = trunk.model.model if name == "actor" else trunk.trunk
        with torch.no_grad():
            trunk.embed_tokens.weight[module.tokenizer.convert_tokens_to_ids(f"w{token}")] = NAN

    return plant


# ------------------------------------------------------------------------------ on-policy


class WithGaps(Reward):
    """Returns a number that is not finite for two of the responses of the second iteration."""

    def __init__(self, value):
        super().__init__()
        self.value, self.inputs = value, None

    def forward(self, reward_inputs):
        scores = torch.tensor(low_words(reward_inputs.responses))
        if reward_inputs.iteration == 1:
            scores[[2, 5]] = self.value
            self.inputs = reward_inputs
        return scores


@pytest.mark.parametrize("value", [NAN, -INFINITY])
def test_a_reward(make_module, stopped, value):
    reward = WithGaps(value)
    line, incident = stopped(make_module(rewards=[reward], iterations=3), Watch(at=1))
    assert line.startswith(f"rewards/WithGaps is {value} in 2 of 8 responses: stopped before the update, and the last")
    assert "make_reward_inputs" in line
    assert (incident["iteration"], incident["module"]) == (2, "PolicyGradient")
    assert (incident["tensor"], incident["elements"], incident["rows_not_finite"]) == ("rewards/WithGaps", 2, 2)
    assert incident["tensors"]["advantages"]["rows"] == 8  # whitening spreads it
    assert [row["row"] for row in incident["rows"]] == [2, 5]
    assert [row["prompt"] for row in incident["rows"]] == [reward.inputs.prompts[i] for i in (2, 5)]
    assert [row["response"] for row in incident["rows"]] == [reward.inputs.responses[i] for i in (2, 5)]
    assert incident["rows"][0]["rewards/WithGaps"] == str(value)
    assert incident["rows"][0]["not_finite"]["rewards/WithGaps"] is None
    assert incident["weights"] == incident["gradients"] == []


@dataclass(frozen=True)
class OneAdvantage(GAE):
    """GAE, with an infinite advantage of the second token of the fourth response."""

    def __call__(self, trajectory):
        estimates = super().__call__(trajectory)
        estimates.advantages[3, 1] = INFINITY
        return estimates


def test_an_advantage(make_module, stopped):
    watch, update = Watch(at=0), make_module().update
    module = make_module(advantages=OneAdvantage(), update=replace(update, whiten_advantages=False))
    line, incident = stopped(module, watch)
    assert line.startswith("advantages is inf in 1 of 8 responses: stopped before the update")
    (row,) = incident["rows"]
    assert (row["row"], row["not_finite"]) == (3, {"advantages": [1]})
    assert row["tokens"]["advantages"][1] == "inf"
    assert row["tokens"]["position"][1] == 1
    length, start = int(watch.rollout.response_lengths[3]), int(watch.rollout.prompt_lengths[3])
    assert (row["response_tokens"], row["prompt_tokens"]) == (length, start)
    tokens = watch.rollout.tokens[3, start : start + length].tolist()
    assert row["tokens"]["old_logprobs"] == watch.rollout.rollout_logprobs[3, :length].tolist()[:10]
    assert row["response"].split() == module.tokenizer.decode(tokens, skip_special_tokens=True).split()


@dataclass(frozen=True)
class Broken(NativeEngine):
    """The native engine, with a log-probability of one token that is NaN."""

    row: int = 0

    def generate(self, *inputs, **options):
        rollout = super().generate(*inputs, **options)
        rollout.rollout_logprobs[self.row, 0] = NAN
        return rollout


@pytest.mark.parametrize("guard", [Guard(), Guard(responses=0)], ids=["guard", "no guard"])
def test_a_log_probability_of_the_engine(make_module, stopped, guard):
    line, incident = stopped(make_module(engine=Broken(row=6), guard=guard))
    assert line.startswith("rollout_logprobs is nan in 1 of 8 responses: stopped before the update")
    (row,) = incident["rows"]
    assert row["row"] == 6
    assert row["not_finite"]["rollout_logprobs"] == [0]


@dataclass(frozen=True)
class OneLoss(Clip):
    """The clipped objective, with a loss that is NaN for the response whose first token is the most likely one."""

    def __call__(self, *, logprobs, old_logprobs, advantages, mask):
        result = super().__call__(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, mask=mask)
        bad = (old_logprobs[:, :1] == old_logprobs[:, :1].max()) & mask
        return result._replace(loss=torch.where(bad, NAN, result.loss))


def test_a_loss(make_module, stopped):
    """The objective fails for the largest log-probability among the rows that it gets."""
    line, incident = stopped(make_module(objective=OneLoss(), critic=None, reference_kl=None))
    assert line.startswith("the policy loss is nan: stopped before the step, and the last checkpoint is good; rows of")
    assert (incident["tensor"], incident["values"]["policy_loss"]) == ("policy_loss", "nan")
    assert incident["rows"]
    for row in incident["rows"]:
        assert row["not_finite"] == {"policy_loss": list(range(row["response_tokens"]))}
        assert row["prompt"].startswith("w")


def test_a_gradient(make_module, stopped):
    """No row is to blame; the parameter is named."""
    module = make_module(iterations=2)
    module.configure_model()
    weight = module.actor.model.model.norm.weight
    watch = Watch(lambda _: weight.register_hook(lambda gradient: gradient * NAN), at=1)
    line, incident = stopped(module, watch)
    assert line.startswith("the policy gradient norm is nan: stopped before the step, and the last checkpoint is good")
    assert "none alone" in line
    assert "gradients that are not finite: actor.model.model.norm.weight" in line
    assert (incident["tensor"], incident["rows"]) == ("policy_gradient_norm", [])
    assert incident["gradients"] == ["actor.model.model.norm.weight"]


@pytest.mark.parametrize("kind", ["PolicyGradient", "TRPO"])
def test_a_weight_of_the_actor(make_module, tiny_model, stopped, kind):
    """Only responses in which the token occurs are listed."""
    if kind == "TRPO":
        plain = make_module()
        options = {"sampling": Sampling(max_tokens=12), "guard": Guard(responses=0)}
        module = TRPO(actor=str(tiny_model()), rewards=plain.scores.rewards, **options)
    else:
        module = make_module(guard=Guard(responses=0))
    module.iterations, watch = 3, Watch(forbid_token("actor", token=1))
    line, incident = stopped(module, watch)
    token = module.tokenizer.convert_tokens_to_ids("w1")
    assert "weights that are not finite: actor.model.model.embed_tokens.weight" in line
    assert "an earlier one" in line
    assert "checkpoint is good" not in line
    assert incident["tensor"] == "rollout_logprobs"
    assert incident["weights"] == ["actor.model.model.embed_tokens.weight"]
    bad = [i for i, row in enumerate(watch.rollout.rollout_logprobs) if not row.isfinite().all()]
    assert 0 < len(bad) < 8
    assert [row["row"] for row in incident["rows"]] == bad
    assert all(token in watch.rollout.tokens[i] for i in bad)


def test_a_weight_of_the_critic(make_module, stopped):
    line, incident = stopped(make_module(iterations=3), Watch(forbid_token("critic", token=1)))
    assert line.startswith("values is nan in ")
    assert incident["weights"] == ["critic.trunk.embed_tokens.weight"]
    assert all("w1" in (row["prompt"] + " " + row["response"]).split() for row in incident["rows"])


def test_a_loss_of_trpo(make_module, tiny_model, stopped):
    module = TRPO(actor=str(tiny_model()), rewards=make_module().scores.rewards, sampling=Sampling(max_tokens=12))
    module.objective = OneLoss()
    line, incident = stopped(module)
    assert line.startswith("the policy loss is nan: stopped before the step")
    assert len(incident["rows"]) == 1


class Multinomial(NativeEngine):
    """An engine that fails as torch.multinomial does if the weights are not finite."""

    def generate(self, actor, *inputs, **options):
        torch.multinomial(actor.model.model.embed_tokens.weight.sum().softmax(0)[None], 1)
        return super().generate(actor, *inputs, **options)


def test_an_engine_that_fails_because_of_the_weights(make_module, stopped):
    line, incident = stopped(make_module(engine=Multinomial(), iterations=3), Watch(forbid_token("actor")))
    assert line.startswith("responses cannot be sampled (probability tensor contains")
    assert (incident["tensor"], incident["rows"]) == ("weights", [])
    assert incident["weights"] == ["actor.model.model.embed_tokens.weight"]


def test_other_errors_of_an_engine_stay(make_module, fit):
    class Offline(NativeEngine):
        def generate(self, *inputs, **options):
            raise ConnectionError("offline")

    with pytest.raises(ConnectionError, match="offline"):
        fit(make_module(engine=Offline()))


def test_sampling_from_nan_gives_a_token_of_the_vocabulary():
    """An index beyond it would be an assertion on a GPU, after which nothing works."""
    logits = torch.tensor([[NAN, 0.0, 0.0], [0.0, 0.0, 0.0]])
    for options in ({}, {"top_k": 2}, {"top_p": 0.5}, {"temperature": 0}):
        tokens, logprobs, _ = draw(logits, torch.tensor([0.5, 0.5], dtype=torch.float64), Sampling(**options))
        assert 0 <= int(tokens[0]) < 3
        assert logprobs.isnan().tolist() == [True, False]


def test_held_out_responses_are_checked(make_module, fit):
    with pytest.raises(UserError, match="the log-probabilities of the sampled responses are not finite"):
        fit(
            make_module(iterations=1, engine=Broken(), guard=Guard(responses=0)),
            validation=True,
            num_sanity_val_steps=1,
        )

    class Bad(Reward):
        def forward(self, reward_inputs):
            return torch.full((len(reward_inputs.responses),), NAN)

    with pytest.raises(UserError, match="the reward Bad is nan for the response"):
        fit(make_module(rewards=[Bad()]), validation=True, num_sanity_val_steps=1)


def test_the_host_waits_once_for_an_iteration(make_module, fit, monkeypatch):
    found, check = [], incidents.check_iteration

    def counted(*inputs):
        with monkeypatch.context() as patch:
            for name in ("tolist", "item", "nonzero", "__bool__", "__int__", "__float__", "__index__"):
                read = getattr(torch.Tensor, name)
                patch.setattr(torch.Tensor, name, lambda x, read=read, name=name: found.append(name) or read(x))
            check(*inputs)

    monkeypatch.setattr("lit_rlhf.modules.on_policy.check_iteration", counted)
    fit(make_module(iterations=1))
    assert found == ["tolist"]


# -------------------------------------------------------------------- demonstrations, preferences


def test_a_weight_in_sft(tiny_model, make_trainer, stopped, tmp_path):
    texts = ["w1 w2", "w30 w4 w5", "w6", "w7 w30", *("w8 w9" for _ in range(4))]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    def fit(module, callbacks):
        data = Demonstrations(train=str(tmp_path / "texts.jsonl"), batch_size=8)
        make_trainer(callbacks, max_epochs=2).fit(module, datamodule=data)

    line, incident = stopped(SFT(str(tiny_model())), Watch(forbid_token("actor")), fit)
    assert line.startswith("the loss is nan: stopped before the step; weights that are not finite: actor.model")
    assert (incident["iteration"], incident["tensor"]) == (2, "loss")
    assert sorted(row["text"] for row in incident["rows"]) == ["w30 w4 w5", "w7 w30"]
    (row,) = (row for row in incident["rows"] if row["text"] == "w7 w30")
    assert row["loss"] == "nan"
    assert row["not_finite"]["logprobs"][-1] == 3  # the end, which is predicted from w30


@pytest.mark.parametrize("kind", [DPO, RewardModeling])
def test_a_weight_in_training_on_pairs(tiny_model, make_trainer, stopped, tmp_path, kind):
    pairs = [FIRST_PAIR, BAD_PAIR, *(FIRST_PAIR | {"chosen": f" w{i}"} for i in range(10, 16))]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))

    def fit(module, callbacks):
        data = Preferences(train=str(tmp_path / "pairs.jsonl"), batch_size=8)
        make_trainer(callbacks, max_epochs=2).fit(module, datamodule=data)

    line, incident = stopped(kind(str(tiny_model())), Watch(forbid_token(kind.role)), fit)
    assert line.startswith("the loss is nan: stopped before the step; weights that are not finite: ")
    assert "rows of the minibatch that give it: 1" in line
    (row,) = incident["rows"]
    assert {name: row[name] for name in BAD_PAIR} == BAD_PAIR
    assert row["row"] == 1
    assert (row["scores"][0], row["loss"]) == ("nan", "nan")
    assert isinstance(row["scores"][1], float)


def test_a_ranking_has_its_responses(tiny_model, make_trainer, stopped, tmp_path):
    rankings = [{"prompt": "w1", "responses": [" w2", f" w{i}", " w4"]} for i in (5, 30, 6, 7)]
    (tmp_path / "rankings.jsonl").write_text("".join(json.dumps(ranking) + "\n" for ranking in rankings))

    def fit(module, callbacks):
        data = Preferences(train=str(tmp_path / "rankings.jsonl"), batch_size=4)
        make_trainer(callbacks, max_epochs=2).fit(module, datamodule=data)

    _, incident = stopped(RewardModeling(str(tiny_model())), Watch(forbid_token("reward")), fit)
    (row,) = incident["rows"]
    assert row["responses"] == [" w2", " w30", " w4"]
    assert row["not_finite"]["scores"] == [1]


# ------------------------------------------------------------------------------ several processes


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_only_one_process_has_the_row(tiny_model, prompt_file, tmp_path, strategy):
    """Both processes stop with the same line, and the process that has the rows writes the file."""
    script = str(Path(__file__).with_name("incidents_on_ranks.py"))
    for done in preloaded.torchrun(2, script, strategy, str(tiny_model()), str(prompt_file), str(tmp_path)):
        assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads((tmp_path / f"lines-{rank}.json").read_text()) for rank in range(2)]
    assert lines[0] == lines[1]
    lines = lines[0]
    assert lines["reward"].startswith("rewards/OnRankOne is nan in 1 of 8 responses")
    assert lines["loss"].startswith("the policy loss is nan: stopped before the step")
    for name in ("weight", "sft", "dpo"):
        assert "weights that are not finite: actor.model.model.norm.weight" in lines[name]
    files = {name: sorted(path.name for path in (tmp_path / name).glob("incident*")) for name in lines}
    assert files["reward"] == files["loss"] == ["incident-1-rank1.json"]
    assert files["weight"] == ["incident-1-rank0.json", "incident-1-rank1.json"]
    (row,) = json.loads((tmp_path / "reward" / "incident-1-rank1.json").read_text())["rows"]
    assert (row["row"], row["prompt_number"]) == (2, 6)
    if strategy == "ddp":  # FSDP2 calls no hooks of its shards
        assert "gradients that are not finite: actor.model.model.norm.weight" in lines["gradient"]
        assert files["gradient"] == ["incident-1-rank0.json"]
        assert json.loads((tmp_path / "gradient" / "incident-1-rank0.json").read_text())["rows"] == []


# ---------------------------------------------------------------------------- the end of a run


def test_weights_that_the_last_step_made_are_not_exported(make_module, fit, tmp_path):
    module = make_module(iterations=1, critic=None, actor_optimizer=lambda p: torch.optim.SGD(p, lr=INFINITY))
    module.update = replace(module.update, epochs=1, minibatches=1)
    with pytest.raises(
        UserError, match=r"^weights that are not finite: actor\.model\..* and \d+ more: nothing is exported"
    ):
        fit(module, [ExportAtEnd()])
    assert not (tmp_path / "export").exists()


# --------------------------------------------------------------------------------- the file


def test_the_file_is_strict_json(tmp_path):
    content = {"text": "half a pair: \ud83d, [\n 1\n]", "numbers": [[1.0, NAN], [-INFINITY]], "none": None}
    incidents._write(tmp_path / "new" / "incident-1.json", content)
    text = (tmp_path / "new" / "incident-1.json").read_text()
    assert json.loads(text) == content | {"numbers": [[1.0, "nan"], ["-inf"]]}
    assert '[ 1.0, "nan" ]' in text
    assert list((tmp_path / "new").iterdir()) == [tmp_path / "new" / "incident-1.json"]


def test_a_folder_that_cannot_be_written_does_not_hide_the_line(make_module, fit, tmp_path, capsys):
    folder = tmp_path / "run"
    folder.write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"^rewards/WithGaps is nan"):
        fit(make_module(rewards=[WithGaps(NAN)], iterations=3), default_root_dir=folder)
    assert "the file of the incident cannot be written: " in capsys.readouterr().out
