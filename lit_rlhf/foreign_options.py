"""The options of TRL, OpenRLHF and verl whose names differ in lit-rlhf, for the message about an unknown option.

The tables in ``docs/from-trl.md``, ``docs/from-openrlhf.md`` and ``docs/from-verl.md`` say more about these options; a
test compares the tables with this module.
"""

from collections.abc import Collection

OPTIONS: dict[str, tuple[str, ...]] = {
    "adv_estimator": ("model.advantages",),
    "beta": ("model.beta", "model.kl.coef"),
    "clip_grad": ("model.update.clip_grad_norm",),
    "clip_ratio": ("model.objective.eps",),
    "clip_ratio_c": ("model.objective.dual",),
    "clip_ratio_high": ("model.objective.eps_high",),
    "clip_ratio_low": ("model.objective.eps",),
    "cliprange": ("model.objective.eps",),
    "cliprange_value": ("model.update.value_clip",),
    "deepspeed": ("trainer.strategy",),
    "default_local_dir": ("trainer.default_root_dir",),
    "dual_clip": ("model.objective.dual",),
    "entropy_coeff": ("model.update.entropy_coef",),
    "eps_clip": ("model.objective.eps",),
    "epsilon": ("model.objective.eps",),
    "epsilon_high": ("model.objective.eps_high",),
    "eval_steps": ("trainer.val_check_interval",),
    "fsdp": ("trainer.strategy",),
    "generation_batch_size": ("data.batch_size",),
    "gradient_accumulation_steps": ("model.update.max_tokens", "model.max_tokens"),
    "init_coef": ("model.kl.coef",),
    "kl_coef": ("model.kl.coef",),
    "kl_loss_coef": ("model.kl.coef",),
    "lambd": ("model.advantages.lam",),
    "learning_rate": ("model.actor_optimizer.lr", "model.optimizer.lr"),
    "load_in_4bit": ("model.adapter.quantization",),
    "lora_alpha": ("model.adapter.alpha",),
    "lora_rank": ("model.adapter.rank",),
    "loss_agg_mode": ("model.update.aggregation",),
    "loss_type": ("model.update.aggregation", "model.loss"),
    "lr_scheduler_type": ("model.scheduler",),
    "max_completion_length": ("model.sampling.max_tokens",),
    "max_grad_norm": ("model.update.clip_grad_norm", "model.clip_grad_norm"),
    "max_length": ("data.max_tokens",),
    "max_new_tokens": ("model.sampling.max_tokens",),
    "max_norm": ("model.update.clip_grad_norm",),
    "max_prompt_length": ("data.max_tokens",),
    "max_response_length": ("model.sampling.max_tokens",),
    "max_steps": ("model.iterations",),
    "micro_batch_size": ("model.update.max_tokens",),
    "mini_batch_size": ("model.update.minibatches",),
    "missing_eos_penalty": ("model.scores.truncation_penalty",),
    "model_name_or_path": ("model.actor",),
    "n_gpus_per_node": ("trainer.devices",),
    "n_samples_per_prompt": ("model.sampling.responses",),
    "nnodes": ("trainer.num_nodes",),
    "num_episodes": ("trainer.max_epochs",),
    "num_generations": ("model.sampling.responses",),
    "num_iterations": ("model.update.epochs",),
    "num_mini_batches": ("model.update.minibatches",),
    "num_ppo_epochs": ("model.update.epochs",),
    "num_train_epochs": ("trainer.max_epochs",),
    "output_dir": ("trainer.default_root_dir",),
    "per_device_eval_batch_size": ("data.validation_batch_size",),
    "per_device_train_batch_size": ("data.batch_size",),
    "ppo_epochs": ("model.update.epochs",),
    "ppo_micro_batch_size_per_gpu": ("model.update.max_tokens",),
    "ppo_mini_batch_size": ("model.update.minibatches",),
    "prompt_dataset": ("data.train",),
    "report_to": ("trainer.logger",),
    "response_length": ("model.sampling.max_tokens",),
    "resume_from_checkpoint": ("ckpt_path",),
    "reward_model_path": ("model.rewards.model",),
    "reward_weights": ("model.rewards.weight",),
    "save_freq": ("checkpoint.every_n",),
    "save_steps": ("checkpoint.every_n",),
    "scale_rewards": ("model.advantages.divide_by_std",),
    "seed": ("seed_everything",),
    "sft_model_path": ("model.actor",),
    "test_freq": ("trainer.val_check_interval",),
    "total_episodes": ("model.iterations",),
    "total_epochs": ("trainer.max_epochs",),
    "total_training_steps": ("model.iterations",),
    "train_batch_size": ("data.batch_size",),
    "train_files": ("data.train",),
    "use_vllm": ("model.engine",),
    "val_files": ("data.validation",),
    "vf_coef": ("model.update.value_coef",),
}
"""An option's names in lit-rlhf, at most one in each module, by the option's name in another trainer without groups."""


def own_name(option: str, known: Collection[str]) -> str:
    """Return lit-rlhf's name for an option of another trainer, or an empty string if none is known.

    Args:
        option: The option of the other trainer, with or without its groups.
        known: The options that exist in lit-rlhf; only these can be returned.

    >>> own_name("model.learning_rate", ["model.optimizer.lr"])
    'model.optimizer.lr'
    >>> own_name("wings", ["model.optimizer.lr"])
    ''
    """
    return next((name for name in OPTIONS.get(option.rpartition(".")[2], ()) if name in known), "")
