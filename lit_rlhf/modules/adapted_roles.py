"""The models of an iteration, as adapters on one base; the reference is usually the actor without its new adapter."""

from collections.abc import Callable
from functools import partial

from lit_rlhf.errors import UserError
from lit_rlhf.models.actor import Actor, new_value_head
from lit_rlhf.models.adapted import load_adapted, starts_from
from lit_rlhf.models.adapter_folders import SavedAdapter, base_of, find_adapter, read_adapter, same_model
from lit_rlhf.models.adapters import AdaptedTrunk, AdapterView, LoRA
from lit_rlhf.models.loading import ModelSource
from lit_rlhf.models.scoring import ScalarModel, freeze, saved_head, scale_of
from lit_rlhf.modules.roles import Place, Roles, RoleSources, check_vocabulary, load_reference, nothing, rescale


class AdaptedRoles:
    """The models of the roles as adapters on the actor's base; all adapters must be known before the base is loaded.

    Args:
        sources: The sources of the models. The critic's source is ``shared``, None, or names the adapters on top of
            which the critic's new adapter is put: ``actor`` for the adapters that the actor starts from, ``reward`` for
            the first reward model's adapter, or the source of another adapter of the same base. The reference and the
            reward models can also be whole models.
        lora: The options of the trained adapters.

    Raises:
        UserError: if an adapter cannot be read or belongs to another base, or if the critic cannot be an adapter.
    """

    def __init__(self, sources: RoleSources, lora: LoRA) -> None:
        self.sources = sources
        self.lora = lora
        self.saved: dict[str, SavedAdapter] = {}
        self.starts = starts_from(sources.actor, lora)
        critic, rewards = sources.critic, sources.rewards
        for number, reward in enumerate(rewards):
            self._read(f"reward{number}", reward.source, "rewards.model")
        if critic == "reward" and "reward0" not in self.saved:
            what = "the reward model is not an adapter of the actor's base" if rewards else "no reward is a RewardModel"
            raise UserError(f"model.critic is 'reward', but {what}")
        own = critic is not None and critic not in ("actor", "reward", "shared")
        if own and not self._read("critic_start", critic, "model.critic"):
            raise UserError(
                "model.critic must be actor, reward, shared, null or an adapter of the actor's base, not "
                f"{critic!r}, because model.adapter is set"
            )
        below = self.saved.get("reward0" if critic == "reward" else "critic_start")
        if below is not None and (lora.dora or below.config.use_dora):
            raise UserError(
                f"model.critic: DoRA cannot be combined with another adapter, here {below.source}; let the critic "
                "start from the actor (model.critic: actor)"
            )
        if sources.reference is not None:
            self._read("reference", sources.reference, "model.reference")

    @property
    def is_merged(self) -> bool:
        """Whether the actor's source is an adapter merged into its base, so that no other adapter fits the base."""
        return find_adapter(self.sources.actor) is not None and not self.starts

    def _read(self, name: str, source: ModelSource | None, where: str) -> bool:
        """Read the source if it is an adapter, and return whether it is one.

        Raises:
            UserError: if the adapter cannot be read, if its base is not the actor's base, or if the actor's adapter is
                merged into that base.
        """
        if not find_adapter(source):
            return False
        actor = str(self.sources.actor)
        saved, base = read_adapter(str(source), where), base_of(actor)
        if self.is_merged or not same_model(saved.base, base):
            mine = f"{base} with {actor} merged into it" if self.is_merged else base
            raise UserError(
                f"{where}: the base of the adapter {source} is {saved.base}, but the actor's base is {mine}; to use it "
                "as a model of its own, merge it (lit-rlhf export --merge)"
            )
        self.saved[name] = saved
        return True

    def build_actor(self) -> Actor:
        """Load the base with the adapters of all roles, and return the actor, which owns the base."""
        sources = self.sources
        trained = ["actor"] if sources.critic in (None, "shared") else ["actor", "critic"]
        others = {"copies": sources.copies, "saved": self.saved}
        model = load_adapted(sources.actor, self.lora, "model.actor", trained=trained, **others)  # type: ignore[arg-type]
        options = sources.temperature, sources.critic == "shared", sources.value_grad_scale
        return Actor(model, *options, adapter="actor")

    def build_reward(self, actor: Actor, number: int) -> ScalarModel:
        """Return a reward model that is an adapter on the actor's base."""
        saved = self.saved[f"reward{number}"]
        trunk, head = AdaptedTrunk(actor, [f"reward{number}"]), saved_head(saved, "rewards.model")
        model = ScalarModel(trunk, head, scale=scale_of(saved.settings))
        freeze(model)
        return model

    def build_critic(self, actor: Actor) -> ScalarModel:
        """Return the critic, whose new adapter is on top of the adapters that the critic starts from."""
        if self.sources.critic == "actor":
            below, head = self.starts, new_value_head(actor.model)
        else:
            (start,) = below = ("reward0",) if self.sources.critic == "reward" else ("critic_start",)
            head = saved_head(self.saved[start], "model.critic")
            if self.sources.critic == "reward":
                rescale(head, self.sources.rewards[0])
        return ScalarModel(AdaptedTrunk(actor, [*below, "critic"]), head, adapter="critic")

    def build_reference(self, actor: Actor, place: Place) -> Actor:
        """Return the reference: the initial actor, another adapter of the base, the base alone, or a whole model."""
        source, temperature = self.sources.reference, self.sources.temperature
        is_base = isinstance(source, str) and same_model(source, base_of(str(self.sources.actor)))
        if source is None:
            return Actor(AdapterView(actor, self.starts), temperature)
        if "reference" in self.saved:
            return Actor(AdapterView(actor, ["reference"]), temperature)
        if is_base and not self.is_merged:
            return Actor(AdapterView(actor, []), temperature)
        return place(partial(load_reference, source, temperature))


def load_adapted_roles(
    sources: RoleSources,
    *,
    prepare: Callable[[], None] = nothing,
    place: Place,
    shards_actor: bool = True,
) -> Roles:
    """Load the actor's base with the adapters of all roles, and return the model of each role.

    Args:
        sources: The sources of the models, with the options of the adapters.
        prepare: As in `load_roles`.
        place: As in `load_roles`.
        shards_actor: As in `load_roles`.

    Raises:
        UserError: if a model or a reward cannot be loaded, if an adapter belongs to another base, if the critic cannot
            be an adapter, or if the reference's vocabulary differs in size from the actor's.
    """
    assert sources.adapter is not None
    roles = AdaptedRoles(sources, sources.adapter)
    actor = place(roles.build_actor, sharded=shards_actor)
    for number, reward in enumerate(sources.rewards):
        is_adapter = f"reward{number}" in roles.saved
        reward.model = place(partial(roles.build_reward, actor, number) if is_adapter else reward.load)
    prepare()
    critic = None
    if sources.critic not in (None, "shared"):  # the critic's head is sharded exactly if its adapter in the actor is
        critic = place(partial(roles.build_critic, actor), sharded=shards_actor)
    reference = roles.build_reference(actor, place) if sources.needs_reference else None
    if reference is not None:
        check_vocabulary("reference", reference.model, actor)
    return Roles(actor=actor, critic=critic, reference=reference)
