"""Proximal Policy Optimization on many processes, in one file.

Every rank collects a rollout in its own environments and trains on it; DDP averages the gradients, so that all ranks
hold the same parameters. Copy this file and hack it; diff ppo_torch_ddp.py and ppo_fabric.py to see what Fabric does.

In Lightning Fabric, with one process, two on the CPU, eight GPUs, two machines (--node-rank=1 on the second):
    python ppo_fabric.py
    fabric run --accelerator=cpu --strategy=ddp --devices=2 ppo_fabric.py
    fabric run --accelerator=gpu --strategy=ddp --devices=8 ppo_fabric.py
    fabric run --accelerator=gpu --devices=8 --num-nodes=2 --node-rank=0 --main-address=HOST ppo_fabric.py

PPO: Schulman et al. 2017, arXiv:1707.06347. GAE: Schulman et al. 2016, arXiv:1506.02438.
"""

import atexit
import io
import json
import math
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import partial
from glob import escape, glob
from importlib import import_module
from inspect import unwrap
from itertools import pairwise
from types import MethodType
from typing import Literal

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's: ranks share the cores; torch has --num-threads

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium.vector import VectorEnv
from lightning.fabric import Fabric
from lightning.fabric.loggers import TensorBoardLogger
from lightning.fabric.strategies import DDPStrategy, SingleDeviceStrategy
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from torch import Generator, Tensor, func, nn
from torch.distributed.distributed_c10d import _set_pg_timeout
from tqdm import tqdm

Tensors, Optimizer = dict[str, Tensor], torch.optim.Optimizer
CHECKPOINT_VERSION = 1


@dataclass
class Args:
    # experiment
    exp_name: str = "ppo"  # name of the experiment, part of the run's folder
    seed: int = 1  # seed of the parameters, the environments, the actions and the shuffling
    torch_deterministic: bool = True  # let cuDNN use deterministic algorithms only
    capture_video: bool = False  # record the first environment of rank 0, and of the evaluation, under the run's folder
    eval_every: int = 0  # evaluate every so many iterations (0: only at the end)
    eval_episodes: int = 10  # greedy episodes of an evaluation, each in an environment of its own (0: none)
    checkpoint_every: int = 20  # write a checkpoint every so many iterations (0: only at the end)
    keep_checkpoints: int = 3  # keep so many of the last checkpoints, and with eval_every the best one
    resume: str = ""  # go on from this checkpoint; `auto`: from the last one of the newest run of this name
    evaluate: str = ""  # play the agent of this checkpoint, with the flags that it was trained with, and stop
    # environment
    env_id: str = "CartPole-v1"  # id of the environment; `package:Name-v0` imports the package that registers it
    env_kwargs: str = "{}"  # keyword arguments of the environment, a JSON object
    vec_env: Literal["sync", "async", "native", "envpool"] = "sync"  # here, in processes, in its own way, by EnvPool
    num_envs: int = 4  # environments per rank that steps them
    normalize_obs: bool = False  # normalise vectors by their running mean and deviation over all ranks
    normalize_rewards: bool = False  # divide rewards by the running deviation of the discounted return
    clip_rewards: bool = False  # clip rewards to -1 .. 1 (returns are always reported as they are)
    episodic_life: bool = False  # end an episode with a lost life, while `info["lives"]` are left in the game
    # algorithm
    total_timesteps: int = 100_000  # environment steps over all ranks: the iterations that fit in are run
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
    clip_vloss: bool = False  # clip the step of the value function by clip_coef as well
    ent_coef: float = 0.0  # coefficient of the entropy bonus
    vf_coef: float = 0.5  # coefficient of the value loss
    max_grad_norm: float = 0.5  # clip the gradient to this norm
    target_kl: float | None = None  # end the update after an epoch whose mean approximate KL divergence is above this
    # distributed
    per_rank_batch_size: int = 64  # rows per minibatch and training rank
    share_data: bool = False  # shuffle all ranks' rollouts together; each takes its part of every minibatch
    tcp_all_reduce: bool = False  # sum gradients and statistics over plain TCP, not gloo: small networks on CPUs
    compile: bool = False  # compile updates with torch.compile (CUDA: the gradient of the loss, into a CUDA graph)
    num_threads: int = 1  # torch's CPU threads per rank, in updates: networks of this size run slower on more
    dist_timeout: int = 1800  # seconds that a rank waits for the others, for example while rank 0 evaluates

    def __post_init__(self) -> None:
        for names, low, high in (
            ("num_envs total_timesteps update_epochs hidden_sizes per_rank_batch_size num_threads", 1, math.inf),
            ("keep_checkpoints dist_timeout", 1, 1e9),
            ("num_steps", 2, math.inf),  # of two steps of an environment one at least is no reset
            ("seed", 0, 2**31),
            ("eval_every eval_episodes checkpoint_every ent_coef vf_coef", 0, math.inf),
            ("learning_rate clip_coef max_grad_norm target_kl", 1e-30, math.inf),
            ("log_std_init", -20, 20),
            ("gamma gae_lambda", 0, 1),
        ):
            for name in names.split():
                for value in np.ravel(getattr(self, name)):
                    if value is not None and not (low <= value <= high and value < math.inf):
                        raise SystemExit(f"error: --{name.replace('_', '-')} must be in {low} .. {high}, not {value}")


def make_env(env_id: str, kwargs: dict) -> gym.Env:
    """One environment. In a process of its own it leaves signals, which launchers send to all, to its rank."""
    if multiprocessing.parent_process():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return gym.make(env_id, **kwargs)


def make_envs(args: Args, num_envs: int, seed: int, video_dir: str | None = None) -> tuple[VectorEnv, np.ndarray]:
    """Make a vector of environments, the place to plug in your own, and reset it with `seed`.

    Its autoreset mode must be NEXT_STEP: a step after an episode's end ignores the action, pays 0 and begins the next,
    with `episodic_life` in the same game while `info["lives"]` are left. The first one's videos go to `video_dir`.
    """
    spaces, wrappers, video = gym.spaces, gym.wrappers.vector, {"render_mode": "rgb_array"} if video_dir else {}
    finite = (spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)
    vectorized, atari = args.vec_env in ("native", "envpool"), "ALE/" in args.env_id
    try:
        kwargs = dict(**json.loads(args.env_kwargs))
        if vectorized and kwargs.keys() & {"reward_clipping", "reward_clip", "life_loss_info", "episodic_life"}:
            raise ValueError("take --clip-rewards and --episodic-life, which leave the reported returns alone")
        if args.capture_video and vectorized and (atari or args.vec_env == "envpool"):
            raise ValueError("it does not render: take --vec-env sync for --capture-video")
        if args.episodic_life and atari and not vectorized:
            raise ValueError("take --vec-env native for --episodic-life")
        env_id = f"ale_py:{args.env_id}" if args.env_id.startswith("ALE/") else args.env_id  # what registers them
        if args.vec_env == "envpool":
            make, life = import_module("envpool").make_gymnasium, {"episodic_life": True} if args.episodic_life else {}
            envs = gym.vector.VectorWrapper(make(env_id, num_envs=num_envs, seed=seed, **life, **kwargs))
            envs.observation_space = gym.vector.utils.batch_space(envs.single_observation_space, num_envs)
        elif args.vec_env == "native":
            # its own episodic_life would start a new game with each life
            kwargs |= {"reward_clipping": False, "life_loss_info": args.episodic_life} if atari else {}
            envs = gym.make_vec(env_id, num_envs, "vector_entry_point", **video, **kwargs)
            envs = wrappers.RecordVideo(envs, video_dir, record_first_only=True) if video_dir else envs
        else:
            vectorize = gym.vector.AsyncVectorEnv if args.vec_env == "async" else gym.vector.SyncVectorEnv
            makers = [partial(make_env, env_id, kwargs)] * num_envs
            if video_dir:
                makers[0] = lambda: gym.wrappers.RecordVideo(make_env(env_id, kwargs | video), video_dir)
            envs = vectorize(makers, copy=False)  # they are copied anyway: 5% faster rollouts
        if isinstance(envs.single_observation_space, (*finite, spaces.Dict, spaces.Tuple)):
            envs = wrappers.FlattenObservation(envs)
        obs_space, action_space = envs.single_observation_space, envs.single_action_space
        if not isinstance(obs_space, spaces.Box):
            raise ValueError(f"gymnasium.wrappers.TransformObservation can make a Box of {obs_space}")
        if not isinstance(action_space, finite) and action_space.dtype not in (np.float32, np.float64):
            raise ValueError(f"gymnasium.wrappers.TransformAction can make a Box of floats of {action_space}")
        if envs.metadata.get("autoreset_mode") != gym.vector.AutoresetMode.NEXT_STEP:
            raise ValueError("the autoreset mode must be NEXT_STEP")
        box = spaces.Box(-1, 1, action_space.shape)  # around where the Gaussian starts
        low, high = getattr(action_space, "low", 0), getattr(action_space, "high", 0)
        if isinstance(action_space, spaces.Box) and np.isfinite(high - low).all() and action_space != box:
            rescale = lambda actions: (low + (actions + 1) / 2 * (high - low)).clip(low, high)  # noqa: E731
            envs = wrappers.TransformAction(envs, rescale, single_action_space=box)
        return envs, envs.reset(seed=None if args.vec_env == "envpool" else seed)[0]  # EnvPool has its seed
    except (gym.error.Error, ImportError, AssertionError, OSError, RuntimeError, TypeError, ValueError) as error:
        flags = f"--env-id {args.env_id} --env-kwargs {args.env_kwargs} --vec-env {args.vec_env}"
        raise SystemExit(f"error: {flags}: {error}") from error


class Images(nn.Module):
    """8-bit images, channels first or last, to floats (B, channels, height, width) from 0 to 1; frames are channels."""

    def forward(self, obs: Tensor) -> Tensor:
        return (obs.movedim(-1, -3) if obs.shape[-1] < min(obs.shape[-3:-1]) else obs).flatten(1, -3) / 255


class Normalizer(nn.Module):
    """Running mean and variance, (size,), of the valid rows of all ranks; frozen but for `merge`."""

    def __init__(self, size: int):
        super().__init__()
        for name in ("count", "mean", "squares"):  # squares: the sum of the squared deviations from the mean
            self.register_buffer(name, torch.zeros(size, dtype=torch.float64))
        self.register_buffer("center", torch.zeros(size))
        self.register_buffer("scale", torch.ones(size))

    def sums(self, rows: Tensor) -> Tensor:
        """What the ranks add up of rows (R, size): 1, the deviations from the mean, their squares; (3, size)."""
        deviations = rows.double() - self.mean
        return torch.stack([torch.ones_like(deviations), deviations, deviations.square()]).sum(1)

    def merge(self, sums: Tensor) -> None:
        """Take in the rows of all ranks: the parallel variance of Chan et al. 1983, around the mean so far."""
        count, deviations, squares = sums.to(self.mean.device)
        self.count += count
        self.mean += deviations / self.count
        self.squares.add_(squares - deviations.square() / self.count).clamp_(min=0)  # rounding may come out below
        self.center.copy_(self.mean)
        self.scale.copy_((self.squares / self.count + 1e-8).rsqrt())

    def forward(self, obs: Tensor) -> Tensor:
        return ((obs - self.center) * self.scale).clamp(-10, 10)


class Agent(nn.Module):
    """Actor and critic: two networks of hidden layers, or for images two heads of one Nature CNN (Mnih et al. 2015).

    The actor's output parametrises the distribution of A actions: the logits of a categorical each for Discrete,
    MultiDiscrete and MultiBinary, the means of Gaussians with state-independent standard deviations for Box.
    """

    def __init__(self, obs_space: gym.spaces.Box, action_space: gym.Space, args: Args):
        super().__init__()
        self.discrete = not isinstance(action_space, gym.spaces.Box)
        shape = obs_space.shape if len(obs_space.shape) != 2 or min(obs_space.shape) < 36 else (1, *obs_space.shape)
        image = obs_space.dtype == np.uint8 and len(shape) in (3, 4)
        self.obs_shape, self.obs_dtype = (shape, torch.uint8) if image else ((math.prod(shape),), torch.float32)
        activation = nn.Tanh if args.activation_function == "tanh" else nn.ReLU

        def init(layer: nn.Module, gain: float = math.sqrt(2)) -> nn.Module:
            if args.ortho_init:
                nn.init.orthogonal_(layer.weight, gain)
                nn.init.zeros_(layer.bias)
            return layer

        def head(outputs: int, gain: float) -> nn.Sequential:
            hidden = [module for i, o in pairwise(sizes) for module in (init(nn.Linear(i, o)), activation())]
            return nn.Sequential(*hidden, init(nn.Linear(sizes[-1], outputs), gain))

        self.trunk, sizes = nn.Sequential(), (*self.obs_shape, *args.hidden_sizes)
        if image:
            pixels = Images()(torch.zeros(1, *self.obs_shape))
            if min(pixels.shape[-2:]) < 36:
                raise SystemExit(f"error: {obs_space} needs ResizeObservation to 36 x 36, or FlattenObservation")
            cnn = [init(nn.Conv2d(pixels.shape[1], 32, 8, 4)), nn.ReLU(), init(nn.Conv2d(32, 64, 4, 2)), nn.ReLU()]
            cnn += [init(nn.Conv2d(64, 64, 3, 1)), nn.ReLU(), nn.Flatten()]
            features = init(nn.Linear(nn.Sequential(*cnn)(pixels).shape[1], 512))
            self.trunk, sizes = nn.Sequential(Images(), *cnn, features, nn.ReLU()), (512,)
        if self.discrete:
            binary = np.full(action_space.shape or 1, 2 if action_space.shape else action_space.n)  # or Discrete
            choices = torch.as_tensor(getattr(action_space, "nvec", binary)).flatten()
            self.output_shape = (len(choices), int(choices.max()))
            impossible = torch.arange(choices.max()) >= choices.unsqueeze(1)  # where categoricals differ in size
            self.register_buffer("padding", -1e9 * impossible, persistent=False)
        else:
            self.output_shape = (math.prod(action_space.shape),)
            self.log_std = nn.Parameter(torch.full(self.output_shape, args.log_std_init))
        self.actor, self.critic = head(math.prod(self.output_shape), 0.01), head(1, 1.0)
        self.normalizes_obs = args.normalize_obs and not image
        seen = {"raw_obs": self.normalizes_obs * self.obs_shape[0], "discounted_returns": int(args.normalize_rewards)}
        self.normalizers = nn.ModuleDict({name: Normalizer(size) for name, size in seen.items() if size})
        self._ddp_params_and_buffers_to_ignore = [name for name, _ in self.named_buffers()]  # all ranks hold the same

    def sample_noise(self, shape: tuple[int, ...], generator: Generator) -> np.ndarray:
        """What `act` adds, (*shape, *output_shape), for a whole rollout at once: 7% more steps per second."""
        noise = torch.empty(*shape, *self.output_shape)
        if self.discrete:
            noise = self.padding.cpu() - noise.exponential_(generator=generator).log()  # Gumbel
        else:
            noise.normal_(generator=generator).mul_(self.log_std.detach().exp().cpu())
        return noise.numpy()

    def normalize(self, obs: Tensor) -> Tensor:
        """What `forward` takes, for observations (..., *obs_shape) as the environments give them."""
        return self.normalizers["raw_obs"](obs) if self.normalizes_obs else obs

    def acting_network(self) -> Callable[[np.ndarray], np.ndarray]:
        """The actor as a function of observations (N, *obs_shape) as the environments give them, for one rollout.

        On the CPU an actor of nothing but these layers is computed in numpy: its calls take less time than torch's and
        leave more of the caches to the environments. That makes 21% more steps per second than the other branch, 36%
        with --compile.
        """
        device, layers = next(self.parameters()).device, (*self.trunk, *self.actor)
        activations = {nn.Tanh: np.tanh, nn.ReLU: partial(np.maximum, 0.0)}

        def to_numpy(tensor: Tensor) -> np.ndarray:
            return tensor.detach().cpu().numpy()

        def linear(layer: nn.Linear) -> Callable:
            weight, bias = to_numpy(layer.weight).T, 0.0 if layer.bias is None else to_numpy(layer.bias)
            return lambda x: x @ weight + bias

        if device.type == "cpu" and all(type(layer) in (nn.Linear, *activations) for layer in layers):
            functions = [activations.get(type(layer)) or linear(layer) for layer in layers]
        else:
            functions = [lambda x: to_numpy(self.actor(self.trunk(torch.as_tensor(x, device=device))))]
        if self.normalizes_obs:
            normalizer = self.normalizers["raw_obs"]
            center, scale = to_numpy(normalizer.center), to_numpy(normalizer.scale)
            functions = [lambda obs: ((obs - center) * scale).clip(-10, 10), *functions]

        def network(x: np.ndarray) -> np.ndarray:
            for function in functions:
                x = function(x)
            return x

        return network

    def act(self, obs: np.ndarray, noise: np.ndarray | None = None, network: Callable | None = None) -> np.ndarray:
        """Actions (N, A), integers or floats, for observations of `acting_network`, sampled by `noise`; greedy without.

        The largest logit plus Gumbel noise is a sample of the categorical (Maddison et al. 2014, arXiv:1411.0030).
        """
        output = (network or self.acting_network())(obs)
        if self.discrete:
            noise = self.padding.cpu().numpy() if noise is None else noise
            return (output.reshape(-1, *self.output_shape) + noise).argmax(-1)
        return output if noise is None else output + noise

    def forward(self, obs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities of actions (B, A), entropies and values, each (B,), for observations (B, *obs_shape)."""
        features = self.trunk(obs)
        output, values = self.actor(features), self.critic(features).squeeze(-1)
        if self.discrete:
            # by hand: torch's distributions make 8% fewer steps per second
            log_probs = (output.view(-1, *self.output_shape) + self.padding).log_softmax(-1)
            entropy = -(log_probs.exp() * log_probs).sum((1, 2))
            return log_probs.gather(-1, actions.unsqueeze(-1)).sum((1, 2)), entropy, values
        z = (actions - output) * (-self.log_std).exp()
        log_norm = self.log_std + 0.5 * math.log(2 * math.pi)
        return (-0.5 * z.square() - log_norm).sum(-1), (log_norm + 0.5).sum().expand_as(values), values


def to_env(actions: np.ndarray, space: gym.Space) -> np.ndarray:
    """What N environments are stepped with for actions (N, A): Box within its bounds, no NaN; others from `start`."""
    a = actions.reshape(-1, *space.shape)
    if isinstance(space, gym.spaces.Box):
        return np.nan_to_num(a).clip(space.low, space.high).astype(space.dtype, copy=False)
    return (a + getattr(space, "start", 0)).astype(space.dtype, copy=False)


def make_storage(T: int, N: int, agent: Agent, first_obs: np.ndarray) -> Tensors:
    """Buffers for T steps of N environments, on the host; their last row starts a rollout: the first observation."""
    storage = {
        "obs": torch.zeros(T + 1, N, *agent.obs_shape, dtype=agent.obs_dtype),
        "actions": torch.zeros(T + 1, N, agent.output_shape[0], dtype=torch.int64 if agent.discrete else torch.float32),
        "rewards": torch.zeros(T, N),
        "terminated": torch.zeros(T, N, dtype=torch.bool),
        "dones": torch.zeros(T + 1, N, dtype=torch.bool),  # dones[t]: an episode ended just before row t
        "episode": torch.zeros(1, N, 2, dtype=torch.float64),  # the return and the length so far
        "discounted_return": torch.zeros(N),
    }
    storage["obs"][-1] = torch.as_tensor(first_obs).reshape(N, *agent.obs_shape)
    return storage


@torch.inference_mode()
def collect_rollout(
    agent: Agent, model: nn.Module, envs: VectorEnv, storage: Tensors, generator: Generator, args: Args
) -> tuple[Tensors, list[tuple[float, float]]]:
    """Step the environments T times with the actor alone; then pass all rows through the model that is trained.

    Returns the rollout on the model's device and the returns and lengths of the episodes that ended. `rewards`,
    `terminated`, `dones` (one ended at t) and `valid` are (T, N); `obs`, `actions`, `log_probs` and `values` have a row
    more, of which only the value counts. `valid` is False where an environment was reset, not stepped. With NEXT_STEP
    autoreset `obs[t + 1]` is the last of an episode that ended at t: a truncated one bootstraps from `values[t + 1]`.
    """
    obs, dones, device = storage["obs"], storage["dones"], next(agent.parameters()).device
    obs[0], dones[0] = obs[-1], dones[-1]
    noise, network = agent.sample_noise(storage["rewards"].shape, generator), agent.acting_network()
    array = {name: tensor.numpy() for name, tensor in storage.items()}  # numpy writes faster: 10% more steps/s
    over = np.zeros(storage["rewards"].shape, dtype=bool) if args.episodic_life else array["dones"][1:]
    for t, step_noise in enumerate(noise):
        actions = agent.act(array["obs"][t], step_noise, network)
        try:
            next_obs, reward, terminated, truncated, info = envs.step(to_env(actions, envs.single_action_space))
            array["obs"][t + 1] = next_obs.reshape(obs.shape[1:])
        except Exception as error:  # of a simulator of one's own, or a lost process of AsyncVectorEnv
            traceback.print_exc()
            if args.vec_env == "async":  # its destructor would wait for what is lost, and complain after this line
                envs.unwrapped.closed = True
            raise SystemExit(f"error: {args.env_id}: {type(error).__name__}: {error}") from error
        array["dones"][t + 1] = done = terminated | truncated
        array["actions"][t], array["rewards"][t], array["terminated"][t] = actions, reward, terminated
        if args.episodic_life:  # only a whole game is an episode with a return and a length
            over[t] = done & (truncated | (info.get("lives", 0) == 0))
    # returns and lengths by running sums over all rows: 5% faster rollouts than with sums kept at each step
    rows = np.stack([array["rewards"], ~array["dones"][:-1]], axis=-1)
    sums, episodes = np.cumsum(np.concatenate([array["episode"], rows]), axis=0)[1:], []
    for t, n in zip(*np.nonzero(over), strict=True):
        episodes.append(tuple(sums[t, n].tolist()))
        sums[t:, n] -= sums[t, n]  # the next one starts from 0
    array["episode"][:] = sums[-1]
    rollout = {name: storage[name].to(device) for name in ("obs", "actions", "rewards", "terminated")}
    rollout["dones"], rollout["valid"] = dones[1:].to(device), ~dones[:-1].to(device)
    rollout |= {"raw_obs": rollout["obs"], "raw_rewards": rollout["rewards"], "obs": agent.normalize(rollout["obs"])}
    rollout["rewards"] = rollout["rewards"].clamp(-1, 1) if args.clip_rewards else rollout["rewards"]
    if args.normalize_rewards:
        decays, last = args.gamma * rollout["valid"].float(), storage["discounted_return"].to(device)
        rollout["discounted_returns"] = discount(rollout["rewards"], decays, last).unsqueeze(-1)
        storage["discounted_return"].copy_(rollout["discounted_returns"][-1, :, 0])
        rollout["rewards"] = (rollout["rewards"] * agent.normalizers["discounted_returns"].scale).clamp(-10, 10)
    log_probs, _, values = model(rollout["obs"].flatten(0, 1), rollout["actions"].flatten(0, 1))
    rollout["log_probs"], rollout["values"] = log_probs.view(dones.shape), values.view(dones.shape)
    return rollout, episodes


def discount(x: Tensor, decays: Tensor, last: Tensor) -> Tensor:
    """y[t] = x[t] + decays[t] * y[t - 1] for x and decays (T, N), with `last` (N,) as y[-1].

    By a prefix scan (Hillis and Steele 1986), after each turn of which a row holds the sum over twice as many rows: 4%
    faster rollouts than row by row.
    """
    y, decays, span = x.clone(), decays.clone(), 1
    y[0] += decays[0] * last
    while span < len(y):
        y[span:] += decays[span:] * y[:-span]
        decays[span:] = decays[span:] * decays[:-span]
        span *= 2
    return y


def compute_gae(rewards: Tensor, values: Tensor, terminated: Tensor, dones: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16), (T, N).

    `rewards`, `terminated` and `dones` (terminated or truncated at t) are (T, N); `values` is (T + 1, N), its row t + 1
    that of the observation which step t led to. Termination cuts the bootstrap, an episode's end cuts the trace.
    """
    deltas = rewards + gamma * values[1:] * ~terminated - values[:-1]
    decays = gamma * lam * (~dones).to(values.dtype)
    return discount(deltas.flip(0), decays.flip(0), torch.zeros_like(values[0])).flip(0)


def larger(loss: Tensor, clipped: Tensor) -> Tensor:
    """Elementwise maximum of a loss and its clipped form, with the loss's gradient: 5% faster updates than torch.max.

    It is the maximum's gradient as the clipped form is constant outside the clip's range, and equal to the last bit
    inside: a clip of your own has to be so too.
    """
    return torch.where(loss >= clipped, loss, clipped)


def ppo_loss(log_probs: Tensor, entropy: Tensor, values: Tensor, batch: Tensors, args: Args) -> tuple[Tensor, Tensor]:
    """PPO's clipped objective (Schulman et al. 2017, eq. 7 and 9) over a minibatch of B rows.

    Every mean is a sum weighted by the minibatch's `weights`, 0 in a row that is no experience. Returns the loss and,
    detached, (5,) means: policy loss, value loss, entropy loss, approximate KL divergence, clipped fraction.
    """
    advantages, returns, old_values = batch["advantages"], batch["returns"], batch["values"]
    log_ratio = log_probs - batch["log_probs"]
    ratio = log_ratio.exp()
    clipped_ratio = ratio.detach().clamp(1 - args.clip_coef, 1 + args.clip_coef)
    policy_loss = larger(-advantages * ratio, -advantages * clipped_ratio)
    value_loss = (values - returns).square()
    if args.clip_vloss:
        clipped_values = values.detach().clamp(old_values - args.clip_coef, old_values + args.clip_coef)
        value_loss = larger(value_loss, (clipped_values - returns).square())
    value_loss = 0.5 * value_loss
    loss = policy_loss + args.vf_coef * value_loss
    if args.ent_coef:  # no work for nothing: 4% faster updates
        loss = loss - args.ent_coef * entropy
    loss = loss @ batch["weights"]
    with torch.no_grad():
        approx_kl = ratio - 1 - log_ratio  # k3 of http://joschu.net/blog/kl-approx.html
        clipped = (ratio != clipped_ratio).float()
        means = torch.stack([policy_loss, value_loss, -entropy, approx_kl, clipped]) @ batch["weights"]
    return loss, means


def shuffle(
    batch: Tensors, num_minibatches: int, generator: Generator, part: int, num_parts: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffle a batch of R rows, cut it into minibatches of near-equal sizes, yield the given part of each for `take`.

    A part is its rows and their weight: the averages of the parts have as their mean over the parts the average over
    the whole minibatch, whatever the parts' counts of valid rows.
    """
    permutation = torch.randperm(len(batch["valid"]), generator=generator).to(batch["valid"].device)
    counts = [valid.sum() for valid in batch["valid"][permutation].tensor_split(num_minibatches)]
    weights = num_parts / torch.stack(counts).clamp(min=1)
    for rows, weight in zip(permutation.tensor_split(num_minibatches), weights, strict=True):
        yield rows.tensor_split(num_parts)[part], weight


def take(batch: Tensors, rows: Tensor, weight: Tensor) -> Tensors:
    """A minibatch: these rows of a batch, with `weights`, 0 in a row that is no experience."""
    minibatch = {name: tensor[rows] for name, tensor in batch.items()}
    return minibatch | {"weights": minibatch["valid"] * weight}


def flatten_parameters(agent: Agent) -> nn.Parameter:
    """A vector of all parameters, (P,), that they become views of; so do their gradients: 16% more steps per second."""
    # last of all: a later agent.to(device), or a new parameter, is not in the vector, and no optimizer sees it
    flat = nn.Parameter(nn.utils.parameters_to_vector(agent.parameters()).detach(), requires_grad=False)
    flat.grad = torch.zeros_like(flat)
    nn.utils.vector_to_parameters(flat.data, agent.parameters())
    for p, grad in zip(agent.parameters(), flat.grad.split([p.numel() for p in agent.parameters()]), strict=True):
        p.grad = grad.view_as(p)
    return flat


def make_optimizer(flat: nn.Parameter, args: Args) -> Optimizer:
    """The optimizer of the vector of all parameters."""
    adam = partial(torch.optim.Adam, fused=flat.is_cuda or not args.compile)  # 6% faster updates, but compiled ones
    optimizer = (adam if args.optimizer == "adam" else torch.optim.RMSprop)([flat], lr=args.learning_rate, eps=1e-5)
    # the step alone, without the hooks and the profiler's record that torch puts around it: 7% faster updates
    optimizer.step = MethodType(unwrap(type(optimizer).step), optimizer)
    return optimizer


def batch_like(agent: Agent, num_rows: int = 1) -> Tensors:
    """A batch of R rows of nothing, with the names, types and row shapes of what an update takes."""
    storage, number = make_storage(1, 1, agent, np.zeros((1, *agent.obs_shape))), torch.zeros(1)
    like = {"obs": storage["obs"][0], "actions": storage["actions"][0], "log_probs": number, "values": number}
    like |= {"advantages": number, "valid": torch.zeros(1, dtype=torch.bool), "returns": number}
    return {name: tensor.repeat_interleave(num_rows, 0) for name, tensor in like.items()}


def compile_update(
    agent: Agent, flat: nn.Parameter, optimizer: Optimizer, batch: Tensors, minibatches: Callable, args: Args
) -> tuple[Callable, Callable | None]:
    """What `update` computes as two compiled functions, for the sizes of the given batch's minibatches.

    The first takes all parameters as a vector, (P,), and the arguments of `take`; it returns the gradient of
    `ppo_loss`, (P,), and what that does. The second, None on GPUs, clips `flat.grad`, makes the optimizer's step and
    returns the norm; where that is not finite the parameters stay. Sizes, types and coefficients have to stay what they
    were: on CPUs no call checks them.
    """
    shapes = {name: p.shape for name, p in agent.named_parameters()}

    def loss(flat: Tensor, minibatch: Tensors) -> tuple[Tensor, Tensor]:
        parts = flat.split([shape.numel() for shape in shapes.values()])
        parameters = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        outputs = func.functional_call(agent, parameters, (minibatch["obs"], minibatch["actions"]))
        return ppo_loss(*outputs, minibatch, args)

    gradient_of_minibatch = func.grad_and_value(loss, has_aux=True)
    if flat.is_cuda:
        # into a CUDA graph, which nobody has timed yet; it copies what it is given: not the whole batch. Of what could
        # make it compile again, a call checks the tensors' sizes alone: nothing else changes in a run
        options = {"guard_filter_fn": lambda guards: [guard.guard_type == "TENSOR_MATCH" for guard in guards]}
        options |= {"triton.cudagraphs": True, "deterministic": True}
        compiler = partial(torch.compile, dynamic=False, options=options, isolate_recompiles=True)
        gradient_of_minibatch = compiler(gradient_of_minibatch)

    def gradient(flat: Tensor, batch: Tensors, rows: Tensor, weight: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        return gradient_of_minibatch(flat, take(batch, rows, weight))

    def clip_and_step() -> Tensor:
        before, grad_norm = flat.clone(), flat.grad.norm()
        flat.grad.mul_((args.max_grad_norm / (grad_norm + 1e-6)).clamp(max=1))
        optimizer.step()
        flat.copy_(torch.where(grad_norm.isfinite(), flat, before))
        return grad_norm

    def compiled(function: Callable, *inputs: object) -> Callable:
        if not flat.is_cuda:
            # 71% faster updates than with torch.compile alone: 8% as it takes the rows too, 15% as it starts its
            # kernels from C++, 38% as its calls check nothing
            options = {"cpp_wrapper": True, "guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
            compiler = torch.compile(function, dynamic=False, fullgraph=True, options=options)
            function = compiler.aot_compile((inputs, {}))
            function.disable_guard_check()
        return function

    batch, by_size = {name: tensor.to(flat.device) for name, tensor in batch.items()}, {}
    try:
        for rows, weight in {len(rows): (rows, weight) for rows, weight in minibatches(batch)}.values():
            by_size[len(rows)] = compiled(gradient, flat.detach(), batch, rows, weight)
            by_size[len(rows)](flat.detach(), batch, rows, weight)
        # the step too: 21% faster updates; other optimizers may make state in a first step, which it would not see
        whole_step = not flat.is_cuda and isinstance(optimizer, torch.optim.Adam | torch.optim.RMSprop)
        optimizer.param_groups[0]["lr"] = torch.tensor(args.learning_rate)  # a number would be compiled in
        clip_and_step = compiled(clip_and_step) if whole_step else None
    except Exception as error:  # there are many, of many compilers
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise SystemExit(f"error: --compile: {reason}") from error
    return lambda flat, batch, rows, weight: by_size[len(rows)](flat, batch, rows, weight), clip_and_step


def connect_ranks(rank: int, world_size: int, timeout: float, broadcast: Callable) -> list[socket.socket]:
    """Rank 0's connections to the other ranks, in their order; another rank's only one, to rank 0."""
    server = socket.create_server(("", 0)) if rank == 0 else None  # other machines may have another address for it
    port = broadcast(server.getsockname()[1] if server else 0)
    if server:
        server.settimeout(timeout)
        peers = {}
        while len(peers) < world_size - 1:
            peer, _ = server.accept()
            peer.settimeout(timeout)
            peers[int.from_bytes(peer.recv(4, socket.MSG_WAITALL), "big")] = peer
        if sorted(peers) != list(range(1, world_size)):
            raise ConnectionError("somebody else connected to rank 0")
        connections = [peers[other] for other in sorted(peers)]
    else:
        connections = [socket.create_connection((os.environ["MASTER_ADDR"], port), timeout)]
        connections[0].sendall(rank.to_bytes(4, "big"))
    for connection in connections:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        connection.setblocking(False)
    return connections


def transfer(send_or_receive: Callable[[memoryview], int], tensor: Tensor, timeout: float) -> None:
    """Pass a tensor's bytes through a connection. Staying awake for the other rank makes two ranks 10% faster.

    Raises ConnectionError if it has left, TimeoutError after `timeout` seconds.
    """
    view, start_time = memoryview(tensor.numpy()).cast("B"), time.monotonic()
    while view:
        try:
            size = send_or_receive(view)
            if size == 0:
                raise ConnectionError("another rank has left")
            view = view[size:]
        except BlockingIOError:
            waited = time.monotonic() - start_time
            if waited > timeout:
                raise TimeoutError(f"timed out after {timeout} seconds of waiting for another rank") from None
            if waited < 0.1:
                os.sched_yield()
            else:
                time.sleep(0.001)  # it does something else, such as an evaluation


def tcp_all_reduce(tensor: Tensor, rank: int, connections: list[socket.socket], timeout: float) -> Tensor:
    """Make each rank's tensor the sum of all, which rank 0 makes in their order: the same bits on all, in every run."""
    if rank == 0:
        part = torch.empty_like(tensor)
        for connection in connections:
            transfer(connection.recv_into, part, timeout)
            tensor += part
        for connection in connections:
            transfer(connection.send, tensor, timeout)
    else:
        transfer(connections[0].send, tensor, timeout)
        transfer(connections[0].recv_into, tensor, timeout)
    return tensor


def update(
    model: nn.Module, optimizer: Optimizer, batch: Tensors, args: Args, minibatches: Callable,
    compiled: tuple[Callable, Callable | None] | None, all_reduce: Callable, world_size: int, fabric: Fabric,
) -> Tensor:  # fmt: skip
    """Train on a batch of R rows; return the means of `ppo_loss` and the gradient's norm, (6,), over all steps.

    `minibatches` makes an epoch of the batch, the same number on all ranks; `compiled` is of `compile_update`.
    """
    metrics, grad_norms, (flat,) = [], [], optimizer.param_groups[0]["params"]
    gradient, clip_and_step = compiled or (None, None)
    if clip_and_step:
        optimizer.param_groups[0]["lr"] = torch.as_tensor(optimizer.param_groups[0]["lr"])
    for _ in range(args.update_epochs):
        start = len(metrics)
        for rows, weight in minibatches(batch):
            if compiled:
                flat.grad, (_, means) = gradient(flat.detach(), batch, rows, weight)
            else:
                minibatch = take(batch, rows, weight)
                loss, means = ppo_loss(*model(minibatch["obs"], minibatch["actions"]), minibatch, args)
                flat.grad.zero_()
                fabric.backward(loss)
            if world_size > 1 and (compiled or args.tcp_all_reduce):  # else DDP has averaged the gradients
                flat.grad = all_reduce(flat.grad).div_(world_size)
            if clip_and_step:
                grad_norm = clip_and_step()
            else:
                grad_norm = fabric.clip_gradients(
                    model, optimizer, max_norm=args.max_grad_norm, error_if_nonfinite=False
                )
            metrics.append(means)
            grad_norms.append(grad_norm.item())
            if not math.isfinite(grad_norms[-1]):  # that of all ranks: all stop here, with their parameters intact
                break
            if not clip_and_step:
                optimizer.step()
        if not math.isfinite(grad_norms[-1]):
            break
        if args.target_kl is not None:
            # the mean over all ranks, so that none leaves the loop alone
            approx_kl = all_reduce(torch.stack(metrics[start:])[:, 3].mean()) / world_size
            if approx_kl > args.target_kl:
                break
    return torch.cat([torch.stack(metrics).mean(0), means.new_tensor([np.mean(grad_norms)])])


def batch_sums(batch: Tensors, rollout: Tensors, episodes: list[tuple[float, float]]) -> Tensor:
    """What the ranks add up before an update, (10,) float64.

    Of the valid rows: count, sums of the advantages, their squares, the returns and their squares. Of the episodes
    that ended: count, sums of returns and lengths. Of the rollout: counts of non-finite observations and rewards.
    """
    advantages, returns = (batch[name][batch["valid"]].double() for name in ("advantages", "returns"))
    row_sums = [x.sum() for x in (batch["valid"], advantages, advantages.square(), returns, returns.square())]
    episode_sums = torch.tensor([(1.0, *e) for e in episodes], dtype=torch.float64).view(-1, 3).sum(0)
    bad_counts = [(~rollout[name].isfinite()).sum() for name in ("raw_obs", "raw_rewards")]
    return torch.stack([*row_sums, *episode_sums.to(advantages.device), *bad_counts])


def pack(batch: Tensors) -> Tensor:
    """The bytes of a batch of R rows, (bytes,), tensor by tensor: one message, whatever the types."""
    return torch.cat([tensor.contiguous().view(-1).view(torch.uint8) for tensor in batch.values()])


def unpack(packed: Tensor, like: Tensors) -> Tensors:
    """One batch of several messages of `pack`, (messages, bytes), with the names, types and row shapes of `like`."""
    sizes = [tensor[0].numel() * tensor.element_size() for tensor in like.values()]
    columns = packed.split([packed.shape[1] // sum(sizes) * size for size in sizes], dim=1)
    rows = [column.clone(memory_format=torch.contiguous_format) for column in columns]
    return {n: r.view(t.dtype).view(-1, *t.shape[1:]) for (n, t), r in zip(like.items(), rows, strict=True)}


@torch.inference_mode()
def evaluate(agent: Agent, args: Args, seed: int, video_dir: str | None = None, signals: Sequence = ()) -> np.ndarray:
    """Returns (eval_episodes,) of greedy episodes, each the first of an environment of its own.

    All must end, or a signal arrive, after which they are worth nothing.
    """
    args = replace(args, vec_env="sync") if args.vec_env == "async" else args
    envs, obs = make_envs(args, args.eval_episodes, seed, video_dir)
    returns, running = np.zeros(args.eval_episodes), np.ones(args.eval_episodes, dtype=bool)
    network = agent.acting_network()
    while running.any() and not signals:
        obs = torch.as_tensor(obs).reshape(-1, *agent.obs_shape).to(agent.obs_dtype)
        actions = agent.act(obs.numpy(), network=network)
        obs, rewards, terminated, truncated, info = envs.step(to_env(actions, envs.single_action_space))
        returns += np.where(running, rewards, 0.0)
        running &= ~(truncated | (terminated & (not args.episodic_life or info.get("lives", 0) == 0)))
    envs.close()
    if not np.isfinite(returns).all():
        raise SystemExit(f"error: evaluation: {(~np.isfinite(returns)).sum()} returns are not finite")
    return returns


def save_checkpoint(run_dir: str, name: str, agent: Agent, optimizer_state: dict, counters: dict, args: Args) -> None:
    """Write a file that is whole or not there, whatever ends the program meanwhile; remove the oldest ones."""
    state = {"version": CHECKPOINT_VERSION, "agent": agent.state_dict(), "optimizer": optimizer_state}
    torch.save(state | counters | {"args": vars(args)}, buffer := io.BytesIO())
    folder = f"{run_dir}/checkpoints"
    path, incomplete = f"{folder}/{name}.pt", f"{folder}/incomplete"
    try:
        os.makedirs(folder, exist_ok=True)
        with open(incomplete, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(incomplete, path)
    except OSError as error:
        if os.path.exists(incomplete):
            os.remove(incomplete)
        raise SystemExit(f"error: cannot write {path}: {error.strerror}; earlier checkpoints are whole") from error
    for old in list_checkpoints(run_dir)[: -args.keep_checkpoints]:
        os.remove(old)


def load_checkpoint(path: str) -> dict:
    """Read what `save_checkpoint` wrote, without running code of it; end the program where it is anything else."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        version = state["version"]
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise SystemExit(f"error: cannot read {path}: {error.strerror}") from error
    except Exception as error:  # torch has many for a file that is none of its own
        raise SystemExit(f"error: {path} is damaged, or not of these files ({type(error).__name__})") from error
    if version != CHECKPOINT_VERSION:
        raise SystemExit(f"error: {path} is of version {version}, this file reads version {CHECKPOINT_VERSION}")
    return state


def list_checkpoints(run_dir: str) -> list[str]:
    """The checkpoints of a run, the newest last."""
    return sorted(glob(f"{escape(run_dir)}/checkpoints/step-*.pt"))


def truncate_logs(run_dir: str, global_step: int) -> None:
    """Take what a lost run has logged after its checkpoint out of its logs, so that no step is there twice."""
    for path in glob(f"{escape(run_dir)}/events.*"):
        end = 0
        for event in RawEventFileLoader(path).Load():
            if Event.FromString(event).step > global_step:
                break
            end += len(event) + 16  # length and checksums
        os.truncate(path, end)


def open_run(args: Args, logs: str, ranks: dict[str, int]) -> tuple[str, dict | None]:
    """The folder of a run below `logs`, and the checkpoint that it goes on from, if `resume` finds one.

    It goes on in the folder of its checkpoint if that is the newest there; from an older one it branches into a new
    folder. `ranks` are the counts of those that step environments and of all.
    """
    name = f"{logs}/{args.env_id.replace('/', '-')}_{args.exp_name}_{args.seed}"
    # to the microsecond: several runs may start at once
    run_dir, path = f"{name}_{datetime.now():%Y-%m-%d_%H-%M-%S-%f}", args.resume
    if path == "auto":
        run_dir = max(glob(f"{escape(name)}_????-??-??_??-??-??*"), default=run_dir)
        path = (list_checkpoints(run_dir) or [""])[-1]
    if not path:
        return run_dir, None
    state = load_checkpoint(path)
    folder = os.path.dirname(os.path.dirname(os.path.abspath(path)))
    if os.path.abspath(path) in list_checkpoints(folder)[-1:]:
        run_dir = os.path.relpath(folder)
    now, then = vars(args) | ranks, state["args"] | state["ranks"]
    changes = {k: f"{k} {v} -> {now[k]}" for k, v in then.items() if k != "resume" and now.get(k, v) != v}
    for name in changes.keys() & {"env_id", "optimizer"}:
        raise SystemExit(f"error: --resume {path} is of another run: {changes[name]}")
    changed = ", changed: " + ", ".join(changes.values()) if changes else ""
    print(f"resuming {path} at step {state['global_step']}{changed}", flush=True)
    return run_dir, state


def restore(state: dict, agent: Agent, optimizer: Optimizer | None = None) -> None:
    """Load a checkpoint's parameters and normalisers, and the optimizer's state."""
    try:
        agent.load_state_dict(state["agent"])
    except RuntimeError as error:
        raise SystemExit(f"error: the checkpoint is of another agent: {' '.join(str(error).split())}") from error
    if optimizer:  # with the options of this run
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state["optimizer"]["state"]})


def evaluate_checkpoint(args: Args) -> None:
    """Play a saved agent on the CPU, with the arguments that it was trained with where the command line gives none."""
    state = load_checkpoint(args.evaluate)
    trained = {k: v for k, v in state["args"].items() if k in vars(args) and k not in ("capture_video", "resume")}
    args = tyro.cli(Args, default=Args(**trained))
    if args.eval_episodes == 0:
        raise SystemExit("error: --evaluate needs --eval-episodes")
    envs, _ = make_envs(args, 1, args.seed)
    agent = Agent(envs.single_observation_space, envs.single_action_space, args)
    envs.close()
    restore(state, agent)
    torch.set_num_threads(args.num_threads)
    video_dir = f"{os.path.splitext(args.evaluate)[0]}-videos" if args.capture_video else None
    returns = evaluate(agent, args, args.seed + state["ranks"]["num_actors"] * args.num_envs, video_dir)
    print(f"step {state['global_step']}: greedy return {returns.mean():.2f} +- {returns.std():.2f}")
    if video_dir:
        print(f"videos: {video_dir}")


def catch_signals() -> list[tuple[int, float]]:
    """The SIGINT and SIGTERM received from now on, with their times: the run is to stop after the iteration.

    A later one ends the process at once, unless it comes within a second of the first: a scheduler and a launcher may
    both pass one on. AsyncVectorEnv's processes, which ignore both, are killed when this one exits.
    """
    received = []
    atexit.register(lambda: [process.kill() for process in multiprocessing.active_children()])

    def handle(number: int, _) -> None:
        if received and time.monotonic() > received[0][1] + 1:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        received.append((number, time.monotonic()))

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)
    return received


def main(args: Args) -> None:
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if args.evaluate:
        return evaluate_checkpoint(args) if rank == 0 else None
    ranks = {"num_actors": world_size, "world_size": world_size}
    run_dir, state = open_run(args, "logs/fabric_logs", ranks) if rank == 0 else ("", None)
    # distributed set-up: fabric run sets the number of processes and their device, plain python does not
    choice = {} if "LT_CLI_USED" in os.environ else {"accelerator": "cpu", "devices": 1}
    try:
        fabric = Fabric(**choice, loggers=TensorBoardLogger(*os.path.split(run_dir), version=""))
    except (ImportError, RuntimeError, ValueError) as error:
        raise SystemExit(f"error: Fabric cannot start: {error}") from error
    if not isinstance(fabric.strategy, DDPStrategy | SingleDeviceStrategy):
        raise SystemExit(f"error: {type(fabric.strategy).__name__} cannot run this file: use --strategy=ddp")
    if fabric.world_size != world_size:
        raise SystemExit("error: start several processes of this file with `fabric run --devices=N`, not with torchrun")
    precision, mixed = os.environ.get("LT_PRECISION", "32-true"), () if args.compile else ("bf16-mixed", "bf16")
    if precision not in ("32-true", "32", *mixed):
        raise SystemExit("error: --precision must be 32-true, or bf16-mixed without --compile: agents act in 32 bits")
    if fabric.world_size > 1:
        _set_pg_timeout(timedelta(seconds=args.dist_timeout))
    device, state = fabric.device, fabric.broadcast(state)
    all_reduce = partial(fabric.all_reduce, reduce_op="sum")
    torch.set_num_threads(args.num_threads)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    rollout_size = world_size * args.num_envs * args.num_steps
    num_iterations = args.total_timesteps // rollout_size
    if num_iterations == 0:
        raise SystemExit(f"error: --total-timesteps {args.total_timesteps} is less than one rollout of {rollout_size}")
    if args.per_rank_batch_size * world_size > rollout_size:
        raise SystemExit(f"error: --per-rank-batch-size {args.per_rank_batch_size} is more than a rank's rollout")
    if args.tcp_all_reduce and device.type != "cpu":
        raise SystemExit("error: --tcp-all-reduce is for CPUs: leave it away on GPUs, where NCCL is fast")
    if args.tcp_all_reduce and world_size > 1:
        connections = connect_ranks(rank, world_size, args.dist_timeout, fabric.broadcast)
        all_reduce = partial(tcp_all_reduce, rank=rank, connections=connections, timeout=args.dist_timeout)
    # counters of the run; rows are those of resets too, which global_step leaves out
    names = ("rows", "global_step", "best_return")
    rows, global_step, best_return = (state[name] for name in names) if state else (0, 0, -math.inf)
    first_iteration = math.ceil(rows / rollout_size) + 1
    num_minibatches = max(1, round(rollout_size / (args.per_rank_batch_size * world_size)))
    part, num_parts = (rank, world_size) if args.share_data else (0, 1)
    # environments and agent: seeds of their own for all environments, also of a resumed run; parameters of one seed
    video_dir = f"{run_dir}/videos/train-from-step-{global_step}" if args.capture_video and rank == 0 else None
    envs, first_obs = make_envs(args, args.num_envs, args.seed + rows + rank * args.num_envs, video_dir)
    signals, action_generator, shuffle_generator = catch_signals(), Generator(), Generator()
    torch.manual_seed(args.seed)
    agent = Agent(envs.single_observation_space, envs.single_action_space, args)
    flat = flatten_parameters(agent.to(device))
    optimizer = make_optimizer(flat, args)
    if state:
        restore(state, agent, optimizer)
    minibatches = partial(
        shuffle, num_minibatches=num_minibatches, generator=shuffle_generator, part=part, num_parts=num_parts
    )
    compiled, start_time = None, time.perf_counter()
    if args.compile:
        num_rows = rollout_size if args.share_data else rollout_size // world_size
        compiled = compile_update(agent, flat, optimizer, batch_like(agent, num_rows), minibatches, args)
        if rank == 0:
            print(f"compiled in {time.perf_counter() - start_time:.1f} seconds", flush=True)
    model, optimizer = fabric.setup(agent, optimizer)
    storage = make_storage(args.num_steps, args.num_envs, agent, first_obs)
    # logs
    if rank == 0:
        truncate_logs(run_dir, global_step)
        writer = fabric.logger.experiment
        flags = "flag|value\n-|-\n" + "".join(f"{k}|{v}\n" for k, v in vars(args).items())
        writer.add_text("hyperparameters", flags, global_step)
        total = num_iterations * rollout_size
        progress = tqdm(initial=rows, total=total, unit="step", disable=not sys.stderr.isatty())
        if first_iteration > num_iterations:
            print(f"nothing left to train: raise --total-timesteps {args.total_timesteps} for more")
    mean_return, test_return, stopping, differed = math.nan, math.nan, False, False

    for iteration in range(first_iteration, num_iterations + 1):
        learning_rate = args.learning_rate * (1 - args.anneal_lr * (iteration - 1) / num_iterations)
        optimizer.param_groups[0]["lr"] = learning_rate
        # seeds: streams of their own for each iteration and each rank's actions and shuffling
        stream_seeds = np.random.SeedSequence((args.seed, rows)).generate_state(2 * world_size).tolist()
        action_generator.manual_seed(stream_seeds[2 * rank])
        shuffle_generator.manual_seed(stream_seeds[1 if args.share_data else 2 * rank + 1])
        # rollout
        start_time = time.perf_counter()
        rollout, episodes = collect_rollout(agent, model, envs, storage, action_generator, args)
        names = ("rewards", "values", "terminated", "dones")
        rollout["advantages"] = compute_gae(*(rollout[name] for name in names), args.gamma, args.gae_lambda)
        names = ("obs", "actions", "log_probs", "values", "advantages", "valid")
        batch = {name: rollout[name][: args.num_steps].flatten(0, 1) for name in names}
        batch["returns"] = batch["advantages"] + batch["values"]
        rollout_time = time.perf_counter()
        # communication: statistics over all ranks, and with share_data the rows themselves
        sums = [batch_sums(batch, rollout, episodes)]
        sums += [x.sums(rollout[name][: args.num_steps][rollout["valid"]]) for name, x in agent.normalizers.items()]
        sums = [all_reduce(tensor) for tensor in sums]
        count, adv_sum, adv_sq, ret_sum, ret_sq, num_episodes, sum_return, sum_length, *bad = sums[0].tolist()
        if any(bad):
            raise SystemExit(f"error: iteration {iteration}: not finite: {bad[0]:g} observations, {bad[1]:g} rewards")
        for normalizer, tensor in zip(agent.normalizers.values(), sums[1:], strict=True):
            normalizer.merge(tensor)
        adv_var, ret_var = adv_sq / count - (adv_sum / count) ** 2, ret_sq / count - (ret_sum / count) ** 2
        if args.normalize_advantages:
            batch["advantages"] = (batch["advantages"] - adv_sum / count) / (math.sqrt(max(adv_var, 0.0)) + 1e-8)
        if args.share_data and world_size > 1:
            batch = unpack(fabric.all_gather(pack(batch)), batch)
        comm_time = time.perf_counter()
        # update
        names = ("policy_loss", "value_loss", "entropy_loss", "approx_kl", "clip_fraction", "grad_norm")
        with fabric.no_backward_sync(model, enabled=args.tcp_all_reduce):
            means = update(model, optimizer, batch, args, minibatches, compiled, all_reduce, world_size, fabric)
        # all ranks' parameters are the same if the square of a checksum's mean is the mean of its squares, which stay
        # exact below this prime
        checksum = (flat.detach().view(torch.int32).sum() % 1048573).double()
        stop = checksum.new_tensor(len(signals))  # now, so that one that came during the update counts
        means = all_reduce(torch.cat([means.double(), torch.stack([checksum, checksum**2, stop])]))
        *means, checksum, square, stop = (means / world_size).tolist()
        losses = dict(zip(names, means, strict=True))
        bad = [name for name, value in losses.items() if not math.isfinite(value)]
        if bad or not flat.isfinite().all():
            raise SystemExit(f"error: iteration {iteration}: not finite: {', '.join(bad) or 'the parameters'}")
        if checksum**2 != square:  # the ranks' arithmetic was not: unequal processors, or worse
            for tensor in [flat.data, *(x for x in optimizer.state[flat].values() if x.dim())]:
                tensor.copy_(fabric.broadcast(tensor.cpu()))
            if rank == 0 and not differed:
                progress.write(f"iteration {iteration}: the ranks' parameters differ; whenever they do, rank 0's count")
            differed = True
        losses["explained_variance"] = 1 - adv_var / ret_var if ret_var else math.nan  # advantages = returns - values
        update_time = time.perf_counter()
        rows, global_step = rows + rollout_size, global_step + int(count)
        stopping = stop > 0 and iteration < num_iterations
        # logs
        if rank == 0:
            metrics = {f"Loss/{name}": value for name, value in losses.items()}
            metrics |= {"Info/entropy": -losses["entropy_loss"], "Info/learning_rate": learning_rate}
            metrics |= {"Time/rollout": rollout_time - start_time, "Time/communication": comm_time - rollout_time}
            metrics |= {"Time/update": update_time - comm_time}
            metrics |= {"Time/step_per_second": count / (update_time - start_time)}
            if num_episodes:
                mean_return = sum_return / num_episodes
                metrics |= {"Rewards/rew_avg": mean_return, "Game/ep_len_avg": sum_length / num_episodes}
            status = f"return {mean_return:.2f}, {metrics['Time/step_per_second']:.0f} steps/s"
            progress.set_postfix_str(status, refresh=False)
            progress.update(rollout_size)
            if progress.disable and iteration % max(1, num_iterations // 20) == 0:
                print(f"step {global_step} of {total}: {status}", flush=True)
            evaluation_due = iteration == num_iterations or (args.eval_every and iteration % args.eval_every == 0)
            checkpoints = []
            if args.eval_episodes and evaluation_due and not stopping:
                video_dir = f"{run_dir}/videos/test-step-{global_step}" if args.capture_video else None
                returns = evaluate(agent, args, args.seed + world_size * args.num_envs, video_dir, signals)
                if not signals:
                    metrics["Test/cumulative_reward"] = test_return = float(returns.mean())
                    progress.write(f"step {global_step}: greedy return {test_return:.2f} +- {returns.std():.2f}")
                    if args.eval_every and test_return > best_return:
                        best_return, checkpoints = test_return, ["best"]
            fabric.log_dict(metrics, global_step)
            if iteration == num_iterations:
                hparams = {k: v if isinstance(v, int | float | str) else str(v) for k, v in vars(args).items()}
                writer.add_hparams(hparams, {"hp_metric": test_return}, run_name=".", global_step=global_step)
            # checkpoints, after what is logged up to here
            checkpoint_due = args.checkpoint_every and iteration % args.checkpoint_every == 0
            if checkpoint_due or stopping or iteration == num_iterations:
                checkpoints.append(f"step-{global_step:012d}")
            start_time = time.perf_counter()
            for name in checkpoints:
                writer.flush()
                counters = {"rows": rows, "global_step": global_step, "best_return": best_return, "ranks": ranks}
                save_checkpoint(run_dir, name, agent, optimizer.state_dict(), counters, args)
            if checkpoints:
                writer.add_scalar("Time/checkpoint", time.perf_counter() - start_time, global_step)
        if stopping:
            break

    envs.close()
    if rank == 0:
        progress.close()
        writer.close()
        if stopping:
            print(f"stopped by a signal: go on with --resume {run_dir}/checkpoints/{name}.pt")
        print(f"logs, checkpoints and videos: {run_dir}")
    if world_size > 1:
        fabric.barrier()  # launchers end the others if one leaves, and rank 0 has been writing
        time.sleep(0.1)  # gloo's threads need the interpreter to let go of the last tensor (PyTorch issue 190489)
    if stopping:
        raise SystemExit(128 + (signals[0][0] if signals else signal.SIGTERM))


def report(error: str) -> None:
    """Have the report that torchrun and `fabric run` end their output with end with this error."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        message = {"message": error, "extraInfo": {"timestamp": int(time.time())}}
        with suppress(OSError), open(os.environ["TORCHELASTIC_ERROR_FILE"], "w") as file:
            json.dump({"message": message}, file)


def run() -> None:
    """`main` with the command line's flags; the error that ends it is the last line, also of a launcher's report."""
    try:
        main(tyro.cli(Args))
    except SystemExit as end:
        if end.code == 2:  # tyro's, which has explained it
            flags = " ".join(" ".join(sys.argv[1:]).split())
            print(error := f"error: wrong flags, as explained above: {flags}", file=sys.stderr)
            report(error)
        elif isinstance(end.code, str):
            end.code = " ".join(end.code.split())
            report(end.code)
        raise
    except Exception as error:
        traceback.print_exc()
        if "RANK" in os.environ:
            time.sleep(1)  # if another rank is lost, that one is to be the first that the launcher sees leave
        report(line := f"error: {type(error).__name__}: {' '.join(str(error).split())}")
        raise SystemExit(line) from None


if __name__ == "__main__":
    run()
