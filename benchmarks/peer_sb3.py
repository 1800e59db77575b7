"""Stable-Baselines3's PPO with the flags of ppo_torch_ddp.py that it shares; prints `step STEPS` after each update.

With --normalize-obs or --normalize-rewards in its VecNormalize. Nothing is logged.
"""

from dataclasses import dataclass

import torch
import tyro
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize


@dataclass
class Args:
    env_id: str = "CartPole-v1"
    seed: int = 1
    num_envs: int = 4
    num_steps: int = 128
    per_rank_batch_size: int = 128
    update_epochs: int = 4
    total_timesteps: int = 51_200
    learning_rate: float = 2.5e-4
    clip_coef: float = 0.2
    clip_vloss: bool = False
    ent_coef: float = 0.0
    vf_coef: float = 0.5
    max_grad_norm: float = 0.5
    gamma: float = 0.99
    gae_lambda: float = 0.95
    num_threads: int = 1
    normalize_obs: bool = False
    normalize_rewards: bool = False


class Clock(BaseCallback):
    """Prints the step count at the start of each rollout, that is after each update."""

    def _on_rollout_start(self) -> None:
        if self.num_timesteps:
            print("step", self.num_timesteps, flush=True)

    def _on_training_end(self) -> None:
        self._on_rollout_start()

    def _on_step(self) -> bool:
        return True


def main(args: Args) -> None:
    torch.set_num_threads(args.num_threads)
    envs = make_vec_env(args.env_id, n_envs=args.num_envs, seed=args.seed)
    if args.normalize_obs or args.normalize_rewards:
        envs = VecNormalize(envs, norm_obs=args.normalize_obs, norm_reward=args.normalize_rewards, gamma=args.gamma)
    model = PPO(
        "MlpPolicy",
        envs,
        seed=args.seed,
        device="cpu",
        n_steps=args.num_steps,
        batch_size=args.per_rank_batch_size,
        n_epochs=args.update_epochs,
        learning_rate=lambda remaining: remaining * args.learning_rate,
        clip_range=args.clip_coef,
        clip_range_vf=args.clip_coef if args.clip_vloss else None,
        ent_coef=args.ent_coef,
        vf_coef=args.vf_coef,
        max_grad_norm=args.max_grad_norm,
        gamma=args.gamma,
        gae_lambda=args.gae_lambda,
    )  # SB3's network is the same: two tanh networks of 64-64, initialised orthogonally
    model.learn(args.total_timesteps, callback=Clock())


if __name__ == "__main__":
    main(tyro.cli(Args))
