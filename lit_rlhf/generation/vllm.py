"""Generation by a vLLM server, over HTTP: vLLM need not be installed in the training environment."""

from __future__ import annotations

import shutil
import uuid
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from lit_rlhf.errors import UserError
from lit_rlhf.generation.collectives import broadcast, gather, rank
from lit_rlhf.generation.completions import Response, completion_request, draw_responses, to_rollout
from lit_rlhf.generation.engine import DetachedEngine, EngineContext, PendingRollout, Sampling, SpecialTokens
from lit_rlhf.generation.server import Server
from lit_rlhf.generation.vllm_adapters import (
    ServedAdapters,
    check_adapter,
    push_adapter,
    remove_adapter,
    trained_weights,
)
from lit_rlhf.generation.vllm_weights import check_version, push_weights
from lit_rlhf.generation.weights_folder import WeightsFolder
from lit_rlhf.http import JSONClient, check_url
from lit_rlhf.models.actor import Actor
from lit_rlhf.models.scoring import strip_prefix
from lit_rlhf.models.sharding import full_state_dict
from lit_rlhf.randomness import Stream, row_seeds
from lit_rlhf.types import PromptBatch, Rollout

LOGPROBS_MODE = "processed_logprobs"
"""The mode in which vLLM computes log-probabilities after it has divided the logits by the temperature."""
ENDING_SECONDS = 2.0
"""If the server ends within this number of seconds after a failed request, the error message reports that it ended."""


@dataclass(frozen=True, slots=True)
class Job:
    """Process 0's requests to the server for one rollout, and the weights with which the server answers them."""

    folder: Path | None  # with the weights or the adapter; None to use the base model without adapters
    requests: list[dict[str, Any]]  # one for each response of all processes
    rows: list[int]  # the number of responses of each process
    min_tokens: int
    vocabulary: int  # the number of tokens in the model's vocabulary


class VLLMEngine(DetachedEngine):
    """An engine that requests responses from a vLLM server: a running server, or one that the engine starts and ends.

    Before each rollout, process 0 writes the actor's weights to a folder, from which the server reads them. Each
    response is one request with a seed of its own, which is a function of the run's seed, the purpose (training,
    validation or prediction), the iteration and the row.

    The engine does not give entropies (they are 0). In float32, its log-probabilities equal the actor's up to rounding.
    Under ``bf16-mixed``, they differ more, because the server stores some numbers in bfloat16 that the actor stores in
    float32.

    Values of ``top_k`` and ``top_p`` that restrict the distribution are refused, because the server's log-probabilities
    would refer to the restricted distribution. With ``min_tokens``, a stop token that comes too early is replaced by
    a new draw. At temperature 0, the server forbids such stop tokens instead, and the log-probabilities of the first
    ``min_tokens`` tokens refer to the distribution without the stop tokens.

    A server that is already running must be vLLM 0.32 or later, with the environment variable
    ``VLLM_SERVER_DEV_MODE=1`` and the arguments ``--logprobs-mode processed_logprobs --dtype float32`` (``bfloat16``
    for ``bf16-mixed``). If the actor has an adapter, the server also needs ``VLLM_ALLOW_RUNTIME_LORA_UPDATING=1``,
    ``--enable-lora`` and a sufficient ``--max-lora-rank``. Whoever reaches the server's port can control the server. On
    a CPU, the server's model must not have tied embeddings.

    Args:
        url: The address of a server that is already running, such as ``http://127.0.0.1:8000``; None to start one.
        python: The Python interpreter of an environment in which vLLM is installed; None to use ``url``.
        devices: The indices of the GPUs for the server that is started, among those that the run may use. vLLM
            divides each layer between several GPUs (tensor parallelism). None to let the server see all of these GPUs,
            of which it uses one, unless ``server_args`` ask for more.
        max_model_len: The maximum number of tokens in a prompt with its response, for the server that is started; None
            for the maximum that the model and the memory allow.
        weights_dir: The folder in which weights are passed to the server; None for shared memory if there is room for
            them, and for the directory of temporary files otherwise. A server on another machine must see the same
            folder under the same path.
        timeout: The maximum number of seconds to wait for a response, or for the server to read new weights.
        startup_timeout: The maximum number of seconds to wait for the first answer of a server that the engine starts.
        connections: The maximum number of requests that are sent to the server at the same time.
        server_args: Further arguments for the server that is started; they take precedence over the engine's own.

    Raises:
        ValueError: if both or neither of ``url`` and ``python`` are given, if an option for starting a server is given
            with ``url``, or if a number is out of range.
        UserError: in ``start``, if the server cannot be reached, does not start, or is not set up for this engine, or
            if vLLM cannot compute with the actor's adapter; in ``begin`` and ``generate``, if top-k or top-p restricts
            the distribution; in ``generate``, also if the responses could not be generated.

    >>> VLLMEngine(url="http://127.0.0.1:8000", python="vllm-env/bin/python")
    Traceback (most recent call last):
        ...
    ValueError: engine: give either url, the address of a vLLM server, or python, a program that can start one

    In a configuration, with GPUs 0 to 2 for training and GPU 3 for the server::

        model:
          engine:
            class_path: VLLMEngine
            init_args: {python: vllm-env/bin/python, devices: [3], max_model_len: 1024}
        trainer: {devices: [0, 1, 2]}
    """

    def __init__(
        self,
        url: str | None = None,
        python: str | None = None,
        devices: list[int] | None = None,
        max_model_len: int | None = None,
        weights_dir: str | None = None,
        timeout: float = 600.0,
        startup_timeout: float = 600.0,
        connections: int = 256,
        server_args: list[str] | None = None,
    ) -> None:
        if (url is None) == (python is None):
            raise ValueError(
                "engine: give either url, the address of a vLLM server, or python, a program that can start one"
            )
        for name, value in (("devices", devices), ("max_model_len", max_model_len), ("server_args", server_args)):
            if url is not None and value is not None:
                raise ValueError(
                    f"engine.{name} is an option for starting a server, but engine.url names a running server"
                )
        for name, number in (("timeout", timeout), ("startup_timeout", startup_timeout)):
            if number <= 0:
                raise ValueError(f"engine.{name} must be positive, not {number}")
        for name, whole in (("max_model_len", max_model_len), ("connections", connections)):
            if whole is not None and whole < 1:
                raise ValueError(f"engine.{name} must be 1 or more, not {whole}")
        if devices is not None and (not devices or min(devices) < 0):
            raise ValueError(f"engine.devices must be indices of GPUs, or null for vLLM's choice, not {devices}")
        self.url = check_url(url, "model.engine.url")
        self.python = python
        self.devices = devices
        self.max_model_len = max_model_len
        self.weights_dir = weights_dir
        self.timeout = timeout
        self.startup_timeout = startup_timeout
        self.connections = connections
        self.server_args = server_args
        self._dtype = torch.float32
        self._server: Server | None = None
        self._client: JSONClient | None = None
        self._folder: WeightsFolder | None = None
        self._adapters: ServedAdapters | None = None
        self._has_adapter = False
        self._model: dict[str, Any] = {}  # the server's description of its model
        self._run = ""
        self._pushes = count(1)

    # ------------------------------------------------------------------ the server

    def start(self, context: EngineContext) -> None:
        """Start the server or connect to it, on process 0; all processes call this method together.

        Args:
            context: The properties of the run that the engine needs.

        Raises:
            UserError: on all processes, if vLLM cannot compute with the actor's adapter, if process 0 cannot load the
                actor, if it cannot start or reach the server, or if the server is not set up for this engine.
        """
        self.close()
        self._dtype = torch.bfloat16 if context.precision.startswith("bf16") else torch.float32
        self._has_adapter = context.adapter is not None
        if context.adapter is not None:
            check_adapter(context.adapter, context.source)
        problem = ""
        if rank() == 0:
            try:
                self._connect(context)
            except Exception as error:
                problem = _line(error)
        problem = broadcast(problem)
        if problem:
            self.close()
            raise UserError(problem)

    def close(self) -> None:
        """Abandon all requests, end the server if this engine started it, and remove the folder of weights."""
        for part in (self._client, self._server, self._folder):
            if part is not None:
                part.close()
        self._client = self._server = self._folder = None

    def _connect(self, context: EngineContext) -> None:
        self._adapters = ServedAdapters(context) if context.adapter is not None else None
        url, option = self.url, "model.engine.url"
        if url is None:
            url, option = self._start_server(context), "model.engine"
        self._client = JSONClient(url, option, timeout=self.timeout, connections=self.connections, retry_timeouts=False)
        if self._server is None:
            self._check_server(self._client)
        else:
            self._server.when_ended(self._client.close)
        self._model = self._client.get("/v1/models")["data"][0]
        self._run = uuid.uuid4().hex[:8]

    def _start_server(self, context: EngineContext) -> str:
        assert self.python is not None
        if self._adapters is None:
            actor = context.load_actor()
            folder = self._write(actor, full_state_dict(actor))
            assert folder is not None
            model = str(folder)
        else:
            folder, model = self._weights_folder(0).new(), self._adapters.base
        context.tokenizer.save_pretrained(folder)
        arguments = ["--dtype", str(self._dtype).removeprefix("torch."), "--logprobs-mode", LOGPROBS_MODE]
        arguments += ["--tokenizer", str(folder)] + ([] if self._adapters is None else self._adapters.arguments)
        arguments += ["--max-model-len", str(self.max_model_len or "auto"), "--generation-config", "vllm"]
        arguments += ["--disable-uvicorn-access-log"]
        if self.devices is not None:
            arguments += ["--tensor-parallel-size", str(len(self.devices))]
        elif context.device.type == "cpu":
            arguments += ["--enforce-eager"]  # compilation takes a minute, and gains little
        arguments += self.server_args or []
        assert self._folder is not None
        self._server = Server(self.python, model, arguments, devices=self.devices, folder=self._folder.path)
        self._server.wait(self.startup_timeout)
        for file in folder.glob("*.safetensors"):  # the server has read them, and will get new ones
            file.unlink()
        return self._server.url

    def _check_server(self, client: JSONClient) -> None:
        """Check a server that this engine did not start.

        Raises:
            UserError: if the server does not answer or is not set up for this engine, or if it is on another machine
                and ``weights_dir`` is not set.
        """
        host = urlsplit(client.url).hostname
        if self.weights_dir is None and host not in ("localhost", "127.0.0.1", "::1"):
            raise UserError(f"model.engine.weights_dir is not set: name a folder that {host} and this machine share")
        try:
            config = client.get("/server_info?config_format=json")["vllm_config"]["model_config"]
        except UserError as error:
            if "answered 404" not in str(error):
                raise
            raise UserError(f"{error}; start vLLM (0.32 or later) with VLLM_SERVER_DEV_MODE=1") from error
        if config["logprobs_mode"] != LOGPROBS_MODE:
            raise UserError(
                f"{client.option}: the server's --logprobs-mode must be {LOGPROBS_MODE}, not {config['logprobs_mode']}"
            )

    # ------------------------------------------------------------------ a rollout

    def begin(
        self,
        actor: Actor,
        prompts: PromptBatch,
        sampling: Sampling,
        special_tokens: SpecialTokens,
        *,
        stream: Stream,
        iteration: int,
    ) -> PendingRollout:
        """Write the actor's current weights for the server, and return a pending rollout that is generated with them.

        All processes call this method together; the arguments are those of `Engine.generate`. If process 0 cannot
        write the weights, or if a prompt is too long for the server, the rollout's ``result`` raises the error.

        Raises:
            UserError: if top-k or top-p restricts the distribution.
        """
        for option, is_off in (("top_k", sampling.top_k == 0), ("top_p", sampling.top_p == 1)):
            if not is_off:
                raise UserError(
                    f"model.sampling.{option} is {getattr(sampling, option)}: VLLMEngine samples from the full "
                    "distribution only, because the server's log-probabilities would be those of the restricted one"
                )
        n = sampling.responses
        rows = (prompts.group[:, None] * n + torch.arange(n, device=prompts.group.device)).flatten()
        seeds = row_seeds(stream, iteration, rows)
        texts = [tokens[mask].tolist() for tokens, mask in zip(prompts.tokens.cpu(), prompts.mask.cpu(), strict=True)]
        asked = gather([(text, seed) for i, text in enumerate(texts) for seed in seeds[i * n : (i + 1) * n]])
        weights = trained_weights(actor) if self._has_adapter else full_state_dict(actor)
        pending = _PendingRollout(self, prompts, sampling, special_tokens)
        if rank() == 0:
            assert self._client is not None, "call start() first"
            try:
                self._check_length(max(len(text) for part in asked for text, _ in part), sampling)
                folder = self._write(actor, weights)
            except Exception as error:  # the other processes must be told of it
                pending.problem = _line(error)
                return pending
            name = self._model["id"]
            pending.job = Job(
                folder=folder,
                requests=[
                    completion_request(name, text, seed, sampling, special_tokens)
                    for part in asked
                    for text, seed in part
                ],
                rows=[len(part) for part in asked],
                min_tokens=sampling.min_tokens if sampling.temperature else 0,
                vocabulary=actor.model.config.vocab_size,
            )
        return pending

    def answer(self, job: Job) -> list[list[Response]]:
        """Make the server read a job's weights and answer the job's requests; remove the weights' files in any case.

        Args:
            job: The requests, and the weights to answer them with.

        Returns:
            The responses of each process.

        Raises:
            UserError: if the server ends, does not answer, cannot load the weights, or no longer has them at the end;
                if an answer does not fit its request; or if a response cannot reach the minimum length.
        """
        client = self._client
        assert client is not None, "the engine is closed"
        try:
            version, requests = f"{self._run}-{next(self._pushes)}", job.requests
            if self._adapters is None:
                push_weights(client, version, job.folder)
            elif job.folder is not None:
                push_adapter(client, version, job.folder)
                requests = [{**request, "model": version} for request in requests]
            responses = iter(draw_responses(client, requests, job.min_tokens, job.vocabulary))
            if self._adapters is None:
                check_version(client, version)
            elif job.folder is not None:
                remove_adapter(client, version)
            return [list(islice(responses, rows)) for rows in job.rows]
        except UserError as error:
            if self._server is None:
                raise
            ended = self._server.ended(ENDING_SECONDS)
            raise UserError(ended or f"{error} (the server's log: {self._server.log})") from error
        finally:
            if job.folder is not None:
                shutil.rmtree(job.folder, ignore_errors=True)

    def _check_length(self, longest: int, sampling: Sampling) -> None:
        most = self._model["max_model_len"]
        if longest + sampling.max_tokens > most:
            raise UserError(
                f"model.engine.max_model_len: the server takes {most} tokens, but the longest prompt has {longest}, "
                f"and model.sampling.max_tokens is {sampling.max_tokens}"
            )

    def _write(self, actor: Actor, weights: dict[str, Tensor]) -> Path | None:
        """Write an actor's weights to a new folder, and return the folder.

        The argument ``weights`` is the full ``state_dict`` or, in a run with an adapter, the result of
        `trained_weights`. In such a run, None is returned if the actor uses the base model without adapters.
        """
        if self._adapters is not None:
            folder = self._weights_folder(0).new()
            return folder if self._adapters.write(actor, weights, folder) else None
        own = strip_prefix("model.", weights)
        size = sum(weight.numel() for weight in own.values()) * self._dtype.itemsize
        return self._weights_folder(size).write(actor.model, own, self._dtype)

    def _weights_folder(self, size: int) -> WeightsFolder:
        self._folder = self._folder or WeightsFolder(self.weights_dir, size)
        return self._folder


class _PendingRollout(PendingRollout):
    def __init__(
        self, engine: VLLMEngine, prompts: PromptBatch, sampling: Sampling, special_tokens: SpecialTokens
    ) -> None:
        self.engine, self.prompts, self.sampling, self.special_tokens = engine, prompts, sampling, special_tokens
        self.job: Job | None = None  # on process 0
        self.responses: list[list[Response]] = []  # of each process, on process 0
        self.problem = ""

    def run(self) -> None:
        if self.job is None:
            return
        try:
            self.responses = self.engine.answer(self.job)
        except Exception as error:
            self.problem = _line(error)

    def result(self) -> Rollout:
        problem, responses = broadcast((self.problem, self.responses))
        if problem:
            raise UserError(problem)
        return to_rollout(responses[rank()], self.prompts, self.sampling, self.special_tokens)


def _line(error: Exception) -> str:
    """Return an error as one line: the message of a `UserError`, or the class and the message of another error."""
    return " ".join((str(error) if isinstance(error, UserError) else f"model.engine: {error!r}").split())
