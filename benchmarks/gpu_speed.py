"""The checks of gpu.py that measure speed and memory, beside the rates that matrix products and copies reach."""

import csv
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import torch
import transformers
from floor import matrix_rate, operations
from gpu_runs import SHAPES, Number, Setting, trainer, write_models, write_prompts
from lightning.pytorch.profilers import SimpleProfiler

from lit_rlhf import (
    ActivationCheckpointing,
    CompileLayers,
    MetricsFile,
    NativeEngine,
    PolicyGradient,
    PrintPlan,
    Prompts,
    RewardFunction,
    RewardModel,
    Sampling,
    Update,
)

WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")


class Rates(NamedTuple):
    """What the device reaches: operations per second by precision, and bytes per second, read and written."""

    half: float
    single: float
    copy: float


def rates(setting: Setting) -> Rates:
    """Return the rates of the device, measured now unless an earlier check has measured them."""
    path = setting.folder / "rates.json"
    if not path.exists():
        size, seconds = (256, 0.05) if setting.small else (8192, 0.5)
        measured = [
            matrix_rate(dtype, seconds, [(size, size, size)], setting.device)
            for dtype in (torch.bfloat16, torch.float32)
        ]
        path.write_text(json.dumps([*measured, _copy_rate(setting)]))
    return Rates(*json.loads(path.read_text()))


def _copy_rate(setting: Setting) -> float:
    source = torch.ones(2**22 if setting.small else 2**29, dtype=torch.float32, device=setting.device)
    target, times = torch.empty_like(source), []
    for _ in range(5):
        _synchronize(setting)
        began = time.perf_counter()
        target.copy_(source)
        _synchronize(setting)
        times.append(time.perf_counter() - began)
    return 2 * source.nbytes / min(times)


def _synchronize(setting: Setting) -> None:
    if setting.device == "cuda":
        torch.cuda.synchronize()


def device(setting: Setting) -> Iterator[Number]:
    """Name the device and the versions, and measure the rates on which the other checks' bounds are based."""
    yield Number("python", sys.version.split()[0])
    for library in (torch, lightning, transformers):
        yield Number(library.__name__, library.__version__)
    yield Number("CUDA, cuDNN", f"{torch.version.cuda}, {torch.backends.cudnn.version()}")
    if setting.device == "cuda":
        if shutil.which("nvidia-smi"):
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            yield Number("driver", subprocess.run(query, capture_output=True, text=True).stdout.strip())
        properties = torch.cuda.get_device_properties(0)
        yield Number("GPU", properties.name)
        yield Number("memory", properties.total_memory / 2**30, unit="GiB")
    torch.set_float32_matmul_precision("highest")
    half, single, copy = rates(setting)
    yield Number("matrix products in bf16", setting.on_gpu(half / 1e12), unit="TFLOP/s")
    yield Number("matrix products in fp32", setting.on_gpu(single / 1e12), unit="TFLOP/s")
    yield Number("copy, bytes read and written", setting.on_gpu(copy / 1e9), unit="GB/s")


def zeros(responses: list[str]) -> list[float]:
    """Return a reward of 0 for each response."""
    return [0.0] * len(responses)


def decode(setting: Setting, size: str, compiled: bool) -> Iterator[Number]:
    """Measure decoding at two batch sizes, against the time that reading the weights and the cache would take.

    The time of a step is that of a long generation less that of a short one, over the difference of their steps.
    """
    torch.set_float32_matmul_precision("high")
    prompt, short, long = (8, 4, 12) if setting.small else (128, 32, 160)
    module = _sampler(setting, size, compiled)
    for batch in (2,) if setting.small else (8, 64):
        seconds = _generate(setting, module, batch, prompt, [short, long] * 3)
        step = (min(seconds[3::2]) - min(seconds[2::2])) / (long - short)
        reads = _bytes_of_a_step(size, batch, prompt + (short + long) / 2)
        about = f"batch {batch}"
        yield Number(f"{about}: tokens", setting.on_gpu(batch / step), unit="per second")
        # a plan of cuDNN for every token, for example, takes longer than all of a step should
        yield Number(f"{about}: a step", setting.on_gpu(1e3 * step), at_most=10 if compiled else 40, unit="ms")
        share = reads / rates(setting).copy / step
        yield Number(f"{about}: share of the bandwidth's bound", setting.on_gpu(share), 1, 0.2 if compiled else None)


def _sampler(setting: Setting, size: str, compiled: bool) -> PolicyGradient:
    return PolicyGradient(
        actor=f"{write_models(setting, size)}/policy",
        critic=None,
        rewards=[RewardFunction(f"{__file__}:zeros")],
        engine=NativeEngine(compile=compiled),
    )


class Lengths(lightning.Callback):
    """A callback that sets the length of the responses to each batch of ``predict``."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths

    def on_predict_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, *_: Any) -> None:
        """Set the length."""
        pl_module.sampling = Sampling(max_tokens=self.lengths[batch_idx])


def _generate(setting: Setting, module: PolicyGradient, batch: int, prompt: int, lengths: list[int]) -> list[float]:
    """Return the seconds in which responses of each of these lengths to a batch of prompts were generated."""
    data = Prompts(predict=write_prompts(setting, batch * len(lengths), prompt, prompt), validation_batch_size=batch)
    profiler = SimpleProfiler()
    made = trainer(setting, precision="bf16-mixed", profiler=profiler, callbacks=[Lengths(lengths)])
    made.predict(module, datamodule=data)
    return profiler.recorded_durations["generate"]


def _bytes_of_a_step(size: str, batch: int, length: float) -> float:
    """Return the minimum number of bytes that a decoding step reads: weights, keys and values, in bfloat16."""
    shape = SHAPES[size]
    h, layers = shape["hidden_size"], shape["num_hidden_layers"]
    kv = h * shape["num_key_value_heads"] // shape["num_attention_heads"]
    weights = layers * (2 * h * h + 2 * h * kv + 3 * h * shape["intermediate_size"]) + h * shape["vocab_size"]
    return 2.0 * (weights + batch * length * layers * 2 * kv)


def waits(setting: Setting) -> Iterator[Number]:
    """Count how often a decoding step waits for the device, and how many kernels it launches."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    names: tuple[tuple[str, ...], ...] = (("aten::_local_scalar_dense",), ("aten::add",))
    if setting.device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        names = (WAITS, LAUNCHES)
    module, (short, long) = _sampler(setting, setting.exact, compiled=False), (8, 40)
    _generate(setting, module, 8, 8, [short])
    counts = []
    for tokens in (short, long):
        with torch.profiler.profile(activities=activities) as profile:
            _generate(setting, module, 8, 8, [tokens])
        events = {event.key: event.count for event in profile.key_averages()}
        counts.append([sum(events.get(name, 0) for name in group) for group in names])
    waited, launched = ((after - before) / (long - short) for before, after in zip(*counts, strict=True))
    yield Number("waits that the profiler saw", setting.on_gpu(counts[1][0]), at_least=1)
    yield Number("waits for the device", setting.on_gpu(waited), 0.2, unit="a step")
    yield Number("kernels launched", setting.on_gpu(launched), unit="a step")


def update(
    setting: Setting, size: str, *, compiled: bool = False, recomputed: bool = False, strategy: str = "auto"
) -> Iterator[Number]:
    """Measure iterations of PPO with four models of a size in bf16: the update's speed, and the peak memory."""
    torch.set_float32_matmul_precision("high")
    prompt, response, batch = (8, 8, 4) if setting.small else (128, 128, 64)
    models = write_models(setting, size)
    module = PolicyGradient(
        actor=f"{models}/policy",
        critic="reward",
        rewards=[RewardModel(f"{models}/reward")],
        sampling=Sampling(max_tokens=response),
        update=Update(epochs=1, minibatches=2),
        iterations=3,
    )
    layers = [*([ActivationCheckpointing()] if recomputed else []), *([CompileLayers()] if compiled else [])]
    folder = setting.folder / f"update-{size}-{compiled}-{recomputed}-{strategy}"
    options: dict[str, Any] = {"strategy": strategy, "precision": "bf16-mixed", "default_root_dir": folder}
    data = Prompts(train=write_prompts(setting, 3 * batch, prompt, prompt), batch_size=batch, max_tokens=prompt)
    made = trainer(setting, callbacks=[MetricsFile(), *layers], **options)
    made.fit(module, datamodule=data)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    rows = _metrics(folder)
    seconds = {name: min(row[f"time/{name}"] for row in rows[1:]) for name in ("generate", "judge", "update")}
    length = round(statistics.mean(row["response/length"] for row in rows))
    counted = operations(models / "policy", prompt, [length] * batch, epochs=1)["update"]
    share = counted / seconds["update"] / rates(setting).half
    for name, value in seconds.items():
        yield Number(f"time of {name}", setting.on_gpu(value), unit="s")
    yield Number("update: MFU, of the measured rate", setting.on_gpu(share), 1, 0.2)
    predicted = predicted_peak(made, module)
    peak = setting.on_gpu(rows[-1]["perf/peak_memory_gib"])
    yield Number("peak memory", peak, 1.1 * predicted, 0.8 * predicted, unit="GiB")


def _metrics(folder: Path) -> list[dict[str, float]]:
    with (folder / "metrics.csv").open(encoding="utf-8") as lines:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(lines)]


# ---------------------------------------------------------------------------------------------- the plan's prediction


def predicted_peak(made: lightning.Trainer, module: PolicyGradient) -> float:
    """Return the peak memory, in GiB, that a plan predicts for a run that has ended."""
    return PrintPlan(checkpointing=False).plan(made, module).peak.bytes / 2**30
