"""A small server with the routes of vLLM that the engine uses; it samples with transformers, one token at a time.

python tests/generation/vllm_server.py --model FOLDER --port PORT [options of vLLM, which are ignored]
"""

import argparse
import json
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit


def read_model(folder):
    """Read a model as vLLM does on a CPU: the output layer must have a weight of its own."""
    import torch  # here, so that servers without a model start at once
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    config = json.loads((Path(folder) / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    with safe_open(Path(folder) / "model.safetensors", "pt") as file:
        assert {"lm_head.weight", "embed_out.weight"} & set(file.keys())
        dtypes = {str(file.get_tensor(name).dtype) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    assert dtypes == {f"torch.{config['dtype']}"}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def respond(model, request):
    """Return the choice of vLLM's answer to a request for one response."""
    import torch

    assert (request["ignore_eos"], request["return_token_ids"], request["logprobs"]) == (True, True, 0)
    assert (request["top_k"], request["top_p"], request["min_p"], request["repetition_penalty"]) == (0, 1, 0, 1)
    generator = torch.Generator().manual_seed(request["seed"])
    tokens, logprobs, temperature = [], [], request["temperature"]
    while len(tokens) < request["max_tokens"] and not set(tokens) & set(request["stop_token_ids"]):
        logits = model(torch.tensor([request["prompt"] + tokens])).logits[0, -1].detach()
        if len(tokens) < request["min_tokens"]:
            logits[request["stop_token_ids"]] = -torch.inf
        distribution = torch.log_softmax(logits / (temperature or 1.0), -1)
        greedy, drawn = distribution.argmax(), torch.multinomial(distribution.exp(), 1, generator=generator)
        tokens.append(int(drawn if temperature else greedy))
        logprobs.append(float(distribution[tokens[-1]]))
    return {"index": 0, "token_ids": tokens, "logprobs": {"token_logprobs": logprobs}}


DROP = "no answer"
CANNED = "always the same response"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.do_POST()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "null")
        path, state = urlsplit(self.path).path, self.server
        with state.lock:
            number = sum(request[0] == path for request in state.requests)
            state.requests.append((path, body))
        failure = state.fail(self, path, number)
        if failure == DROP:
            self.close_connection = True
        elif failure is not None:
            self.answer(*failure)
        else:
            with state.lock:
                answer = self.route(path, body, state)
            self.answer(200, answer)

    def route(self, path, body, state):
        if path == "/v1/models":
            return {"data": [{"id": "served", "max_model_len": state.max_model_len}]}
        if path == "/server_info":
            return {"vllm_config": {"model_config": {"logprobs_mode": state.logprobs_mode}}}
        if path == "/collective_rpc":
            assert body["method"] == "reload_weights"
            if state.model != CANNED:
                state.model = read_model(body["kwargs"]["weights_path"])
            return {"results": [None]}
        if path == "/reset_prefix_cache":
            return {"success": True}
        if path == "/update_weight_version":
            state.version = body["new_version"]
            return {"success": True, "new_version": state.version}
        if path == "/weight_info":
            return {"weight_version": state.version}
        if path == "/v1/load_lora_adapter":
            from peft import PeftModel

            if not isinstance(state.model, PeftModel):
                state.base = state.model
            assert not state.adapters
            state.adapters.add(body["lora_name"])
            state.model = PeftModel.from_pretrained(state.base, body["lora_path"]).eval()
            return "Success: LoRA adapter added successfully."
        if path == "/v1/unload_lora_adapter":
            state.adapters.remove(body["lora_name"])
            state.model = state.model.unload()
            return "Success: LoRA adapter removed successfully."
        if path == "/v1/completions":
            assert body["model"] in (state.adapters or {"served", "actor"})
            if state.model == CANNED:
                return {"choices": [{"token_ids": [7] * 6, "logprobs": {"token_logprobs": [-1.0] * 6}}]}
            return {"choices": [respond(state.model, body)]}
        assert path == "/health", path
        return {}

    def answer(self, status, value):
        content = (value if isinstance(value, str) else json.dumps(value)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


class FakeVLLM(ThreadingHTTPServer):
    """The server; ``fail(handler, path, number)`` may return another answer: its status and content, or DROP."""

    daemon_threads, block_on_close, request_queue_size = True, False, 128

    def __init__(self, port=0, fail=lambda handler, path, number: None):
        super().__init__(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.fail, self.requests, self.lock = fail, [], threading.RLock()
        self.base, self.adapters = None, set()
        self.model, self.version, self.max_model_len, self.logprobs_mode = None, "default", 64, "processed_logprobs"


@contextmanager
def serving(**options):
    server = FakeVLLM(**options)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--port", type=int)
    parser.add_argument("--fail", default="")
    options, _ = parser.parse_known_args()
    print("settings:", os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("MASTER_PORT"), *sys.argv[1:], flush=True)
    if options.fail == "start":
        print("ValueError: no memory for the cache\nbye", file=sys.stderr)
        sys.exit(3)
    if options.fail == "slow":
        threading.Event().wait()
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])  # like vLLM's EngineCore
    print("processes:", os.getpid(), child.pid, flush=True)
    server = FakeVLLM(options.port)
    server.model = CANNED if options.fail else read_model(options.model)

    def fail(handler, path, number):
        if options.fail == "completion" and path == "/v1/completions" and number == 3:
            print("RuntimeError: out of memory", flush=True)
            os._exit(7)
        if options.fail == "hang" and path == "/v1/completions":
            threading.Event().wait()

    server.fail = fail
    server.serve_forever()


if __name__ == "__main__":
    main()
