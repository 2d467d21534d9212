"""A run with adapters is exported as folders of peft, or merged; a chain of runs starts each from the one before."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lit_rlhf.cli import main
from lit_rlhf.errors import UserError
from lit_rlhf.export import export
from lit_rlhf.models.actor import Actor
from lit_rlhf.models.adapter_folders import base_of
from lit_rlhf.models.loading import load_model
from lit_rlhf.models.scoring import load_critic, load_reward_model

pytestmark = pytest.mark.usefixtures("without_plans")
TOKENS = torch.tensor([[2, 6, 7, 8, 9, 1], [2, 9, 10, 11, 12, 13]])
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def fit(folder, module, data, *words, optimizers=("optimizer",), **model):
    """Run the command for one epoch with an adapter, unless ``adapter`` is None."""
    options = {"adapter.rank": 4} | {name.replace("__", "."): value for name, value in model.items()}
    words = [*words, *(f"--model.{name}={value}" for name, value in options.items() if value is not None)]
    for name in optimizers:
        words += [f"--model.{name}=AdamW", f"--model.{name}.lr=1e-2"]
    words += ["--data.batch_size=8", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    words += ["--report.at_end=false"]
    main(["fit", f"--model={module}", f"--data={data}", *words, f"--trainer.default_root_dir={folder}"])
    return folder


def ppo(folder, files, actor, reward, **options):
    rewards = json.dumps([{"class_path": "RewardModel", "init_args": {"model": str(reward), "normalize": True}}])
    both = {"optimizers": ("actor_optimizer", "critic_optimizer"), "iterations": 2, "sampling__max_tokens": 6}
    both |= {"update__epochs": 1, "update__minibatches": 1}
    train = f"--data.train={files / 'prompts.jsonl'}"
    return fit(folder, "PolicyGradient", "Prompts", train, actor=actor, rewards=rewards, **both, **options)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    pairs = [{"prompt": f"w{i} w2", "chosen": f" w1 w{i % 5}", "rejected": f" w{8 + i} w3 w2"} for i in range(16)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    texts = [{"prompt": pair["prompt"], "response": pair["chosen"]} for pair in pairs]
    (folder / "texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": pair["prompt"]}) + "\n" for pair in pairs))
    return folder


@pytest.fixture(scope="module")
def chain(files, tiny_model, tmp_path_factory):
    """Return the folders of an SFT run, of a reward model and of DPO on its adapter, and of PPO on both."""
    folder, base = tmp_path_factory.mktemp("chain"), str(tiny_model())
    texts = f"--data.train={files / 'texts.jsonl'}", "--data.prompt=prompt", "--data.response=response"
    pairs = f"--data.train={files / 'pairs.jsonl'}"
    sft = fit(folder / "sft", "SFT", "Demonstrations", *texts, actor=base)
    reward = fit(folder / "reward", "RewardModeling", "Preferences", pairs, reward=sft / "export", adapter__rank=3)
    dpo = fit(folder / "dpo", "DPO", "Preferences", pairs, actor=sft / "export", adapter__chained="merged")
    run = ppo(folder / "ppo", files, sft / "export", reward / "export", critic="reward")
    return {"sft": sft, "reward": reward, "dpo": dpo, "ppo": run}


def logprobs(model):
    with torch.no_grad():
        found = model(input_ids=TOKENS).logits.log_softmax(-1)[:, :-1]
    return found.gather(-1, TOKENS[:, 1:, None]).squeeze(-1)


def scores(model):
    with torch.no_grad():
        return model(input_ids=TOKENS).logits[:, 0]


@pytest.mark.parametrize("stage", ["sft", "dpo", "ppo"])
def test_an_actor_is_the_same_everywhere(chain, tiny_model, tmp_path, stage):
    """As an adapter for peft, merged for transformers, and here; each stage has moved from the one before."""
    run = chain[stage]
    base = AutoModelForCausalLM.from_pretrained(tiny_model())
    before = logprobs(base) if stage == "sft" else logprobs(load_model(str(chain["sft"] / "export")))
    found = logprobs(PeftModel.from_pretrained(base, run / "export").eval())
    assert base_of(str(run / "export")) == str(tiny_model())
    assert (found - before).abs().max() > 1e-3
    merged = export(run, out=tmp_path / "merged", merge=True)
    torch.testing.assert_close(logprobs(AutoModelForCausalLM.from_pretrained(merged)), found, **CLOSE)
    with torch.no_grad():
        mine = Actor(load_model(str(run / "export")))(TOKENS, torch.arange(6).expand(2, 6) > 0).logprobs[:, 1:]
    torch.testing.assert_close(mine, found, **CLOSE)


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "ppo"])
def test_the_command_writes_what_the_callback_writes(chain, tmp_path, stage, capsys):
    main(["export", str(chain[stage]), "--out", str(tmp_path / "out")])
    assert capsys.readouterr().out == f"exported: {tmp_path / 'out'}\n"
    theirs, mine = chain[stage] / "export", tmp_path / "out"
    assert {path.name for path in theirs.iterdir()} == {path.name for path in mine.iterdir()}
    for path in theirs.glob("*.json"):
        assert json.loads(path.read_text()) == json.loads((mine / path.name).read_text()), path.name
    old, new = (load_file(folder / "adapter_model.safetensors") for folder in (theirs, mine))
    assert old.keys() == new.keys()
    assert all(torch.equal(new[name], weight) for name, weight in old.items())


def test_a_reward_model_is_the_same_everywhere(chain, tiny_model, tmp_path):
    run = chain["reward"]
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model(), num_labels=1, pad_token_id=0)
    found = scores(PeftModel.from_pretrained(base, run / "export").eval())
    merged = export(run, out=tmp_path / "merged", merge=True)
    alone = AutoModelForSequenceClassification.from_pretrained(merged)
    torch.testing.assert_close(scores(alone), found, **CLOSE)
    for folder in (run / "export", merged):
        reward = load_reward_model(str(folder))
        torch.testing.assert_close(reward(TOKENS)[:, -1].detach(), found, **CLOSE)
        config = json.loads((folder / "config.json").read_text())
        assert reward.scale == (config["score_mean"], config["score_std"])
        assert config["score_std"] > 0


def test_a_critic_is_the_same_everywhere(chain, tiny_model, tmp_path):
    """The critic started from the reward model's adapter, rescaled by the model's mean and deviation."""
    run = chain["ppo"]
    folder, merged = export(run, role="critic"), export(run, out=tmp_path / "m", role="critic", merge=True)
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model(), num_labels=1, pad_token_id=0)
    bias = json.loads((folder / "config.json").read_text())["value_bias"]
    found = scores(PeftModel.from_pretrained(base, folder).eval()) + bias
    alone = AutoModelForSequenceClassification.from_pretrained(merged)
    torch.testing.assert_close(scores(alone) + alone.config.value_bias, found, **CLOSE)
    for source in (folder, merged):
        torch.testing.assert_close(load_critic(str(source))(TOKENS)[:, -1].detach(), found, **CLOSE)
    judge = load_reward_model(str(chain["reward"] / "export"))
    start = (judge(TOKENS)[:, -1].detach() - judge.scale[0]) / judge.scale[1]
    assert 1e-4 < (found - start).abs().max() < 2  # two steps from the reward model, in its units


def test_a_shared_critic_has_the_actors_trunk(chain, files, tiny_model, tmp_path):
    run = ppo(tmp_path, files, chain["sft"] / "export", chain["reward"] / "export", critic="shared")
    folder, merged = export(run, role="critic"), export(run, out=tmp_path / "m", role="critic", merge=True)
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model(), num_labels=1, pad_token_id=0)
    found = scores(PeftModel.from_pretrained(base, folder).eval())
    torch.testing.assert_close(scores(AutoModelForSequenceClassification.from_pretrained(merged)), found, **CLOSE)
    assert found.abs().max() > 0
    actor, shared = (load_file(f / "adapter_model.safetensors") for f in (run / "export", folder))
    assert shared.keys() - actor.keys() == {"base_model.model.score.weight"}
    assert all(torch.equal(shared[name], weight) for name, weight in actor.items())


@pytest.mark.parametrize(
    "options",
    [
        {"reference": "base", "critic": "actor"},
        {"reference": "dpo", "critic": "reward export"},
        {"reference": "dpo", "critic": "reward export", "adapter__rank": None},  # whole models, from merged adapters
    ],
    ids=str,
)
def test_an_adapter_is_accepted_wherever_a_model_is(chain, files, tiny_model, tmp_path, options):
    named = {"dpo": chain["dpo"] / "export", "base": tiny_model(), "reward export": chain["reward"] / "export"}
    options = {name: named.get(value, value) for name, value in options.items()}
    run = ppo(tmp_path, files, chain["sft"] / "export", chain["reward"] / "export", **options)
    assert (run / "export" / "model.safetensors").exists() is ("adapter__rank" in options)
    if "adapter__rank" in options:
        logprobs(AutoModelForCausalLM.from_pretrained(run / "export"))
    assert load_critic(str(export(run, role="critic")))(TOKENS).abs().max() > 0


def test_whole_models_are_trained_from_adapters(chain, files, tmp_path):
    """Without model.adapter, every module starts from the merged weights."""
    texts = f"--data.train={files / 'texts.jsonl'}", "--data.prompt=prompt", "--data.response=response"
    pairs, sft = f"--data.train={files / 'pairs.jsonl'}", chain["sft"] / "export"
    whole = {"adapter__rank": None}
    runs = [
        fit(tmp_path / "sft", "SFT", "Demonstrations", *texts, actor=sft, **whole),
        fit(tmp_path / "dpo", "DPO", "Preferences", pairs, actor=sft, reference=chain["dpo"] / "export", **whole),
        fit(tmp_path / "rm", "RewardModeling", "Preferences", pairs, reward=chain["reward"] / "export", **whole),
    ]
    for run in runs:
        assert (run / "export" / "model.safetensors").exists()
        assert not (run / "export" / "adapter_config.json").exists()
    load_reward_model(str(runs[2] / "export"))


@pytest.mark.parametrize(
    ("stage", "role"), [("sft", "critic"), ("dpo", "reward"), ("ppo", "reward"), ("reward", "actor")]
)
def test_a_role_that_the_run_does_not_have_is_refused(chain, stage, role):
    with pytest.raises(UserError, match=f"does not contain a {role} model"):
        export(chain[stage], role=role)
