"""Proximal Policy Optimization on many processes, in one file.

Every rank collects a rollout in environments of its own and trains on it; the ranks average their gradients, so all
hold the same parameters. Plain `python` runs one rank. These commands start two ranks on the CPU, eight on GPUs, and
eight on each of two machines (run it on both; HOST is one of them):

    torchrun --nproc_per_node=2 --standalone ppo_torch_ddp.py
    torchrun --nproc_per_node=8 --standalone ppo_torch_ddp.py --cuda
    torchrun --nproc_per_node=8 --nnodes=2 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 ppo_torch_ddp.py --cuda

Compare it with its twin: `diff ppo_torch_ddp.py ppo_fabric.py` shows what Lightning Fabric takes off your hands.

PPO: Schulman et al. 2017, arXiv:1707.06347. GAE: Schulman et al. 2016, arXiv:1506.02438.
"""

import ctypes
import io
import json
import math
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from glob import escape, glob
from importlib import import_module
from inspect import unwrap
from itertools import islice, pairwise
from multiprocessing.connection import Client, Connection, Listener
from typing import Literal

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's; torch has --num-threads

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.vector.utils import batch_space, concatenate, create_empty_array
from numpy import ndarray
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor, distributed as dist, func, nn
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter

Tensors = dict[str, Tensor]
Arrays = dict[str, ndarray]
CHECKPOINT_VERSION = 2  # increase it when old checkpoints do not fit
CHUNK = 1024  # rows that pass through the networks at once after a rollout
INFO_NAMES = ("lives",)  # entries of an environment's info that are kept, for `from_env` and --episodic-life
MAX_FRAMES = 3000  # of a video


@dataclass
class Args:
    # experiment
    exp_name: str = "ppo"  # name of the experiment, part of the run's folder
    seed: int = 1  # seed of parameters, environments, actions and shuffling
    torch_deterministic: bool = True  # let cuDNN use deterministic algorithms only
    capture_video: bool = False  # record some episodes of the first environment of rank 0 and of evaluations
    eval_every: int = 0  # evaluate every so many iterations (0: only at the end)
    eval_episodes: int = 10  # greedy episodes of an evaluation, each in an environment of its own (0: none)
    eval_max_steps: int = 27_000  # steps after which an evaluation ends with the returns so far
    checkpoint_every: int = 20  # write a checkpoint every so many iterations (0: only at the end)
    keep_checkpoints: int = 3  # keep so many of the last checkpoints, and with eval_every the best one
    resume: str = ""  # go on from this checkpoint (give the flags again); `auto`: newest of this env_id, exp_name, seed
    evaluate: str = ""  # play the agent of this checkpoint, with the flags that it was trained with, and stop
    # environment
    env_id: str = "CartPole-v1"  # id of the environment; `package:Name-v0` imports the package that registers it
    env_kwargs: str = "{}"  # keyword arguments of the environment, a JSON object
    vec_env: Literal["sync", "async", "native", "envpool"] = "sync"  # here, in processes, id's own vector, EnvPool
    num_envs: int = 4  # environments per rank, or per player
    normalize_obs: bool = False  # normalise vectors by their running mean and deviation over all ranks
    normalize_rewards: bool = False  # divide rewards by the running deviation of discounted returns, clip to -10 .. 10
    clip_rewards: bool = False  # clip rewards to -1 .. 1 (returns are always reported as they are)
    episodic_life: bool = False  # a lost life ends an episode; the game goes on while `info["lives"]` is above 0
    # algorithm
    total_timesteps: int = 100_000  # environment steps and resets over all ranks, rounded down to whole iterations
    num_steps: int = 128  # steps per environment and rollout
    learning_rate: float = 1e-3  # learning rate of the optimizer
    optimizer: Literal["adam", "rmsprop"] = "adam"  # optimizer of the actor and the critic
    anneal_lr: bool = True  # anneal the learning rate linearly to zero over the run
    gamma: float = 0.99  # discount factor
    gae_lambda: float = 0.95  # lambda of the generalised advantage estimation
    update_epochs: int = 10  # passes over the rollout per update
    hidden_sizes: tuple[int, ...] = (64, 64)  # hidden layers of actor and critic (images: Nature CNN)
    activation_function: Literal["relu", "tanh"] = "tanh"  # activation function of the hidden layers
    log_std_init: float = 0.0  # logarithm of the standard deviation that Box actions start with
    ortho_init: bool = True  # initialise the layers orthogonally
    normalize_advantages: bool = True  # normalise the advantages over the rollouts of all ranks
    clip_coef: float = 0.2  # clip the probability ratio to 1 - clip_coef .. 1 + clip_coef
    clip_vloss: bool = False  # clip the new value to within clip_coef of the old one as well
    ent_coef: float = 0.0  # coefficient of the entropy bonus
    vf_coef: float = 0.5  # coefficient of the value loss
    max_grad_norm: float = 0.5  # clip the gradient to this norm
    target_kl: float | None = None  # end the update after an epoch whose mean approximate KL divergence is above this
    # distributed
    per_rank_batch_size: int = 64  # rows per minibatch and rank, rounded so that all minibatches have one size
    share_data: bool = False  # shuffle all ranks' rollouts together; each takes its part of every minibatch
    exchange: Literal["auto", "ddp", "tcp"] = "auto"  # of gradients; auto: tcp for small networks on one machine's CPUs
    compile: bool = False  # compile the train step with torch.compile
    num_threads: int = 1  # torch's CPU threads per rank: small networks run slower on more
    dist_timeout: int = 1800  # seconds that ranks wait for a slow one, for example while it evaluates
    cuda: bool = False  # train on one GPU per rank (NCCL); the environments stay on the CPU

    def __post_init__(self) -> None:
        counts = ("num_envs", "num_steps", "update_epochs", "per_rank_batch_size", "keep_checkpoints", "num_threads")
        for name in counts:
            if getattr(self, name) < 1:
                raise SystemExit(f"error: --{name.replace('_', '-')} must be at least 1")


class CheckedEnv(gym.Wrapper):
    """Raises errors for mistakes that a vector of environments would let pass, and drops unused infos."""

    def reset(self, **kwargs) -> tuple[object, dict]:
        try:
            obs, info = self.env.reset(**kwargs)
        except SystemExit as error:
            raise RuntimeError(f"the environment has called sys.exit({error.code})") from error
        space = self.observation_space
        try:  # in another process it would be cast and broadcast
            concatenate(space, [obs], create_empty_array(space, 1))
        except (TypeError, ValueError) as error:
            raise ValueError(f"an observation of shape {np.shape(obs)} does not fit {space}: {error}") from error
        return obs, {name: info[name] for name in INFO_NAMES if name in info}

    def step(self, action: object) -> tuple[object, float, bool, bool, dict]:
        try:
            obs, reward, terminated, truncated, info = self.env.step(action)
        except SystemExit as error:
            raise RuntimeError(f"the environment has called sys.exit({error.code})") from error
        if isinstance(reward, np.ndarray):
            if reward.size != 1:
                raise ValueError(f"the reward has the shape {reward.shape}: it must be one number")
            reward = reward.item()
        if info:
            info = {name: info[name] for name in INFO_NAMES if name in info}
        return obs, reward, terminated, truncated, info


class Video(gym.wrappers.RecordVideo):
    """Cuts a video at MAX_FRAMES: an episode may never end."""

    def _capture_frame(self) -> None:
        if len(self.recorded_frames) < MAX_FRAMES:
            super()._capture_frame()


def make_env(args: Args, video_dir: str | None = None) -> gym.Env:
    """One environment of --vec-env sync or async, the place for wrappers of your own."""
    if multiprocessing.current_process().name.startswith("Worker<"):
        os.setpgid(0, 0)  # `clean_up` can end whatever the environment starts
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if sys.platform == "linux":  # PR_SET_PDEATHSIG: if this rank is killed, the worker closes the environment
            ctypes.CDLL(None).prctl(1, signal.SIGINT)
    kwargs = json.loads(args.env_kwargs)
    if video_dir:
        kwargs["render_mode"] = "rgb_array"
    env = gym.make(args.env_id, **kwargs)
    return CheckedEnv(Video(env, video_dir) if video_dir else env)


def make_envs(args: Args, num_envs: int, seed: int, video_dir: str | None = None) -> tuple[VectorEnv, ndarray, dict]:
    """Make a vector of environments and reset it, which gives observations and infos; the place to plug in your own.

    The autoreset mode must be NEXT_STEP: the step after an episode's end ignores the action, returns the reward 0 and
    the first observation of the next episode.
    """
    is_atari = "ALE/" in args.env_id
    is_vectorised = args.vec_env in ("native", "envpool")
    try:
        kwargs = json.loads(args.env_kwargs)
        if args.capture_video and is_vectorised:
            raise ValueError("--capture-video needs --vec-env sync or async")
        if is_atari and args.episodic_life and not is_vectorised:
            raise ValueError("--episodic-life needs --vec-env native or envpool")
        if is_atari:
            import_module("ale_py")  # registers the environments
        if args.vec_env == "envpool":
            if args.episodic_life:
                kwargs["episodic_life"] = True
            envs = import_module("envpool").make_gymnasium(args.env_id, num_envs=num_envs, seed=seed, **kwargs)
            envs = gym.vector.VectorWrapper(envs)  # its space must be that of all environments; EnvPool's is of one
            envs.observation_space = batch_space(envs.single_observation_space, num_envs)
        elif args.vec_env == "native":
            if is_atari:  # ALE's own episodic_life would begin a new game; so the step after a lost life is left out
                kwargs |= {"reward_clipping": False, "life_loss_info": args.episodic_life}
            envs = gym.make_vec(args.env_id, num_envs, "vector_entry_point", **kwargs)
        else:
            makers = [partial(make_env, args, video_dir if i == 0 else None) for i in range(num_envs)]
            if args.vec_env == "async":
                envs = AsyncVectorEnv(makers, copy=False, daemon=False)  # daemons may not start processes
            else:
                envs = SyncVectorEnv(makers, copy=False)
        if envs.metadata.get("autoreset_mode") != AutoresetMode.NEXT_STEP:
            raise ValueError("the autoreset mode must be NEXT_STEP")
        if not isinstance(envs.single_observation_space, spaces.Box):
            envs = gym.wrappers.vector.FlattenObservation(envs)
        kinds = spaces.Box | spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary
        if not isinstance(envs.single_action_space, kinds):
            raise ValueError(
                f"no policy for {envs.single_action_space}: gymnasium.wrappers.TransformAction can change it"
            )
        if 0 in (*envs.observation_space.shape, *envs.action_space.shape):
            raise ValueError("an observation or action of no numbers")
        return envs, *envs.reset(seed=None if args.vec_env == "envpool" else seed)  # EnvPool has its seed
    except (gym.error.Error, ImportError, AssertionError, OSError, RuntimeError, TypeError, ValueError) as error:
        flags = f"--env-id {args.env_id} --env-kwargs {args.env_kwargs} --vec-env {args.vec_env}"
        raise SystemExit(f"error: {flags}: {error}") from None


class RunningMeanStd(nn.Module):
    """Running mean and standard deviation, (size,), of the rows that all ranks have seen."""

    def __init__(self, size: int):
        super().__init__()
        # number of rows, mean, and sum of squared deviations from it
        self.register_buffer("moments", torch.zeros(3, size, dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("std", torch.ones(size))

    def update(self, rows: Tensor, all_reduce: Callable[[Tensor], Tensor]) -> None:
        """Merge the rows (R, size) of each rank (Chan et al. 1983, parallel variance)."""
        count, mean, squares = self.moments
        x = rows.double() - mean
        new_rows, deviations, new_squares = all_reduce(torch.stack([torch.ones_like(x), x, x**2]).sum(1))
        count += new_rows
        mean += deviations / count
        squares.add_(new_squares - deviations**2 / count).clamp_(min=0)  # rounding could make it negative
        self.mean.copy_(mean)
        self.std.copy_((squares / count + 1e-8).sqrt())

    def forward(self, x: Tensor) -> Tensor:
        return ((x - self.mean) / self.std).clamp(-10, 10)


class Images(nn.Module):
    """Converts 8-bit images to floats (B, channels, height, width); stacked frames become channels."""

    def forward(self, obs: Tensor) -> Tensor:
        if obs.dim() > 3 and obs.shape[-1] < min(obs.shape[-3:-1]):
            obs = obs.movedim(-1, -3)
        return obs.reshape(len(obs), -1, *obs.shape[-2:]) / 255


class Agent(nn.Module):
    """Actor and critic: two networks of hidden layers, or for images two heads of one Nature CNN (Mnih et al. 2015).

    A is the number of actions: one per dimension of a Box, MultiDiscrete or MultiBinary, else 1.
    """

    def __init__(self, obs_space: spaces.Box, action_space: spaces.Space, args: Args):
        super().__init__()
        self.action_space = action_space
        self.is_discrete = not isinstance(action_space, spaces.Box)
        if self.is_discrete:  # a categorical per dimension; -1e9 masks choices that smaller dimensions lack
            if isinstance(action_space, spaces.MultiBinary):
                num_choices = np.full(action_space.shape, 2)
            else:
                num_choices = action_space.nvec if action_space.shape else action_space.n
            num_choices = np.reshape(num_choices, (-1, 1))
            mask = torch.from_numpy(-1e9 * (np.arange(num_choices.max()) >= num_choices)).float()
            self.register_buffer("mask", mask, persistent=False)
            self.num_actions = len(mask)
        else:  # Gaussians
            self.num_actions = math.prod(action_space.shape)
            self.log_std = nn.Parameter(torch.full((self.num_actions,), args.log_std_init))
            low = action_space.low.astype(np.float64)
            high = action_space.high.astype(np.float64)
            is_bounded = np.maximum(-low, high) < 1e6
            low[~is_bounded] = -1
            high[~is_bounded] = 1
            self.scale = (high - low) / 2
            self.center = (high + low) / 2

        # the CNN needs 36 pixels
        self.is_image = obs_space.dtype == np.uint8 and len(obs_space.shape) > 1 and sorted(obs_space.shape)[-2] >= 36
        is_byte = ((obs_space.low == 0) & (obs_space.high == 255)).ravel()
        self.obs_scale = np.where(is_byte, 255, 1).astype(np.float32) if is_byte.any() and not self.is_image else None
        self.obs_dtype = np.uint8 if self.is_image else np.float32
        self.obs_shape = obs_space.shape if self.is_image else (math.prod(obs_space.shape),)
        self.obs_rms = RunningMeanStd(*self.obs_shape) if args.normalize_obs and not self.is_image else None
        self.reward_rms = RunningMeanStd(1) if args.normalize_rewards else None
        layers = [self.obs_rms] if self.obs_rms else []
        self.trunk = make_cnn() if self.is_image else nn.Sequential(*layers)
        num_features = self.trunk(torch.zeros(1, *self.obs_shape)).shape[1]
        hidden_sizes = () if self.is_image else args.hidden_sizes
        num_outputs = self.mask.numel() if self.is_discrete else self.num_actions
        self.actor = make_mlp(num_features, hidden_sizes, num_outputs, args.activation_function)
        self.critic = make_mlp(num_features, hidden_sizes, 1, args.activation_function)
        if args.ortho_init:
            gains = {self.actor[-1]: 0.01, self.critic[-1]: 1.0}
            for layer in self.modules():
                if isinstance(layer, nn.Linear | nn.Conv2d):
                    nn.init.orthogonal_(layer.weight, gains.get(layer, math.sqrt(2)))
                    nn.init.zeros_(layer.bias)
        # layers of your own go here, where they do not change the initial actor and critic of a seed; initialise them

        # buffers are equal on all ranks already (those of BatchNorm would not be)
        self._ddp_params_and_buffers_to_ignore = [name for name, _ in self.named_buffers()]

    def policy(self, output: Tensor | ndarray, inputs: dict, mask_or_log_std: Tensor | ndarray) -> dict:
        """Parameters of the distribution to act and to train: logits (B, A, choices), or mean and log_std (B, A).

        `output` is the actor's for `inputs`: a minibatch in training, what `from_env` returns in an evaluation, row t
        of all arrays in a rollout. All are tensors in training, and may be arrays in acting.
        """
        if self.is_discrete:
            return {"logits": output.reshape(-1, *mask_or_log_std.shape) + mask_or_log_std}
        return {"mean": output, "log_std": mask_or_log_std + 0 * output}  # which gives it the shape (B, A)

    def forward(self, minibatch: Tensors) -> Tensors:
        """Log-probabilities of the actions, entropies and values, each (B,), and what `policy` returns.

        What you add to these outputs reaches `make_batch` and `ppo_loss` by its name. In `make_batch` the minibatch has
        no logprobs, values, advantages, returns and weights yet.
        """
        features = self.trunk(minibatch["obs"])
        outputs = self.policy(self.actor(features), minibatch, self.mask_or_log_std())
        actions = minibatch["actions"]
        if self.is_discrete:
            logprobs = outputs["logits"].log_softmax(-1)
            outputs["logprobs"] = logprobs.gather(-1, actions.unsqueeze(-1)).sum((1, 2))
            outputs["entropy"] = -(logprobs.exp() * logprobs).sum((1, 2))
        else:
            log_norm = outputs["log_std"] + 0.5 * math.log(2 * math.pi)
            z = (actions - outputs["mean"]) / outputs["log_std"].exp()
            outputs["logprobs"] = (-0.5 * z**2 - log_norm).sum(-1)
            outputs["entropy"] = (log_norm + 0.5).sum(-1)
        outputs["values"] = self.critic(features).squeeze(-1)
        return outputs

    @torch.no_grad()
    def torch_policy(self, inputs: Arrays) -> Arrays:
        """From inputs to what `policy` returns, as arrays, computed in torch."""
        device = next(self.parameters()).device
        tensors = {name: torch.as_tensor(array, device=device) for name, array in inputs.items()}
        outputs = self.policy(self.actor(self.trunk(tensors["obs"])), tensors, self.mask_or_log_std())
        return {name: tensor.cpu().numpy() for name, tensor in outputs.items()}

    def act(self, inputs: Arrays) -> ndarray:
        """The likeliest actions (N, A) for what `from_env` returns; `to_env` converts them."""
        return self.sample(self.torch_policy(inputs))

    def make_noise(self, shape: tuple[int, ...], rng: np.random.Generator) -> ndarray:
        """Noise for `sample`: Gumbel for discrete actions (arXiv:1411.0030), Gaussian for continuous ones."""
        if self.is_discrete:
            return rng.gumbel(size=(*shape, *self.mask.shape)).astype(np.float32)
        return rng.standard_normal((*shape, self.num_actions), np.float32)

    def sample(self, outputs: Arrays, noise: ndarray | None = None) -> ndarray:
        """Actions (N, A) by noise, or the likeliest; `forward` computes their log-probabilities: change both."""
        if self.is_discrete:
            logits = outputs["logits"]
            return (logits if noise is None else logits + noise).argmax(-1)
        mean = outputs["mean"]
        return mean if noise is None else mean + np.exp(outputs["log_std"]) * noise

    def mask_or_log_std(self) -> Tensor:
        """What `policy` needs beside the actor's output: the mask (A, choices), or log_std (A,)."""
        return self.mask if self.is_discrete else self.log_std

    def from_env(self, obs: ndarray, infos: dict) -> Arrays:
        """What N observations and infos give `act` and `forward`, (N, ...) by name; `collect_rollout` stores it.

        `obs` becomes images, or vectors in which 8-bit numbers are 0 .. 1. INFO_NAMES says what `infos` may have.
        Return the same names each time, and keep no state: rollouts and evaluations take turns.
        """
        obs = obs.astype(self.obs_dtype, copy=False).reshape(-1, *self.obs_shape)
        if self.obs_scale is not None:
            obs = obs / self.obs_scale
        return {"obs": obs}

    def to_env(self, actions: ndarray) -> ndarray:
        """Actions (N, A) as environments take them: -1 .. 1 is scaled to bounds of a Box below 1e6, all are clipped."""
        space = self.action_space
        actions = actions.reshape(-1, *space.shape)
        if self.is_discrete:
            return (actions + getattr(space, "start", 0)).astype(space.dtype, copy=False)
        # NaN could crash a simulator; `check_finite` ends the run instead
        actions = np.nan_to_num(self.center + actions * self.scale)
        return actions.clip(space.low, space.high).astype(space.dtype, copy=False)


def make_cnn() -> nn.Sequential:
    """The layers of Mnih et al. 2015 between images and the two heads."""
    layers = [Images(), nn.LazyConv2d(32, 8, 4), nn.ReLU(), nn.Conv2d(32, 64, 4, 2), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(512), nn.ReLU())


def make_mlp(num_inputs: int, hidden_sizes: tuple[int, ...], num_outputs: int, activation: str) -> nn.Sequential:
    """Linear layers with activations between them."""
    layers = []
    for fan_in, fan_out in pairwise((num_inputs, *hidden_sizes, num_outputs)):
        layers += [nn.Linear(fan_in, fan_out), nn.Tanh() if activation == "tanh" else nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def make_numpy_policy(agent: Agent) -> Callable | None:
    """`Agent.torch_policy` in numpy, much faster for few rows. None on a GPU, or if a layer is unknown here."""
    layers = (*agent.trunk, *agent.actor)
    kinds = {type(layer) for layer in layers}
    if next(agent.parameters()).is_cuda or not kinds <= {nn.Linear, nn.Tanh, nn.ReLU, RunningMeanStd}:
        return None
    mask_or_log_std = agent.mask_or_log_std().detach().numpy()
    steps = [(type(layer), [tensor.numpy().T for tensor in layer.state_dict().values()]) for layer in layers]

    def numpy_policy(inputs: Arrays) -> Arrays:
        x = inputs["obs"]
        for kind, arrays in steps:
            if kind is nn.Linear:
                weight, bias = arrays
                x = x @ weight + bias
            elif kind is nn.Tanh:
                x = np.tanh(x)
            elif kind is nn.ReLU:
                x = np.maximum(x, 0)
            else:
                _, mean, std = arrays
                x = ((x - mean) / std).clip(-10, 10)
        return agent.policy(x, inputs, mask_or_log_std)

    return numpy_policy


def make_storage(args: Args, agent: Agent, obs: ndarray, infos: dict) -> tuple[Arrays, Arrays]:
    """Arrays of a rollout, (T + 1, N, ...), and sums over the episodes under way, (N,).

    The next rollout fills the same arrays, and row T becomes its row 0; row T of actions and rewards is not used. An
    array that you add here and fill in `collect_rollout` reaches `Agent.policy` and `Agent.forward` by its name. In
    evaluations they have only what `Agent.from_env` returns.
    """
    shape = (args.num_steps + 1, args.num_envs)
    inputs = agent.from_env(obs, infos)
    rollout = {name: np.stack([array] * shape[0]) for name, array in inputs.items()}
    rollout |= {name: np.stack([array] * shape[0]) for name, array in agent.torch_policy(inputs).items()}
    rollout |= {
        "actions": np.zeros((*shape, agent.num_actions), np.int64 if agent.is_discrete else np.float32),
        "rewards": np.zeros(shape, np.float32),
        "terminations": np.zeros(shape, bool),
        "resets": np.zeros(shape, bool),  # resets[t]: row t shows an episode's last observation, row t + 1 a first one
        "discounted_returns": np.zeros(shape, np.float32),  # of this episode's rewards in the rows before t
    }
    return rollout, {name: np.zeros(args.num_envs) for name in ("episode_returns", "episode_lengths")}


def collect_rollout(
    agent: Agent, envs: VectorEnv, rollout: Arrays, sums: Arrays, rng: np.random.Generator, args: Args
) -> dict:
    """Step the environments T times; return numbers of the episodes that ended, and sums for `check_finite`.

    With NEXT_STEP autoreset `obs[t + 1]` is the last observation of an episode that ended at t. That row is a reset:
    its action is ignored, its reward is 0, and a new episode begins with row t + 2.
    """
    for array in rollout.values():
        array[0] = array[-1]
    resets = rollout["resets"]
    rewards = rollout["rewards"]
    over = np.zeros((args.num_steps, args.num_envs), bool)  # where episodes ended
    policy = make_numpy_policy(agent) or agent.torch_policy
    noise = agent.make_noise(over.shape, rng)
    for t in range(args.num_steps):
        outputs = policy({name: array[t] for name, array in rollout.items()})
        actions = agent.sample(outputs, noise[t])
        if actions.shape != rollout["actions"][t].shape:
            raise ValueError(f"Agent.sample returns {actions.shape}, not {rollout['actions'][t].shape}")
        for name, array in outputs.items():
            rollout[name][t] = array
        next_obs, step_rewards, terminations, truncations, infos = envs.step(agent.to_env(actions))
        for name, array in agent.from_env(next_obs, infos).items():
            rollout[name][t + 1] = array
        rollout["actions"][t] = actions
        rewards[t] = step_rewards
        rollout["terminations"][t] = terminations
        resets[t + 1] = terminations | truncations
        over[t] = has_ended(terminations, truncations, infos, args)

    ended = {"episodes": over.sum()}
    ended |= {"observations": rollout["obs"].sum(dtype=float), "rewards": rewards.sum()}  # for `check_finite`
    is_over = np.maximum.accumulate(over[::-1])[::-1]  # is_over[t]: an episode ends at t or later in this rollout
    for name, per_row in (("episode_returns", rewards[:-1]), ("episode_lengths", ~resets[:-1])):
        ended[name] = sums[name][is_over[0]].sum() + per_row[is_over].sum(dtype=float)
        sums[name] = sums[name] * ~is_over[0] + (per_row * ~is_over).sum(0, dtype=float)
    if args.clip_rewards:  # from here on they are what is learned; `make_batch` may divide them
        rewards.clip(-1, 1, out=rewards)
    if args.normalize_rewards:
        discounted_returns = rollout["discounted_returns"]
        for t in range(args.num_steps):
            discounted_returns[t + 1] = rewards[t] + args.gamma * ~resets[t] * discounted_returns[t]
    return ended


def has_ended(terminations: ndarray, truncations: ndarray, infos: dict, args: Args) -> ndarray:
    """Whether episodes have ended, (N,); with --episodic-life only a whole game has a return and a length."""
    if args.episodic_life:
        terminations = terminations & (infos.get("lives", 0) == 0)
    return terminations | truncations


def compute_gae(
    rewards: ndarray, values: ndarray, terminations: ndarray, dones: ndarray, gamma: float, gae_lambda: float
) -> ndarray:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16), (T, N).

    `values` is (T + 1, N): row t + 1 is the value of the observation after step t. The others are (T, N); `dones[t]`
    means that step t ended an episode. Termination cuts the bootstrap; termination or truncation cuts the trace. What
    is computed for a row of a reset is not used.
    """
    deltas = rewards + gamma * values[1:] * ~terminations - values[:-1]
    decays = np.float32(gamma * gae_lambda) * ~dones
    advantages = np.zeros_like(deltas)
    last = 0.0
    for t in reversed(range(len(deltas))):
        last = deltas[t] + decays[t] * last
        advantages[t] = last
    return advantages


@torch.no_grad()
def predict(agent: Agent, rows: Tensors) -> Tensors:
    """What `Agent.forward` returns for R rows, in chunks that bound the memory."""
    chunks = []
    for start in range(0, len(rows["obs"]), CHUNK):
        chunks.append(agent({name: tensor[start : start + CHUNK] for name, tensor in rows.items()}))
    return {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}


def make_batch(agent: Agent, rollout: Arrays, device: torch.device, args: Args) -> Tensors:
    """The R = T * N rows of a rollout to train on, by name; row t * N + n is step t of environment n.

    `agent` is the one that acted. `valid` is 0 for the rows of resets.
    """
    not_in_minibatches = ("rewards", "terminations", "resets", "discounted_returns")
    arrays = {name: array for name, array in rollout.items() if name not in not_in_minibatches}
    # (T + 1) * N rows: row i + N is one step after row i. An episode's last observation is in a row of a reset, which
    # no minibatch has; to learn of next observations, add a column: batch["next_obs"] = rows["obs"][-R:]
    rows = {name: torch.from_numpy(array).to(device).flatten(0, 1) for name, array in arrays.items()}
    outputs = predict(agent, rows)
    resets = rollout["resets"]
    is_valid = torch.from_numpy(~resets[:-1]).to(device).flatten()
    for name in outputs.keys() & rows.keys():  # what the policy that acted gave
        pair = (tensor[: len(is_valid)][is_valid] for tensor in (rows.pop(name), outputs[name]))
        if not torch.allclose(*pair, rtol=1e-3, atol=1e-3, equal_nan=True):
            raise SystemExit(f"error: what acted differs from Agent.forward in {name}: a layer or input is in one only")
    values = outputs["values"].cpu().numpy().reshape(resets.shape)
    rewards = rollout["rewards"][:-1]
    if agent.reward_rms:
        rewards = (rewards / agent.reward_rms.std.cpu().numpy()).clip(-10, 10)
    advantages = compute_gae(rewards, values, rollout["terminations"][:-1], resets[1:], args.gamma, args.gae_lambda)
    computed = {
        "values": values[:-1],
        "advantages": advantages,
        "returns": advantages + values[:-1],
    }
    batch = {name: torch.from_numpy(array).to(device).flatten() for name, array in computed.items()}
    batch |= {"logprobs": outputs["logprobs"][: rewards.size], "valid": is_valid.float()}
    if clash := batch.keys() & rows.keys():
        raise SystemExit(f"error: make_batch computes {clash}: rename these arrays of the rollout")
    return batch | {name: tensor[: rewards.size] for name, tensor in rows.items()}


def ppo_loss(outputs: Tensors, minibatch: Tensors, args: Args) -> tuple[Tensor, Tensors]:
    """PPO's loss (Schulman et al. 2017, eq. 7 and 9), a weighted sum over B rows, and metrics to log.

    Terms of your own go here, for --compile too; those of rows are sums `x @ weights` like these, as rows of weight 0
    are padding. Metrics are logged as Loss/NAME, the mean over all ranks.
    """
    weights = minibatch["weights"]
    advantages = minibatch["advantages"]
    logratio = outputs["logprobs"] - minibatch["logprobs"]
    ratio = logratio.exp()
    # a clipped value that counts is a constant, hence `detach`; `where` has the gradient of `max` in half the time
    clipped_ratio = ratio.detach().clamp(1 - args.clip_coef, 1 + args.clip_coef)
    unclipped_loss = -advantages * ratio
    clipped_loss = -advantages * clipped_ratio
    policy_loss = torch.where(unclipped_loss >= clipped_loss, unclipped_loss, clipped_loss) @ weights

    values = outputs["values"]
    value_loss = (values - minibatch["returns"]) ** 2
    if args.clip_vloss:
        low = minibatch["values"] - args.clip_coef
        high = minibatch["values"] + args.clip_coef
        clipped_loss = (values.detach().clamp(low, high) - minibatch["returns"]) ** 2
        value_loss = torch.where(value_loss >= clipped_loss, value_loss, clipped_loss)
    value_loss = 0.5 * value_loss @ weights

    entropy_loss = -outputs["entropy"] @ weights
    loss = policy_loss + args.vf_coef * value_loss + args.ent_coef * entropy_loss
    metrics = {
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "entropy_loss": entropy_loss,
        "approx_kl": (ratio - 1 - logratio).detach() @ weights,  # k3 of http://joschu.net/blog/kl-approx.html
        "clip_fraction": (ratio.detach() != clipped_ratio).to(weights.dtype) @ weights,
    }
    return loss, {name: metric.detach() for name, metric in metrics.items()}


def make_optimizer(agent: Agent, args: Args) -> tuple[torch.optim.Optimizer, Tensor]:
    """The optimizer, and a vector (P,): the parameters become views of it, their gradients views of its `grad`.

    To exchange, clip and step one vector is much faster than many tensors. Groups of parameters with options of their
    own go into `groups`, as for any optimizer of torch, with their initial learning rate and a name for the log. After
    this, change parameters and gradients in place only: `zero_grad()` or another `.to()` would cut them off.
    """
    # beside actor and critic there may be a trunk and log_std
    trained = [p for p in agent.parameters() if p.requires_grad]
    groups = [{"params": trained, "lr": args.learning_rate, "name": "learning_rate"}]
    parameters = [p for group in groups for p in group["params"]]
    if sorted(map(id, parameters)) != sorted(map(id, trained)):
        raise SystemExit("error: make_optimizer: each parameter that requires a gradient must be in one group")
    flat = nn.utils.parameters_to_vector(parameters).detach()
    flat.grad = torch.zeros_like(flat)
    nn.utils.vector_to_parameters(flat, parameters)
    for p, grad in zip(parameters, flat.grad.split([p.numel() for p in parameters]), strict=True):
        p.grad = grad.view_as(p)
    sizes = [sum(p.numel() for p in group["params"]) for group in groups]
    for group, part, grad in zip(groups, flat.split(sizes), flat.grad.split(sizes), strict=True):
        part.grad = grad
        group["params"] = [part]
    if args.optimizer == "adam":
        optimizer = torch.optim.Adam(groups, eps=1e-5, fused=not args.compile)
    else:
        optimizer = torch.optim.RMSprop(groups, eps=1e-5)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer, flat


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load the moments of a checkpoint; the learning rates are those of the flags."""
    moments = state["optimizer"]["state"]
    sizes = [max(tensor.numel() for tensor in entry.values()) for entry in moments.values()]
    if sizes != [tensor.numel() for group in optimizer.param_groups for tensor in group["params"]]:
        raise SystemExit("error: the checkpoint is of other groups of parameters, see make_optimizer")
    optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> dict:
    """Set the learning rate of each group to `factor` of its initial one; return them by name, for the log."""
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(group["initial_lr"] * factor)  # torch.compile would compile anew for each number
    return {group["name"]: float(group["lr"]) for group in optimizer.param_groups}


def make_gradient(agent: Agent, args: Args) -> Callable:
    """The gradient of the loss with respect to the vector of `make_optimizer`, as a function that can be compiled."""
    trained = [(name, p) for name, p in agent.named_parameters() if p.requires_grad]
    trained.sort(key=lambda item: item[1].storage_offset())  # as they are in the vector
    sizes = [p.numel() for _, p in trained]

    def loss_at(flat: Tensor, minibatch: Tensors):
        parts = zip(trained, flat.split(sizes), strict=True)
        tensors = {name: part.view(p.shape) for (name, p), part in parts}
        return ppo_loss(func.functional_call(agent, tensors, (minibatch,)), minibatch, args)

    return func.grad(loss_at, has_aux=True)


def compile_graph(function: Callable, is_cuda: bool) -> Callable:
    """Compile a function as one graph, or fail."""
    # do not check at each call that torch's own layers are what they were
    guards = torch.compiler.skip_guard_on_inbuilt_nn_modules_unsafe
    options = {"cpp_wrapper": not is_cuda, "guard_filter_fn": guards}
    return torch.compile(function, fullgraph=True, dynamic=False, options=options)


def make_train_step(
    agent: Agent,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    flat: Tensor,
    reduce_gradients: Callable | None,
    world_size: int,
    args: Args,
) -> Callable:
    """Make a function that takes an optimizer step on a minibatch and returns metrics.

    `reduce_gradients` sums the gradients over the ranks; it is None with one rank, or if `model` averages them.
    """
    grad = flat.grad
    step = optimizer.step
    if args.compile:
        gradient = make_gradient(agent, args)
        # without torch's wrappers for hooks and profiles, which cannot be compiled
        step = partial(unwrap(type(optimizer).step), optimizer)

    def backward(minibatch: Tensors) -> Tensors:
        if args.compile:
            new_grad, metrics = gradient(flat, minibatch)
            grad.copy_(new_grad)
            return metrics
        grad.zero_()
        loss, metrics = ppo_loss(model(minibatch), minibatch, args)
        loss.backward()
        return metrics

    def clip_and_step() -> Tensor:
        grad_norm = grad.norm()
        grad.mul_((args.max_grad_norm / (grad_norm + 1e-6)).clamp(max=1))
        step()
        return grad_norm

    def train_step(minibatch: Tensors) -> Tensors:
        metrics = backward(minibatch)
        if reduce_gradients:
            grad.copy_(reduce_gradients(grad) / world_size)
        return metrics | {"grad_norm": clip_and_step()}

    if args.compile:
        if reduce_gradients is None:
            return compile_graph(train_step, flat.is_cuda)
        backward = compile_graph(backward, flat.is_cuda)
        clip_and_step = compile_graph(clip_and_step, flat.is_cuda)
    return train_step


def shuffle(
    valid: ndarray, counts: ndarray, num_minibatches: int, part: int, num_parts: int, rng: np.random.Generator
) -> Iterator[Tensors]:
    """Deal those of R rows that are valid to minibatches, anew each epoch.

    Yields the numbers of rows, and their weights, (minibatches, B) each, of one rank's part.

    Short minibatches are padded with a row of weight 0. `counts` holds the number of valid rows of each rank. With
    these weights the mean of the ranks' weighted sums is the mean over all valid rows of a minibatch.
    """
    B = math.ceil(len(valid) / num_minibatches / num_parts)
    valid_rows = np.flatnonzero(valid)
    # valid rows of minibatch m over all ranks: those dealt m, m + num_minibatches, m + 2 * num_minibatches, ...
    sizes = np.ceil((counts[:, None] - np.arange(num_minibatches)) / num_minibatches).sum(0)
    weights = np.zeros((B * num_parts, num_minibatches), np.float32)
    weights.flat[: len(valid_rows)] = 1
    weights *= len(counts) * num_parts / np.maximum(sizes, 1)
    while True:
        rows = np.full(weights.shape, -1)
        rows.flat[: len(valid_rows)] = rng.permutation(valid_rows)
        yield {
            name: torch.from_numpy(x[part::num_parts].T.copy()) for name, x in (("rows", rows), ("weights", weights))
        }


def update(batch: Tensors, train_step: Callable, epochs: Iterator[Tensors], gather: Callable, args: Args) -> Tensors:
    """Train on a batch of R rows, for epochs of `shuffle`; return the mean of each metric over all steps."""
    history = []
    for dealt in islice(epochs, args.update_epochs):
        rows = dealt["rows"].to(batch["obs"].device)
        epoch = {name: tensor[rows] for name, tensor in batch.items()}
        epoch["weights"] = dealt["weights"].to(rows.device)
        for tensors in zip(*epoch.values(), strict=True):
            history.append(train_step(dict(zip(epoch, tensors, strict=True))))
        if args.target_kl is not None:  # the mean over all ranks, so that none leaves the loop alone
            approx_kl = sum(metrics["approx_kl"] for metrics in history[-len(rows) :]) / len(rows)
            if gather({"approx_kl": approx_kl})["approx_kl"].mean() > args.target_kl:
                break
    return {name: torch.stack([metrics[name] for metrics in history]).mean() for name in history[0]}


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Make each rank's tensor the sum of all."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def broadcast(value: object) -> object:
    """Rank 0's value, on all ranks."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def gather_rows(tensor: Tensor) -> Tensor:
    """The rows of all ranks, one rank after the other."""
    gathered = tensor.new_empty(dist.get_world_size() * len(tensor), *tensor.shape[1:])
    dist.all_gather_into_tensor(gathered, tensor.contiguous())
    return gathered


def gather_numbers(numbers: dict, rank: int, world_size: int, all_reduce: Callable, device: torch.device) -> Arrays:
    """Numbers of all ranks by name, (world_size,) each; all ranks must call it, with the same names in one order."""
    table = torch.zeros(world_size, len(numbers), dtype=torch.float64, device=device)
    table[rank] = torch.tensor([float(number) for number in numbers.values()], dtype=torch.float64)
    return dict(zip(numbers, all_reduce(table).T.cpu().numpy(), strict=True))


def connect_ranks(rank: int, world_size: int, broadcast: Callable) -> list[Connection]:
    """Connect rank 0 with all others on this machine; return rank 0's connections in rank order, or the one to it."""
    if rank == 0:
        key = os.urandom(32)
        listener = Listener(("localhost", 0), backlog=world_size, authkey=key)
        broadcast((listener.address, key))
        peers = [listener.accept() for _ in range(1, world_size)]
        peers.sort(key=Connection.recv)  # each sends its rank
    else:
        address, key = broadcast(None)
        peers = [Client(address, authkey=key)]
        peers[0].send(rank)
    for peer in peers:
        with socket.socket(fileno=os.dup(peer.fileno())) as duplicate:
            duplicate.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return peers


def sum_over_tcp(tensor: Tensor, rank: int, peers: list[Connection], timeout: float) -> Tensor:
    """Make each rank's tensor the sum of all, fast for small ones: a rank that waits spins for 0.1 s, then sleeps."""
    array = tensor.view(-1).numpy()
    received = np.empty_like(array)
    try:
        if rank > 0:
            peers[0].send_bytes(array)
        for peer in peers:
            awake_until = time.monotonic() + 0.1
            while not peer.poll(0):
                os.sched_yield()
                if time.monotonic() > awake_until and not peer.poll(timeout):
                    raise SystemExit(f"error: --dist-timeout: waited {timeout} seconds for another rank")
            peer.recv_bytes_into(received)
            array[:] = array + received if rank == 0 else received
        if rank == 0:
            for peer in peers:
                peer.send_bytes(array)
    except (EOFError, OSError) as error:
        time.sleep(1)  # let the launcher notice the rank first that really failed
        raise SystemExit("error: lost the connection to another rank") from error
    return tensor


def choose_exchange(args: Args, world_size: int, parameters: Tensor) -> str:
    """How the ranks average gradients: `none` if there is one rank, `ddp`, or `tcp` for small networks on CPUs."""
    if world_size == 1:
        return "none"
    can_use_tcp = os.environ.get("LOCAL_WORLD_SIZE") == str(world_size) and not parameters.is_cuda
    if args.exchange == "tcp" and not can_use_tcp:
        raise SystemExit("error: --exchange tcp is for CPUs of one machine: leave it out")
    if args.exchange == "auto":
        is_small = world_size <= os.cpu_count() and len(parameters) <= 250_000
        return "tcp" if can_use_tcp and is_small else "ddp"
    return args.exchange


def rollout_numbers(batch: Tensors) -> dict:
    """What a rank tells the others of its rollout; a NaN in the data makes its sum NaN, for `check_finite`."""
    valid = batch["valid"] > 0
    advantages = batch["advantages"][valid].double()
    return {
        "valid_rows": len(advantages),
        "advantages": advantages.sum(),
        "squared_advantages": advantages.square().sum(),
        # advantages = returns - values
        "explained_variance": 1 - advantages.var(correction=0) / (batch["returns"][valid].var(correction=0) + 1e-12),
    }


def normalize(advantages: Tensor, numbers: Arrays) -> Tensor:
    """Advantages with mean 0 and standard deviation 1 over the valid rows of all ranks."""
    valid_rows = numbers["valid_rows"].sum()
    mean = numbers["advantages"].sum() / valid_rows
    variance = numbers["squared_advantages"].sum() / valid_rows - mean**2
    return (advantages - mean) / (math.sqrt(max(variance, 0.0)) + 1e-8)


def check_finite(numbers: Arrays, iteration: int) -> None:
    """Exit on all ranks, which have the same numbers, if one of these is not finite."""
    for name, of_ranks in numbers.items():
        finite = np.isfinite(of_ranks)
        if not finite.all():
            cause = "a wrapper in make_env" if name in ("observations", "rewards") else "a lower learning rate"
            rank = finite.argmin()
            raise SystemExit(f"error: iteration {iteration}: not finite: {name} of rank {rank}; {cause} may help")


def update_normalizers(agent: Agent, rollout: Arrays, all_reduce: Callable) -> None:
    """Merge the valid rows of a rollout into the normalisers of observations and rewards."""
    is_valid = ~rollout["resets"][:-1]
    for rms, rows in (
        (agent.obs_rms, rollout["obs"][:-1]),
        (agent.reward_rms, rollout["discounted_returns"][1:, :, None]),
    ):
        if rms:
            rms.update(torch.from_numpy(rows[is_valid]).to(rms.mean.device), all_reduce)


def evaluate(agent: Agent, args: Args, video_dir: str | None, signals: list) -> ndarray:
    """Returns (eval_episodes,) of greedy episodes, each in an environment of its own; a signal cuts them short."""
    print(f"evaluating {args.eval_episodes} episodes", flush=True)
    envs, obs, infos = make_envs(args, args.eval_episodes, args.seed + 10**9, video_dir)  # seeds that no rollout has
    returns = np.zeros(args.eval_episodes)
    running = np.ones(args.eval_episodes, bool)
    for _ in range(args.eval_max_steps):
        if signals or not running.any():
            break
        actions = agent.act(agent.from_env(obs, infos))
        obs, rewards, terminations, truncations, infos = envs.step(agent.to_env(actions))
        returns += np.where(running, rewards, 0.0)
        running &= ~has_ended(terminations, truncations, infos, args)
    envs.close()
    if running.any():
        print(f"evaluation cut short: {running.sum()} episodes go on after --eval-max-steps or at a signal", flush=True)
    return returns


class Log:
    """Rank 0's log: TensorBoard's curves, and a line now and then."""

    def __init__(self, run_dir: str, args: Args, rows: int, global_step: int, total: int):
        # a resumed run drops what was logged after the step of its checkpoint
        self.writer = SummaryWriter(run_dir, purge_step=global_step + 1 if global_step else None)
        flags = "".join(f"{name}|{value}\n" for name, value in vars(args).items())
        self.writer.add_text("hyperparameters", f"flag|value\n-|-\n{flags}", global_step)
        self.total = total
        self.next_line = rows
        self.mean_return = math.nan

    def add(self, metrics: dict, global_step: int) -> None:
        """Add a point to each curve, as all scalars are; one event for all is much faster than one each."""
        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self.writer.file_writer.add_summary(Summary(value=values), global_step)

    def add_iteration(
        self, losses: Arrays, numbers: Arrays, seconds: dict, learning_rates: dict, global_step: int, rows: int
    ) -> None:
        """Add an iteration, of which `losses` and `numbers` are those of all ranks."""
        speed = numbers["valid_rows"].sum() / sum(seconds.values())
        metrics = {f"Loss/{name}": of_ranks.mean() for name, of_ranks in losses.items()}
        metrics |= {f"Time/{name}": duration for name, duration in seconds.items()}
        metrics["Time/step_per_second"] = speed
        metrics["Loss/explained_variance"] = numbers["explained_variance"].mean()
        metrics["Info/entropy"] = -metrics["Loss/entropy_loss"]
        metrics |= {f"Info/{name}": rate for name, rate in learning_rates.items()}
        if episodes := numbers["episodes"].sum():
            self.mean_return = numbers["episode_returns"].sum() / episodes
            metrics["Rewards/rew_avg"] = self.mean_return
            metrics["Game/ep_len_avg"] = numbers["episode_lengths"].sum() / episodes
        self.add(metrics, global_step)
        if rows >= self.next_line:
            self.next_line = rows + self.total // 20
            line = f"step {rows} of {self.total}: return {self.mean_return:.2f}, {speed:.0f} steps/s"
            rates = ", ".join(f"{name} {rate:.2g}" for name, rate in learning_rates.items())
            print(f"{line}, {rates}", flush=True)


def evaluate_and_keep_best(agent: Agent, args: Args, run_dir: str, log: Log, state: dict, signals: list) -> None:
    """Log the mean return of greedy episodes; with --eval-every keep the best agent as best.pt."""
    if not args.eval_episodes:
        return
    step = state["global_step"]
    video_dir = f"{run_dir}/videos/test-step-{step}" if args.capture_video else None
    returns = evaluate(agent, args, video_dir, signals)
    if signals:
        return
    log.add({"Test/cumulative_reward": returns.mean()}, step)
    print(f"step {step}: greedy return {returns.mean():.2f} +- {returns.std():.2f}", flush=True)
    path = f"{run_dir}/checkpoints/best.pt"
    best_return = load_checkpoint(path)["best_return"] if os.path.exists(path) else -math.inf
    if args.eval_every and returns.mean() > best_return:
        save_checkpoint(run_dir, "best", state | {"best_return": float(returns.mean())}, args)


def list_checkpoints(run_dir: str) -> list[str]:
    """The checkpoints of a run, the newest last."""
    return sorted(glob(f"{escape(run_dir)}/checkpoints/step-*.pt"))


def make_checkpoint(agent: Agent, optimizer: torch.optim.Optimizer, args: Args, rows: int, global_step: int) -> dict:
    """What a checkpoint holds; its tensors are those of the agent and the optimizer, not copies."""
    return {
        "version": CHECKPOINT_VERSION,
        "agent": agent.state_dict(),
        "optimizer": optimizer.state_dict(),
        "args": vars(args),
        "rows": rows,
        "global_step": global_step,
    }


def save_checkpoint(run_dir: str, name: str, state: dict, args: Args) -> None:
    """Write atomically, whatever ends the program meanwhile; keep only the last --keep-checkpoints."""
    folder = f"{run_dir}/checkpoints"
    buffer = io.BytesIO()
    torch.save(state, buffer)
    try:
        os.makedirs(folder, exist_ok=True)
        with open(f"{folder}/incomplete", "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{folder}/incomplete", f"{folder}/{name}.pt")
    except OSError as error:
        raise SystemExit(
            f"error: cannot write {folder}/{name}.pt: {error.strerror}; earlier checkpoints are whole"
        ) from None
    for old in list_checkpoints(run_dir)[: -args.keep_checkpoints]:
        os.remove(old)


def load_checkpoint(path: str) -> dict:
    """Read what `save_checkpoint` wrote, without running code of it."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        version = state["version"]
    except Exception as error:  # torch.load raises many kinds for a foreign file
        raise SystemExit(f"error: {path} is no checkpoint of this program: {type(error).__name__}") from None
    if version != CHECKPOINT_VERSION:
        raise SystemExit(f"error: {path} is of version {version}, this program reads version {CHECKPOINT_VERSION}")
    return state


def open_run(args: Args, logs: str) -> tuple[str, dict | None]:
    """Folder below `logs` and checkpoint to resume; the run goes on in its folder only from its last checkpoint."""
    prefix = f"{logs}/{args.env_id.replace('/', '-')}_{args.exp_name}_{args.seed}"
    run_dir = f"{prefix}_{datetime.now():%Y-%m-%d_%H-%M-%S-%f}"
    path = args.resume
    if path == "auto":
        path = max(glob(f"{escape(prefix)}_????-??-??_*/checkpoints/step-*.pt"), default="")
        if not path:
            print("no checkpoint to resume: a new run begins", flush=True)
    if not path:
        return run_dir, None
    state = load_checkpoint(path)
    # flags of your own that change the agent belong here
    for name in ("env_id", "hidden_sizes", "activation_function", "optimizer", "normalize_obs", "normalize_rewards"):
        trained = state["args"].get(name, getattr(Args, name))
        if trained != getattr(args, name):
            raise SystemExit(f"error: {path} was trained with {name} {trained}")
    folder = os.path.dirname(os.path.dirname(os.path.abspath(path)))
    if list_checkpoints(folder)[-1:] == [os.path.abspath(path)]:
        run_dir = os.path.relpath(folder)
    print(f"resuming {path} at step {state['global_step']}", flush=True)
    return run_dir, state


def trained_args(path: str) -> Args:
    """The arguments of a checkpoint's training, changed so as to evaluate it."""
    trained = load_checkpoint(path)["args"]
    trained |= {"capture_video": False, "resume": "", "evaluate": path}
    trained["eval_episodes"] = trained["eval_episodes"] or Args.eval_episodes
    return Args(**{name: value for name, value in trained.items() if hasattr(Args, name)})


def evaluate_checkpoint(args: Args) -> None:
    """Play a saved agent on the CPU, on rank 0."""
    if os.environ.get("RANK", "0") != "0":
        return
    path = args.evaluate
    state = load_checkpoint(path)
    torch.set_num_threads(args.num_threads)
    envs, *_ = make_envs(args, 1, args.seed)
    agent = Agent(envs.single_observation_space, envs.single_action_space, args)
    agent.load_state_dict(state["agent"])
    video_dir = f"{os.path.splitext(path)[0]}-videos" if args.capture_video else None
    returns = evaluate(agent, args, video_dir, [])
    print(f"step {state['global_step']}: greedy return {returns.mean():.2f} +- {returns.std():.2f}")


def catch_signals() -> list[float]:
    """Note the times of SIGINT and SIGTERM: a run stops after its iteration, or at once on another one 1 s later."""
    times = []

    def handler(number: int, _) -> None:
        times.append(time.monotonic())
        if times[-1] > times[0] + 1:  # else it is the launcher's copy of the first
            raise KeyboardInterrupt(number)

    with suppress(ValueError):  # in a thread
        signal.signal(signal.SIGINT, handler)
        signal.signal(signal.SIGTERM, handler)
    return times


@contextmanager
def clean_up() -> Iterator[None]:
    """However a run ends, end the processes of its environments and give back the signals."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except KeyboardInterrupt as interrupt:
        raise SystemExit(128 + (*interrupt.args, signal.SIGINT)[0]) from None
    finally:
        for process in multiprocessing.active_children():
            if process.name.startswith("Worker<"):
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.kill()
        with suppress(ValueError):  # in a thread
            for number, handler in handlers.items():
                signal.signal(number, handler)


def check_launcher() -> None:
    """Refuse launchers that torch does not know: each process would train alone."""
    for name in ("SLURM_NTASKS", "SLURM_NTASKS_PER_NODE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if "WORLD_SIZE" not in os.environ and os.environ.get(name, "1") != "1":
            raise SystemExit(
                f"error: {name} is {os.environ[name]}: start the ranks with torchrun, as in `srun torchrun`"
            )


def describe(envs: VectorEnv, agent: Agent, args: Args) -> None:
    """Print which network was built for which observation."""
    space = envs.single_observation_space
    kind = type(getattr(envs.unwrapped, "single_observation_space", space)).__name__
    hidden = "-".join(map(str, args.hidden_sizes))
    network = "Nature CNN" if agent.is_image else f"{math.prod(agent.obs_shape)} numbers -> MLP {hidden}"
    print(f"observation: {kind} -> {network}", flush=True)
    bounds = np.abs([space.low, space.high])[:, space.high != 255]
    if not agent.is_image and not agent.obs_rms and bounds.max(where=bounds < 1e6, initial=0) > 100:
        print("observations have bounds beyond 100: --normalize-obs may help", flush=True)


def init_ranks(args: Args) -> tuple[int, int, torch.device]:
    """Rank, number of ranks and device of this process; torchrun sets these variables, plain python does not."""
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if args.cuda else torch.device("cpu")
    if args.cuda:
        if torch.cuda.device_count() <= device.index:
            raise SystemExit(f"error: --cuda needs a GPU per rank, found {torch.cuda.device_count()}")
        torch.cuda.set_device(device)
    if world_size > 1:
        # after a restart torchrun's store on one machine still holds the old addresses (PyTorch issue 135712)
        is_alone = os.environ.get("GROUP_WORLD_SIZE") == "1"
        store, _, _ = next(dist.rendezvous("env://", rank, world_size))
        store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"] if is_alone else "", store)
        backend = "nccl" if args.cuda else "gloo"
        timeout = timedelta(seconds=args.dist_timeout)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    return rank, world_size, device


@clean_up()
def main(args: Args) -> None:
    if args.evaluate:
        return evaluate_checkpoint(args)

    # find the run before the ranks connect, so that a failure here ends all at once
    opened_run = open_run(args, "logs/torch_logs") if os.environ.get("RANK", "0") == "0" else None

    # ranks and sizes
    rank, world_size, device = init_ranks(args)
    run_dir, state = broadcast(opened_run)  # a checkpoint may be on rank 0's machine alone
    rows = state["rows"] if state else 0
    global_step = state["global_step"] if state else 0  # rows without resets
    rollout_size = world_size * args.num_steps * args.num_envs
    num_iterations = args.total_timesteps // rollout_size
    num_minibatches = round(args.num_steps * args.num_envs / args.per_rank_batch_size)
    if min(num_iterations, num_minibatches) < 1:
        flags = f"--total-timesteps {args.total_timesteps} or --per-rank-batch-size {args.per_rank_batch_size}"
        raise SystemExit(f"error: {flags} does not fit a rollout of {rollout_size} steps on {world_size} ranks")

    # environments; a resumed run does not replay the seeds of before
    signals = catch_signals()
    video_dir = f"{run_dir}/videos/train-from-step-{global_step}" if args.capture_video and rank == 0 else None
    envs, obs, infos = make_envs(args, args.num_envs, args.seed + rows + rank * args.num_envs, video_dir)

    # agent and optimizer
    torch.manual_seed(args.seed)  # the same on all ranks; actions and shuffling have generators of their own
    torch.set_num_threads(args.num_threads)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    agent = Agent(envs.single_observation_space, envs.single_action_space, args).to(device)
    optimizer, flat = make_optimizer(agent, args)
    if state:
        agent.load_state_dict(state["agent"])
        load_optimizer(optimizer, state)
    rollout, sums = make_storage(args, agent, obs, infos)
    checkpoint = partial(make_checkpoint, agent, optimizer, args)

    # how ranks meet
    exchange = choose_exchange(args, world_size, flat)
    all_reduce = sum_over_ranks
    if exchange == "tcp":
        peers = connect_ranks(rank, world_size, broadcast)
        all_reduce = partial(sum_over_tcp, rank=rank, peers=peers, timeout=args.dist_timeout)
    gather = partial(gather_numbers, rank=rank, world_size=world_size, all_reduce=all_reduce, device=device)
    uses_ddp = exchange == "ddp" and not args.compile
    model = DistributedDataParallel(agent) if uses_ddp else agent
    reduce_gradients = None if uses_ddp or exchange == "none" else all_reduce
    train_step = make_train_step(agent, model, optimizer, flat, reduce_gradients, world_size, args)

    if rank == 0:
        describe(envs, agent, args)
        print(f"{run_dir}: {world_size} ranks, {flat.numel()} parameters, exchange: {exchange}", flush=True)
        log = Log(run_dir, args, rows, global_step, num_iterations * rollout_size)
    is_stopping = False
    for iteration in range(math.ceil(rows / rollout_size) + 1, num_iterations + 1):
        is_last = iteration == num_iterations
        learning_rates = set_learning_rates(optimizer, 1 - args.anneal_lr * (iteration - 1) / num_iterations)
        # random streams of their own for each iteration and each rank's actions and shuffling
        action_rng = np.random.default_rng((args.seed, rows, 0, rank))
        shuffle_rng = np.random.default_rng((args.seed, rows, 1, 0 if args.share_data else rank))

        # rollout: the actor alone steps, then all rows pass through both networks
        times = [time.perf_counter()]
        ended = collect_rollout(agent, envs, rollout, sums, action_rng, args)
        batch = make_batch(agent, rollout, device, args)
        times.append(time.perf_counter())

        # communication: numbers of all ranks, and with --share-data the rows themselves
        numbers = gather(ended | rollout_numbers(batch))
        check_finite(numbers, iteration)
        if args.normalize_advantages:
            batch["advantages"] = normalize(batch["advantages"], numbers)
        if args.share_data and world_size > 1:
            batch = {name: gather_rows(tensor) for name, tensor in batch.items()}
        valid = batch.pop("valid").cpu().numpy() > 0
        counts = np.array([valid.sum()]) if args.share_data else numbers["valid_rows"]
        part, num_parts = (rank, world_size) if args.share_data else (0, 1)
        epochs = shuffle(valid, counts, num_minibatches, part, num_parts, shuffle_rng)
        times.append(time.perf_counter())

        # update; only then the normalisers, as the rollout and its update have to see the same observations
        metrics = update(batch, train_step, epochs, gather, args)
        losses = gather(metrics | {"stop": len(signals)})
        is_stopping = losses.pop("stop").any() and not is_last
        check_finite(losses, iteration)
        update_normalizers(agent, rollout, all_reduce)
        times.append(time.perf_counter())
        global_step += int(numbers["valid_rows"].sum())
        rows += rollout_size

        # logs, checkpoints and evaluations, of rank 0 alone: nothing in which ranks meet
        if rank == 0:
            seconds = dict(zip(("rollout", "communication", "update"), np.diff(times), strict=True))
            log.add_iteration(losses, numbers, seconds, learning_rates, global_step, rows)
            if is_last or is_stopping or (args.checkpoint_every and iteration % args.checkpoint_every == 0):
                log.writer.flush()  # a run that is lost from here on has curves up to its checkpoint
                save_checkpoint(run_dir, f"step-{global_step:012d}", checkpoint(rows, global_step), args)
                log.add({"Time/checkpoint": time.perf_counter() - times[-1]}, global_step)
            if args.eval_every and iteration % args.eval_every == 0 and not is_last and not is_stopping:
                evaluate_and_keep_best(agent, args, run_dir, log, checkpoint(rows, global_step), signals)
        if is_stopping:
            break

    # the end
    envs.close()
    if rank == 0:
        if not is_stopping:
            evaluate_and_keep_best(agent, args, run_dir, log, checkpoint(rows, global_step), signals)
        log.writer.close()
        if is_stopping:
            print(f"stopped by a signal: go on with --resume {list_checkpoints(run_dir)[-1]}")
        print(f"logs, checkpoints and videos: {run_dir}")
    if world_size > 1:
        dist.barrier()  # rank 0 has been writing, and a launcher may end it once another has left
        time.sleep(0.1)  # gloo's threads let go of the last tensor meanwhile (PyTorch issue 190489)
        dist.destroy_process_group()
    if is_stopping or signals:
        raise SystemExit(128 + signal.SIGTERM)


if __name__ == "__main__":
    try:
        if {"True", "False"} & {*sys.argv}:
            raise SystemExit("error: switches are --flag and --no-flag, without True or False")
        args = tyro.cli(Args)
        if args.evaluate:  # flags that are not given are those of the training
            args = tyro.cli(Args, default=trained_args(args.evaluate))
        else:
            check_launcher()
        main(args)
    except (Exception, SystemExit) as error:
        get_error_handler().record_exception(error)  # into the report of torchrun
        raise
