"""How an agent is trained: one frozen configuration, LightZero's names beside the fields."""

import dataclasses
from typing import Any

from kvjax.base.values import (
    is_integer,
    is_number,
    make_plain,
    require,
    require_above_zero,
    require_numbers,
    require_one_of,
    require_positive,
)
from kvjax.config import BLOCK, SearchConfig, WindowMode, WorldModelConfig
from kvjax.train.environments import Environment

LATENT_LOSSES = ("group_kl", "mse")

_COUNTS: tuple[str, ...] = ("num_envs", "collect_steps", "replay_size", "updates", "batch_size")
_COUNTS += ("unroll_steps", "td_steps", "eval_episodes", "eval_every")
_WEIGHTS: tuple[str, ...] = ("latent_weight", "reward_weight", "policy_weight", "value_weight")
_WEIGHTS += ("entropy_weight", "weight_decay")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """All that a run depends on, besides its environment and its seed.

    An iteration plays `collect_steps` steps of `num_envs` environments, stores them and makes
    `updates` updates of the weights. Sequences are trained that have `unroll_steps` steps and so
    twice as many tokens. Where no name of LightZero's stands beside a field, it has the same.

    Raises:
      ValueError: a value lies outside its range; an iteration is shorter than the sequences that
        are drawn from it, or the memory shorter than an iteration; the model's fields fit no model.
    """

    # Playing
    num_envs: int = 8  # collector_env_num
    collect_steps: int = 25  # of each environment; LightZero counts episodes (n_episode)
    num_simulations: int = 25
    temperature: float = 0.25  # fixed_temperature_value
    noise_fraction: float = 0.25  # root_noise_weight
    dirichlet_alpha: float = 0.3  # root_dirichlet_alpha
    discount: float = 0.997  # discount_factor
    replay_size: int = 100_000  # replay_buffer_size, steps of all environments

    # Learning
    updates: int = 50  # update_per_collect
    batch_size: int = 64
    unroll_steps: int = 10  # num_unroll_steps
    td_steps: int = 5
    seek_start: int = 0  # a sequence begins with an episode that begins within so many steps
    reanalyze_ratio: float = 0.0  # share of a batch whose policies are searched again
    learning_rate: float = 3e-3
    weight_decay: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    grad_clip: float = 5.0  # grad_clip_value, of the norm of all gradients
    target_rate: float = 0.05  # target_update_theta
    statistics_rate: float = 0.1  # torch's momentum of BatchNorm
    latent_weight: float = 10.0  # obs_loss_weight
    reward_weight: float = 1.0  # reward_loss_weight
    policy_weight: float = 1.0  # policy_loss_weight
    value_weight: float = 0.5  # value_loss_weight
    entropy_weight: float = 0.0  # policy_entropy_weight
    unroll_discount: float = 1.0  # gamma of world_model_cfg, along a sequence
    latent_loss: str = "group_kl"  # predict_latent_loss_type

    # The model
    embed_dim: int = 64
    num_layers: int = 2
    num_heads: int = 2
    context_length: int = 8
    support: tuple[int, int] = (-50, 50)  # support_scale
    window_mode: WindowMode = "rope_consistent"  # rotary_emb

    # The run
    eval_episodes: int = 20  # n_evaluator_episode
    eval_every: int = 2  # iterations; LightZero counts updates (eval_freq)

    @classmethod
    def of(cls, env: Environment, **changes: Any) -> "TrainConfig":
        """An environment's own recipe, if it has one, and changes to that."""
        recipe: dict[str, Any] = getattr(env, "recipe", {})
        return cls(**recipe | changes)

    def __post_init__(self) -> None:
        make_plain(self)
        require_positive(self, *_COUNTS)
        require_above_zero(self, "learning_rate", "grad_clip")
        for name in _WEIGHTS:
            require_numbers(self, name)
            value = getattr(self, name)
            require(value >= 0, f"{name} must be at least 0, got {value!r}")
        seek = self.seek_start
        require(is_integer(seek) and seek >= 0, f"seek_start must be at least 0, got {seek!r}")
        for name in ("target_rate", "statistics_rate", "unroll_discount"):
            value = getattr(self, name)
            in_range = is_number(value) and 0.0 < value <= 1.0
            require(in_range, f"{name} must be in (0, 1], got {value!r}")
        share = self.reanalyze_ratio
        in_range = is_number(share) and 0.0 <= share <= 1.0
        require(in_range, f"reanalyze_ratio must be in [0, 1], got {share!r}")
        require_one_of("latent_loss", self.latent_loss, LATENT_LOSSES)
        self._check_sizes()
        self.searched, self.evaluated  # noqa: B018  (each checks its own fields)

    def _check_sizes(self) -> None:
        drawn, played = self.drawn_length, self.collect_steps
        require(
            played >= drawn,
            f"collect_steps must be at least unroll_steps + td_steps + seek_start = {drawn}, got"
            f" {played}",
        )
        kept = self.replay_size // self.num_envs
        require(
            kept >= played,
            f"replay_size must be at least num_envs * collect_steps = {self.steps_per_iteration},"
            f" got {self.replay_size}",
        )

    @property
    def sequence_length(self) -> int:
        """Steps of a sequence: the trained ones and those whose rewards count."""
        return self.unroll_steps + self.td_steps

    @property
    def drawn_length(self) -> int:
        """Steps that are drawn, of which a sequence is a part."""
        return self.sequence_length + self.seek_start

    @property
    def reanalysed_rows(self) -> int:
        """Sequences of a batch that are searched again."""
        return round(self.reanalyze_ratio * self.batch_size)

    @property
    def steps_per_iteration(self) -> int:
        """Of all environments together."""
        return self.num_envs * self.collect_steps

    @property
    def searched(self) -> SearchConfig:
        """How environments are played to learn from them."""
        return dataclasses.replace(
            self.evaluated,
            temperature=self.temperature,
            noise_fraction=self.noise_fraction,
            dirichlet_alpha=self.dirichlet_alpha,
        )

    @property
    def evaluated(self) -> SearchConfig:
        """How environments are played to see what was learnt: without noise, as `kvjax play`."""
        return SearchConfig(self.num_simulations, discount=self.discount)

    def model(self, env: Environment) -> WorldModelConfig:
        """The world model that is trained in an environment."""
        is_rotary = self.window_mode.startswith("rope")
        return WorldModelConfig(
            embed_dim=self.embed_dim,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_actions=env.num_actions,
            context_length=self.context_length,
            max_tokens=None if is_rotary else max(BLOCK * self.unroll_steps, self.context_length),
            observation_size=env.observation_size,
            support=self.support,
            window_mode=self.window_mode,
        )
