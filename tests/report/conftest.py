import json
import shutil

import preloaded
import pytest

HOSTILE = "</script><img src=x onerror=\"console.error('a response was run as code')\">"


@pytest.fixture(scope="session")
def run_of_ppo(tiny_model, prompt_file, tmp_path_factory):
    """Return a folder with the run ``ppo``, a real one of three iterations, and what the command printed."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "reward.py").write_text(
        "def reward(responses):\n    return [len(set(r.split())) / 10 for r in responses]\n"
    )
    done = preloaded.run(
        *("-m", "lit_rlhf.cli", "fit", "--model", "PolicyGradient", "--model.actor", str(tiny_model("llama"))),
        '--model.rewards=[{"class_path": "RewardFunction", "init_args": {"function": "reward.py:reward"}}]',
        *("--model.iterations", "3", "--model.sampling.max_tokens", "10", "--model.kl.coef", "0.05"),
        *("--data", "Prompts", "--data.train", str(prompt_file), "--data.validation", str(prompt_file)),
        *("--data.batch_size", "8", "--trainer.default_root_dir", "runs/ppo", "--trainer.accelerator", "cpu"),
        *("--trainer.val_check_interval", "1", "--trainer.check_val_every_n_epoch", "null"),
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "ppo", done.stdout


@pytest.fixture(scope="session")
def other_run(run_of_ppo):
    """Return the folder of a run with another option, one response of which is HTML."""
    folder = run_of_ppo[0].with_name("careful")
    shutil.copytree(run_of_ppo[0], folder)
    config = (folder / "config.yaml").read_text()
    assert "coef: 0.05" in config
    (folder / "config.yaml").write_text(config.replace("coef: 0.05", "coef: 0.5"))
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    lines[0] |= {"response": HOSTILE, "prompt": HOSTILE, "tokens": {"text": [HOSTILE], "kl_to_ref": [float("nan")]}}
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
