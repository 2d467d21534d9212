"""What the command sets by itself where there is a GPU, and that it sets nothing on a CPU."""

import os
import subprocess
import sys

import pytest
import torch
import yaml

from lit_rlhf.cli import ALLOCATOR_VARIABLES, main

pytestmark = pytest.mark.usefixtures("without_plans")
REWARD = "lit_rlhf.data.reviews:reward"
MATMUL = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)


@pytest.fixture
def matmul_precision():
    """Begin with products of float32 numbers whose precision nobody has set, and restore it."""
    before = [backend.fp32_precision for backend in MATMUL]
    for backend in MATMUL:
        backend.fp32_precision = "none"
    yield lambda: torch.backends.cuda.matmul.fp32_precision
    for backend, precision in zip(MATMUL, before, strict=True):
        backend.fp32_precision = precision


@pytest.fixture
def pretend(monkeypatch):
    """Return a function that makes torch claim that there is a GPU; Lightning still trains on the CPU."""

    def gpu(bfloat16: bool) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        # a build of torch with CUDA would otherwise ask the driver whether the optimizer's step is being captured
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True: bfloat16 or including_emulation
        )
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 0)

    return gpu


@pytest.fixture
def fit(tiny_model, prompt_file, tmp_path, matmul_precision):
    """Return a function that runs one iteration, and returns the precision that ``config.yaml`` states."""

    def run(*options: str) -> str:
        words = ["fit", "--model", "PolicyGradient", "--model.actor", str(tiny_model("llama"))]
        words += [f'--model.rewards=[{{"class_path": "RewardFunction", "init_args": {{"function": "{REWARD}"}}}}]']
        words += ["--model.iterations", "1", "--model.sampling.max_tokens", "4", "--data", "Prompts"]
        words += ["--model.update.epochs", "1", "--model.update.minibatches", "1", "--report.at_end", "false"]
        words += ["--data.train", str(prompt_file), "--data.batch_size", "8", "--trainer.enable_progress_bar", "false"]
        main([*words, "--trainer.default_root_dir", str(tmp_path / "run"), *options])
        return yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["trainer"]["precision"]

    return run


@pytest.mark.parametrize(
    ("bfloat16", "options", "precision", "products"),
    [
        (True, [], "bf16-mixed", "tf32"),
        (False, [], "32-true", "tf32"),
        pytest.param(True, ["--trainer.precision", "32-true"], "32-true", "tf32", marks=pytest.mark.long),
        (True, ["--trainer.accelerator", "cpu"], "32-true", "none"),
    ],
    ids=["GPU", "older GPU", "float32 on a GPU", "CPU beside a GPU"],
)
def test_with_a_gpu(pretend, fit, matmul_precision, bfloat16, options, precision, products):
    pretend(bfloat16)
    assert fit(*options) == precision
    assert matmul_precision() == products


def test_without_a_gpu(fit, matmul_precision):
    assert fit("--trainer.accelerator", "cpu") == "32-true"
    assert matmul_precision() == "none"


def test_a_setting_of_the_users_own_modules_is_kept(pretend, fit, matmul_precision):
    pretend(True)
    torch.set_float32_matmul_precision("highest")
    fit()
    assert matmul_precision() == "ieee"


def test_a_resumed_run_keeps_its_precision_on_another_device(pretend, fit, tmp_path):
    assert fit("--trainer.accelerator", "cpu") == "32-true"
    pretend(True)
    saved = tmp_path / "run" / "config.yaml"
    saved.write_text(saved.read_text().replace("accelerator: cpu", "accelerator: auto"))
    main(["fit", "--config", str(saved), "--ckpt_path", "last", "--model.iterations", "2"])
    assert yaml.safe_load(saved.read_text())["trainer"]["precision"] == "32-true"


@pytest.mark.parametrize("given", [None, *ALLOCATOR_VARIABLES])
def test_the_allocator_is_configured_before_torch_is_imported(given):
    """The user's own setting, under any of its names, is kept."""
    code = (
        "import os, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch': sys.exit(str([os.environ.get(v) for v in " + str(ALLOCATOR_VARIABLES) + "]))\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from lit_rlhf.cli import main\n"
        "main(['fit', '--help'])\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ALLOCATOR_VARIABLES}
    environment |= {} if given is None else {given: "max_split_size_mb:64"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    found = dict(zip(ALLOCATOR_VARIABLES, eval(done.stderr), strict=True))
    expected = {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    assert {k: v for k, v in found.items() if v} == (expected if given is None else {given: "max_split_size_mb:64"})
