import json
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Return the folder in which `datasets` caches records and tokens; it is empty at first."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model("llama"))


@pytest.fixture
def chat_tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model("llama", chat=True))


@pytest.fixture
def make_data(tmp_path):
    """Return a function that makes a data module and sets it up as a Trainer with this many processes would."""

    def make(kind, file, tokenizer, records, stage="fit", rank=0, world_size=1, **options):
        path = tmp_path / file
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        data = kind(**({"train": str(path), "validation": str(path), "batch_size": 2} | options))
        data.trainer = SimpleNamespace(
            lightning_module=SimpleNamespace(tokenizer=tokenizer),
            world_size=world_size,
            global_rank=rank,
            is_global_zero=rank == 0,
        )
        data.setup(stage)
        return data

    return make
