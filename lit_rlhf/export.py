"""Export of a run as a Hugging Face folder: weights, tokenizer, generation configuration and model card."""

from pathlib import Path
from typing import Any, Literal

import torch
import transformers
import yaml
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import lit_rlhf
from lit_rlhf.checkpoints import read_weights
from lit_rlhf.errors import UserError
from lit_rlhf.files import replacing
from lit_rlhf.models.actor import Actor
from lit_rlhf.models.adapter_folders import base_of, read_adapter
from lit_rlhf.models.adapters import LoRA
from lit_rlhf.models.loading import ModelSource, RandomWeights, load_model, load_tokenizer
from lit_rlhf.models.scoring import ScalarModel, load_critic, strip_prefix, to_classifier
from lit_rlhf.models.trained_adapter import TrainedAdapter, weights_of
from lit_rlhf.yaml_text import read_yaml

Role = Literal["actor", "critic", "reward"]


def save_folder(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    card: str,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write weights (safetensors), configuration, generation configuration, tokenizer and model card to a folder.

    The folder gets its name when it is complete, and replaces any older folder of this name.

    Args:
        model: The model.
        tokenizer: The model's tokenizer.
        folder: The folder to write.
        card: The model card, in Markdown.
        weights: The full ``state_dict`` of a sharded model; None to use the model's own weights.
    """
    with replacing(folder) as new:
        model.save_pretrained(new, state_dict=weights)
        tokenizer.save_pretrained(new)
        (new / "README.md").write_text(card, encoding="utf-8")


def export(
    run: Path,
    checkpoint: str = "last",
    out: Path | None = None,
    role: Role | None = None,
    merge: bool = False,
    towards_start: float = 1.0,
) -> Path:
    """Export a model from a checkpoint as a Hugging Face folder or, for an adapter that is not merged, a peft folder.

    If the run averages the actor's weights (see `Averaging`), the exported actor has the averaged weights.

    Args:
        run: The run's folder, which contains ``config.yaml``.
        checkpoint: ``last``, ``best``, or a path.
        out: The folder to write; None for ``export`` in the run's folder, or ``export_ROLE`` for a model that the run
            trained besides its main one, with ``_merged`` at the end of the name if an adapter is merged, and
            ``_towards_start_SHARE`` if ``towards_start`` is not 1.
        role: ``actor``, ``critic`` or ``reward``; None for the run's main model: the reward model for reward modelling,
            the actor for all other runs.
        merge: Whether to add a trained adapter to the weights of its base model, and to export the result as a whole
            model.
        towards_start: The share s in (0, 1] of the change made in training that the actor keeps: its weights become
            start + s (actor − start), where start is the run's reference. An adapter's product B A is multiplied by s.
            Source: Ramé et al. 2024 (WARP, arXiv 2406.16768), equation LITI in section 3.3.

    Returns:
        The folder that was written.

    Raises:
        UserError: if the run or the checkpoint does not exist, the run's configuration does not name the main model,
            the checkpoint is incomplete or lacks the model, the tokenizer or the model that the run started from cannot
            be loaded, or transformers has no sequence classifier of the critic's or reward model's architecture; if
            ``out`` contains anything but an earlier export; or if ``towards_start`` is out of range, or is less than 1
            for a model other than an actor, for an adapter with DoRA or with a reference of its own, or for an actor
            whose parameters differ from the reference's.

    >>> export(Path("runs/ppo"), role="critic")
    Traceback (most recent call last):
    ...
    lit_rlhf.errors.UserError: runs/ppo is not the folder of a run: it has no config.yaml
    """
    if not 0 < towards_start <= 1:
        raise UserError(f"--towards-start must be above 0 and at most 1 (the trained weights), not {towards_start}")
    if out is not None:
        check_folder(out)
    options, path = _find(run, checkpoint)
    main_role: Role = "reward" if "reward" in options else "actor"
    role = role or main_role
    if towards_start < 1:
        check_start(options, role)
    state = read_weights(path)
    source = _source(options, main_role, run / "config.yaml")
    tokenizer = load_tokenizer(source, f"model.{main_role}")
    merge = merge and options.get("adapter") is not None
    name = "export" if role == main_role else f"export_{role}"
    name = f"{name}_merged" if merge else name  # a folder with a model and an adapter would count as an adapter
    folder = out or run / (name if towards_start == 1 else f"{name}_towards_start_{towards_start:g}")
    adapter, card = None, model_card(run, role, int(state["iteration"]), share=towards_start)
    averages = strip_prefix("averaged.", state) if role == "actor" else {}
    if options.get("adapter") is not None:
        state |= {f"actor.{name}": average for name, average in averages.items()}
        adapter = _trained_adapter(options, str(source), state, path, role).scaled(towards_start)
    if adapter is not None and not merge:
        base = base_of(str(source))
        adapter.save(tokenizer, folder, model_card(run, role, int(state["iteration"]), base, towards_start))
        return folder
    if adapter is not None:
        model = adapter.merged(tokenizer)
    elif role == "actor":
        model = _actor(source, state, path)
        model.load_state_dict(strip_prefix("model.", averages), strict=False)  # a tied weight has only one average
        if towards_start < 1:
            move_towards(model, load_model(_start(options, source), "causal", "model.reference"), towards_start)
    else:
        model = to_classifier(_scalar_model(options, source, state, path, role), tokenizer)
        if (scale := _scale(state)) is not None:
            model.config.score_mean, model.config.score_std = scale
    save_folder(model, tokenizer, folder, card)
    return folder


def _find(run: Path, checkpoint: str) -> tuple[dict[str, Any], Path]:
    """Return the options of a run's module, and the path of a checkpoint.

    Raises:
        UserError: if the run or the checkpoint does not exist.
    """
    config_file = run / "config.yaml"
    if not config_file.is_file():
        raise UserError(f"{run} is not the folder of a run: it has no config.yaml")
    path = run / "checkpoints" / f"{checkpoint}.ckpt" if checkpoint in ("last", "best") else Path(checkpoint)
    if not path.exists():
        available = ", ".join(sorted(p.name for p in (run / "checkpoints").glob("*.ckpt"))) or "nothing"
        raise UserError(f"there is no checkpoint {path}; {run / 'checkpoints'} contains: {available}")
    return read_yaml(config_file, "config").get("model", {}).get("init_args", {}), path


def check_folder(folder: Path) -> None:
    """Check that an export may replace a folder.

    Args:
        folder: The folder, which need not exist.

    Raises:
        UserError: if the folder contains anything but an earlier export, or is the current folder or one above it.

    >>> check_folder(Path("."))
    Traceback (most recent call last):
    ...
    lit_rlhf.errors.UserError: --out must name a folder for the export alone, not the current folder or one above it
    """
    if Path.cwd().is_relative_to(folder.resolve()):
        raise UserError("--out must name a folder for the export alone, not the current folder or one above it")
    if folder.is_dir() and any(folder.iterdir()):
        card = folder / "README.md"
        if not (card.is_file() and "\n- lit-rlhf\n" in card.read_text(encoding="utf-8")):
            raise UserError(f"--out: {folder} contains other files, which an export would replace; name another folder")


def check_start(options: dict[str, Any], role: str) -> None:
    """Check that a model can be moved towards the model that it started from.

    Args:
        options: The options of the run's module.
        role: The model's role.

    Raises:
        UserError: if the model is not an actor, or is an adapter with DoRA or with a reference of its own.
    """
    if role != "actor":
        raise UserError(f"--towards-start needs a start, which only an actor has: its reference; a {role} has none")
    adapter, reference = options.get("adapter"), options.get("reference")
    if adapter and adapter.get("dora"):
        raise UserError("--towards-start cannot scale an adapter with DoRA, whose norms do not depend on B A linearly")
    if adapter and reference and reference != options.get("actor"):
        raise UserError(
            f"--towards-start moves an adapter towards what it was added to, but the reference is {reference}; export "
            "with --merge, and interpolate the whole models"
        )


def move_towards(model: nn.Module, start: nn.Module, share: float) -> None:
    """Move a model's parameters, in place, towards those of another model: start + share (model − start).

    Args:
        model: The model.
        start: A model with the same parameters.
        share: The share of the difference that is kept.

    Raises:
        UserError: if the models' parameters differ in their names or shapes.

    >>> model, start = nn.Linear(1, 1), nn.Linear(1, 1)
    >>> _ = nn.init.constant_(model.weight, 3.0), nn.init.constant_(start.weight, 1.0)
    >>> move_towards(model, start, share=0.25)
    >>> model.weight.item()
    1.5
    """
    before = dict(start.named_parameters())
    if {name: x.shape for name, x in model.named_parameters()} != {name: x.shape for name, x in before.items()}:
        raise UserError("--towards-start: the reference (model.reference) has other parameters than the actor")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.lerp(before[name].float(), parameter.float(), share))


def _start(options: dict[str, Any], source: ModelSource) -> ModelSource:
    """Return the source of the run's reference: the actor's source, ``source``, if the options name no reference."""
    return _as_source(options["reference"]) if options.get("reference") else source


def _trained_adapter(
    options: dict[str, Any], source: str, state: dict[str, Tensor], path: Path, role: Role
) -> TrainedAdapter:
    critic, below = options.get("critic"), None
    name = "actor" if role == "critic" and critic == "shared" else role
    prefix = "reward.trunk." if role == "reward" else "actor.model."
    weights = weights_of(_weights(prefix, state, path, role), name)
    if not weights:
        raise UserError(f"{path} does not contain a {role} model")
    if role == "critic" and critic == "reward":
        below = read_adapter(_first_reward_model(options), "model.critic")
    elif role == "critic" and critic not in ("actor", "shared"):
        below = read_adapter(str(critic), "model.critic")
    head = None
    if role != "actor":
        trained = _weights("actor.value_head." if name == "actor" else f"{role}.head.", state, path, role)
        head = nn.Linear(trained["weight"].shape[1], 1, bias="bias" in trained)
        head.load_state_dict(trained)
    lora = LoRA(**options["adapter"])
    return TrainedAdapter(
        source=source, lora=lora, name=name, weights=weights, below=below, head=head, scale=_scale(state)
    )


def _scale(state: dict[str, Tensor]) -> tuple[float, float] | None:
    """Return the mean and the standard deviation of a reward model's scores, or None if these are not known."""
    if "score_std" not in state or not torch.isfinite(state["score_std"]):
        return None
    return float(state["score_mean"]), float(state["score_std"])


def model_card(run: Path, role: str, iterations: int, base: str | None = None, share: float = 1.0) -> str:
    """Return a model card in Markdown that describes a model and its training.

    Args:
        run: The run's folder; the card quotes its ``config.yaml`` if there is one.
        role: ``actor``, ``critic`` or ``reward``.
        iterations: The number of iterations that the model was trained for.
        base: The folder or the hub id of an adapter's base model; None for a whole model.
        share: The share of the change made in training that the model keeps; 1 for the whole change.

    Returns:
        The text of ``README.md``.

    >>> print(model_card(Path("runs/ppo"), "actor", iterations=100).splitlines()[8])
    # ppo: actor
    """
    config_file = run / "config.yaml"
    config: dict[str, Any] = read_yaml(config_file, "config") if config_file.is_file() else {}
    model = config.get("model", {})
    method = str(model.get("class_path", "lit-rlhf")).rpartition(".")[2]
    header = {
        "library_name": "transformers" if base is None else "peft",
        **({} if base is None else {"base_model": base}),
        "pipeline_tag": "text-generation" if role == "actor" else "text-classification",
        "tags": ["lit-rlhf", method],
    }
    description = {
        "actor": "A language model, `AutoModelForCausalLM`",
        "critic": "A critic, `AutoModelForSequenceClassification`: its output plus `config.value_bias` (if present) "
        "predicts the return after the last token",
        "reward": "A reward model, `AutoModelForSequenceClassification`: it scores a prompt with its response",
    }[role]
    if base is not None:
        description = (
            f"An adapter (LoRA, peft) of `{base}`. With its base it is: {description[0].lower()}{description[1:]}"
        )
    moved = "" if share == 1 else f" Its weights are start + {share:g} · (trained − start)."
    quoted_config = yaml.safe_dump(
        {k: config[k] for k in ("seed_everything", "model", "data") if k in config}, sort_keys=False
    )
    return (
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n\n# {run.name}: {role}\n\n"
        f"{description}, trained by `{method}` of lit-rlhf {lit_rlhf.__version__} (torch {torch.__version__}, "
        f"transformers {transformers.__version__}) for {iterations} iterations.{moved}\n\n"
        f"## Configuration\n\n```yaml\n{quoted_config}```\n"
    )


def _actor(source: ModelSource, state: dict[str, Tensor], path: Path) -> PreTrainedModel:
    model = load_model(source, "causal", "model.actor")
    model.load_state_dict(_weights("actor.model.", state, path, "actor"))
    return model


def _scalar_model(
    options: dict[str, Any], source: ModelSource, state: dict[str, Tensor], path: Path, role: str
) -> ScalarModel:
    if role == "critic" and options.get("critic") == "shared":
        trunk = Actor(_actor(source, state, path), shared_critic=True)
        assert trunk.value_head is not None
        trunk.value_head.load_state_dict(_weights("actor.value_head.", state, path, role))
        return ScalarModel(trunk.model.base_model, trunk.value_head)
    weights = _weights(f"{role}.", state, path, role)
    initial = options.get(role)
    if role == "critic" and initial == "actor":
        initial = source
    elif role == "critic" and initial == "reward":
        initial = _first_reward_model(options)
    model = load_critic(_as_source(initial), f"model.{role}", bias="head.bias" in weights)
    if "head.bias" in weights and model.head.bias is None:  # a critic from a normalised reward model has a bias
        model.head.bias = nn.Parameter(torch.zeros(1))
    model.load_state_dict(weights)
    return model


def _first_reward_model(options: dict[str, Any]) -> Any:
    return next(r["init_args"]["model"] for r in options["rewards"] if r["class_path"].endswith("RewardModel"))


def _weights(prefix: str, state: dict[str, Tensor], path: Path, role: str) -> dict[str, Tensor]:
    weights = strip_prefix(prefix, state)
    if not weights:
        raise UserError(f"{path} does not contain a {role} model")
    return weights


def _source(options: dict[str, Any], role: str, file: Path) -> ModelSource:
    if not options.get(role):
        raise UserError(f"model.{role} is not set in {file}")
    return _as_source(options[role])


def _as_source(value: Any) -> ModelSource:
    return RandomWeights(**value) if isinstance(value, dict) else value
