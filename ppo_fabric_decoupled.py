"""Proximal Policy Optimization on many processes, in one file: players step the environments, trainers train.

The first ranks are players: each steps its own environments with its copy of the agent and sends its rollouts to the
trainers, all other ranks, which train under DDP and send the parameters back. With --overlap the players collect the
next rollout while the trainers work on the last one. Copy this file and hack it: it needs nothing from its neighbours.

In Lightning Fabric's collectives, with one player and two trainers, two and two, on GPUs, the player on a GPU as well:
    fabric run --devices=3 ppo_fabric_decoupled.py --num-envs 4
    fabric run --devices=4 ppo_fabric_decoupled.py --num-envs 4 --num-players 2 --overlap
    fabric run --devices=3 ppo_fabric_decoupled.py --num-envs 4 --cuda
    fabric run --devices=3 ppo_fabric_decoupled.py --num-envs 4 --cuda --player-on-gpu
On two machines, of four processes each and one player in all (--node-rank=1 on the second):
    fabric run --devices=4 --num-nodes=2 --node-rank=0 --main-address=HOST ppo_fabric_decoupled.py --cuda
Add --accelerator=cpu to `fabric run` on a machine with some GPUs, but fewer than --devices: the launcher counts them.

PPO: Schulman et al. 2017, arXiv:1707.06347. GAE: Schulman et al. 2016, arXiv:1506.02438.
"""

import atexit
import io
import json
import math
import multiprocessing
import os
import signal
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
from lightning.fabric.plugins.collectives import TorchCollective
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Generator, Tensor, func, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter
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
    compile: bool = False  # compile updates with torch.compile (CUDA: the gradient of the loss, into a CUDA graph)
    num_threads: int = 1  # torch's CPU threads per rank, in updates: networks of this size run slower on more
    num_players: int = 1  # ranks that step environments: the first ones; all others train
    overlap: bool = False  # collect the next rollout while the trainers work on the last, by a policy an update older
    player_on_gpu: bool = False  # with cuda, let the players act on a GPU each too
    dist_timeout: int = 1800  # seconds that a rank waits for the others, for example while rank 0 evaluates
    cuda: bool = False  # train on one GPU per training rank (NCCL); the environments stay on the CPU

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


def update(
    model: nn.Module, optimizer: Optimizer, batch: Tensors, args: Args, minibatches: Callable,
    compiled: tuple[Callable, Callable | None] | None, group: TorchCollective,
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
                if group.world_size > 1:
                    group.all_reduce(flat.grad)
                    flat.grad /= group.world_size
            else:
                minibatch = take(batch, rows, weight)
                loss, means = ppo_loss(*model(minibatch["obs"], minibatch["actions"]), minibatch, args)
                flat.grad.zero_()
                loss.backward()
            if clip_and_step:
                grad_norm = clip_and_step()
            else:
                grad_norm = flat.grad.norm()
                flat.grad *= (args.max_grad_norm / (grad_norm + 1e-6)).clamp(max=1)  # as clip_grad_norm_, 4% faster
            metrics.append(means)
            grad_norms.append(grad_norm.item())
            if not math.isfinite(grad_norms[-1]):  # that of all ranks: all stop here, with their parameters intact
                break
            if not clip_and_step:
                optimizer.step()
        if not math.isfinite(grad_norms[-1]):
            break
        if args.target_kl is not None:
            approx_kl = torch.stack(metrics[start:])[:, 3].mean()
            if group.world_size > 1:
                group.all_reduce(approx_kl)  # all decide on the same number, so that none leaves the loop alone
            if approx_kl / group.world_size > args.target_kl:
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


def meet_trainers(trainers: range, signals: list, group: TorchCollective, bad: Sequence[float] = (0, 0)) -> None:
    """Wait until each trainer is there, which tells waiting from talking; then tell them a player's counts.

    These are of non-finite observations and rewards, and of signals, which Python does not look at while it waits.
    """
    for trainer in trainers:
        group.recv(torch.empty(1), trainer)
    counts = torch.tensor([*bad, len(signals)], dtype=torch.float64)
    for trainer in trainers:
        group.send(counts, trainer)


def meet_player(player: int, group: TorchCollective) -> list[float]:
    """A trainer's side of `meet_trainers`: wait for the player; return its counts, (3,)."""
    group.send(torch.zeros(1), player)
    return group.recv(torch.empty(3, dtype=torch.float64), player).tolist()


def stop_if_bad(bad: list[float], iteration: int) -> None:
    """End this rank, as all others do, if the environments gave something that is not finite."""
    if any(bad):
        raise SystemExit(f"error: iteration {iteration}: not finite: {bad[0]:.0f} observations, {bad[1]:.0f} rewards")


def stop_if_diverged(flat: Tensor, means: Tensor, iteration: int) -> None:
    """End this rank, as all others do, if an update's means or the parameters are not finite."""
    names = ("policy_loss", "value_loss", "entropy_loss", "approx_kl", "clip_fraction", "grad_norm")
    bad = [name for name, finite in zip(names, means.isfinite().tolist(), strict=True) if not finite]
    if bad or not flat.isfinite().all():
        raise SystemExit(f"error: iteration {iteration}: not finite: {', '.join(bad) or 'the parameters'}")


def split_rollout(batch: Tensors, args: Args, num_trainers: int) -> list[Tensor]:
    """What each trainer gets of a player's rows, `pack`ed, on the host: all rows with `share_data`, else equal parts.

    What parts lack in rows is made up by copies of the first ones, which are not `valid` and so count nowhere.
    """
    if args.share_data:
        return [pack(batch).cpu()]
    num_rows = len(batch["valid"])
    index = torch.arange(num_rows + -num_rows % num_trainers, device=batch["valid"].device) % num_rows
    batch = {name: tensor[index] for name, tensor in batch.items()}
    batch["valid"][num_rows:] = False
    return [pack({name: tensor[i::num_trainers] for name, tensor in batch.items()}).cpu() for i in range(num_trainers)]


def send_rollout(parts: list[Tensor], args: Args, rank: int, group: TorchCollective) -> None:
    """Send a player's parts to the trainers, whose group it leads."""
    if args.share_data:
        group.broadcast(parts[0], rank)
    else:
        group.scatter(torch.empty_like(parts[0]), [torch.empty_like(parts[0]), *parts], rank)


def receive_rollout(row_bytes: int, args: Args, player: int, num_trainers: int, group: TorchCollective) -> Tensor:
    """Receive what `send_rollout` sends to a trainer: rows of so many bytes, `pack`ed."""
    num_rows = args.num_envs * args.num_steps
    packed = torch.empty((num_rows if args.share_data else -(-num_rows // num_trainers)) * row_bytes, dtype=torch.uint8)
    return group.broadcast(packed, player) if args.share_data else group.scatter(packed, [], player)


@torch.no_grad()
def recenter(agent: Agent, batch: Tensors) -> None:
    """Clip around the policy that is updated, not around the older one that acted; weight the rows by their ratio.

    The decoupled clipped objective of Hilton et al. 2021, arXiv:2110.00641. Clipping around the older policy lets an
    update move only as far as the one before has left room: on LunarLander-v3 the mean return of training was halved.
    """
    log_probs, _, _ = agent(batch["obs"], batch["actions"])
    batch["advantages"] = batch["advantages"] * (log_probs - batch["log_probs"]).exp()
    batch["log_probs"] = log_probs


def checkpoint_due(args: Args, iteration: int, last: int) -> bool:
    """Whether a checkpoint may be written after an iteration, for which player 0 needs the optimizer's state."""
    return iteration == last or any(n and iteration % n == 0 for n in (args.checkpoint_every, args.eval_every))


def send_optimizer(optimizer: Optimizer, first_trainer: int, group: TorchCollective) -> None:
    """Send the players the optimizer's state, for a checkpoint."""
    state = optimizer.state_dict()
    state["state"] = {i: {k: v.cpu() for k, v in tensors.items()} for i, tensors in state["state"].items()}
    group.broadcast_object_list([state], first_trainer)


def play(
    args: Args, agent: Agent, envs: VectorEnv, first_obs: np.ndarray, signals: list, state: dict | None, run_dir: str,
    num_iterations: int, players: TorchCollective, rollout_group: TorchCollective, parameter_group: TorchCollective,
) -> bool:  # fmt: skip
    """A player's run: collect a rollout, send it to the trainers, receive parameters; player 0 logs and evaluates.

    What the trainers have to say of an iteration comes with the parameters that it ended with, which is one iteration
    later with `overlap`. So there is one more turn then, without a rollout; and a signal ends the run without an update
    on the rollout that has just been sent. Returns whether one did.
    """
    rank, lag, first_trainer = players.rank, int(args.overlap), args.num_players
    num_trainers = rollout_group.world_size - 1
    trainers = range(first_trainer, first_trainer + num_trainers)
    storage, generator = make_storage(args.num_steps, args.num_envs, agent, first_obs), Generator()
    flat = flatten_parameters(agent).data
    # parameters, means of the update, times of the first trainer, whether to stop
    message = torch.empty(len(flat) + 6 + 3 + 1)
    parameters, means, times, stop = message.split([len(flat), 6, 3, 1])
    rollout_size = args.num_players * args.num_envs * args.num_steps
    # counters of the run; rows are those of resets too, which global_step leaves out
    names = ("rows", "global_step", "best_return")
    rows, global_step, best_return = (state[name] for name in names) if state else (0, 0, -math.inf)
    first, last, played_rows = math.ceil(rows / rollout_size) + 1, num_iterations, rows

    # logs
    if rank == 0:
        truncate_logs(run_dir, global_step)
        writer = SummaryWriter(run_dir)
        flags = "flag|value\n-|-\n" + "".join(f"{k}|{v}\n" for k, v in vars(args).items())
        writer.add_text("hyperparameters", flags, global_step)
        total = num_iterations * rollout_size
        progress = tqdm(initial=rows, total=total, unit="step", disable=not sys.stderr.isatty())
        if first > num_iterations:
            print(f"nothing left to train: raise --total-timesteps {args.total_timesteps} for more")
    mean_return, test_return, pending = math.nan, math.nan, []

    for turn in range(first, num_iterations + lag + 1 if first <= num_iterations else first):
        start_time = time.perf_counter()
        metrics, wait_seconds, communication_seconds = {}, 0.0, 0.0
        if turn <= num_iterations:
            # rollout, with a stream of random numbers of its own
            generator.manual_seed(
                int(np.random.SeedSequence((args.seed, played_rows)).generate_state(2 * rank + 1)[-1])
            )
            rollout, episodes = collect_rollout(agent, agent, envs, storage, generator, args)
            names = ("rewards", "values", "terminated", "dones")
            rollout["advantages"] = compute_gae(*(rollout[name] for name in names), args.gamma, args.gae_lambda)
            names = ("obs", "actions", "log_probs", "values", "advantages", "valid")
            batch = {name: rollout[name][: args.num_steps].flatten(0, 1) for name in names}
            batch["returns"] = batch["advantages"] + batch["values"]
            played_rows += rollout_size

            # statistics over all players
            sums = [batch_sums(batch, rollout, episodes).cpu()]
            valid_rows = {name: rollout[name][: args.num_steps][rollout["valid"]] for name in agent.normalizers}
            sums += [normalizer.sums(valid_rows[name]).cpu() for name, normalizer in agent.normalizers.items()]
            if args.num_players > 1:
                time_before = time.perf_counter()
                players.barrier()  # tells waiting from talking
                time_ready = time.perf_counter()
                for tensor in sums:
                    players.all_reduce(tensor)
                wait_seconds, communication_seconds = time_ready - time_before, time.perf_counter() - time_ready
            count, adv_sum, adv_sq, ret_sum, ret_sq, num_episodes, sum_return, sum_length, *bad = sums[0].tolist()
            if not any(bad):
                for normalizer, tensor in zip(agent.normalizers.values(), sums[1:], strict=True):
                    normalizer.merge(tensor)
            adv_var, ret_var = adv_sq / count - (adv_sum / count) ** 2, ret_sq / count - (ret_sum / count) ** 2
            if args.normalize_advantages:
                batch["advantages"] = (batch["advantages"] - adv_sum / count) / (math.sqrt(max(adv_var, 0.0)) + 1e-8)
            parts = split_rollout(batch, args, num_trainers)  # before they meet: 3% more steps per second
            metrics = {
                # the advantages are the returns less the values
                "Loss/explained_variance": 1 - adv_var / ret_var if ret_var else math.nan,
                "Info/policy_lag": min(turn - first, lag),
                "Time/rollout": time.perf_counter() - start_time - wait_seconds - communication_seconds,
            }
            if num_episodes:
                metrics |= {"Rewards/rew_avg": sum_return / num_episodes, "Game/ep_len_avg": sum_length / num_episodes}

            # the trainers get the rollout
            time_before = time.perf_counter()
            meet_trainers(trainers, signals, rollout_group, bad)
            stop_if_bad(bad, turn)
            time_ready = time.perf_counter()
            send_rollout(parts, args, rank, rollout_group)
            wait_seconds += time_ready - time_before
            communication_seconds += time.perf_counter() - time_ready

        # parameters: of the update on this rollout, or with overlap on the last one
        iteration, optimizer_states = turn - lag, [None]
        time_before = time.perf_counter()
        if not args.overlap:
            meet_trainers(trainers, signals, rollout_group)
        parameter_group.broadcast(message, first_trainer)
        stop_if_diverged(parameters, means, iteration)
        last = iteration if stop and iteration >= first else num_iterations
        if checkpoint_due(args, iteration, last):
            parameter_group.broadcast_object_list(optimizer_states, first_trainer)
        flat.copy_(parameters)
        end_time = time.perf_counter()
        metrics["Time/player_wait"] = wait_seconds + end_time - time_before
        metrics["Time/communication"] = communication_seconds
        if turn <= num_iterations:
            metrics["Time/step_per_second"] = count / (end_time - start_time)
            pending = [*pending[-1:], (int(count), metrics)]
        if iteration < first:
            continue

        # logs: of the iteration that the received means belong to
        count, metrics = pending.pop(0)
        rows, global_step = rows + rollout_size, global_step + count
        if rank == 0:
            names = ("policy_loss", "value_loss", "entropy_loss", "approx_kl", "clip_fraction", "grad_norm")
            metrics |= dict(zip((f"Loss/{name}" for name in names), means.tolist(), strict=True))
            names = ("Time/trainer_wait", "Time/trainer_communication", "Time/update")
            metrics |= dict(zip(names, times.tolist(), strict=True))
            decay = 1 - args.anneal_lr * (iteration - 1) / num_iterations
            metrics |= {"Info/entropy": -metrics["Loss/entropy_loss"], "Info/learning_rate": args.learning_rate * decay}
            mean_return = metrics.get("Rewards/rew_avg", mean_return)
            status = f"return {mean_return:.2f}, {metrics['Time/step_per_second']:.0f} steps/s"
            progress.set_postfix_str(status, refresh=False)
            progress.update(rollout_size)
            if progress.disable and iteration % max(1, num_iterations // 20) == 0:
                print(f"step {global_step} of {total}: {status}", flush=True)
            evaluation_due = iteration == num_iterations or (args.eval_every and iteration % args.eval_every == 0)
            checkpoints = []
            if args.eval_episodes and evaluation_due and (iteration < last or last == num_iterations):
                video_dir = f"{run_dir}/videos/test-step-{global_step}" if args.capture_video else None
                returns = evaluate(agent, args, args.seed + args.num_players * args.num_envs, video_dir, signals)
                if not signals:
                    metrics["Test/cumulative_reward"] = test_return = float(returns.mean())
                    progress.write(f"step {global_step}: greedy return {test_return:.2f} +- {returns.std():.2f}")
                    if args.eval_every and test_return > best_return:
                        best_return, checkpoints = test_return, ["best"]
            values = [Summary.Value(tag=tag, simple_value=value) for tag, value in metrics.items()]
            writer.file_writer.add_summary(Summary(value=values), global_step)  # of one event: 3% faster
            if iteration == num_iterations:
                hparams = {k: v if isinstance(v, int | float | str) else str(v) for k, v in vars(args).items()}
                writer.add_hparams(hparams, {"hp_metric": test_return}, run_name=".", global_step=global_step)
            # checkpoints, after what is logged up to here
            if iteration == last or (args.checkpoint_every and iteration % args.checkpoint_every == 0):
                checkpoints.append(f"step-{global_step:012d}")
            start_time = time.perf_counter()
            for name in checkpoints:
                writer.flush()
                ranks = {"num_actors": args.num_players, "world_size": args.num_players + num_trainers}
                counters = {"rows": rows, "global_step": global_step, "best_return": best_return, "ranks": ranks}
                save_checkpoint(run_dir, name, agent, optimizer_states[0], counters, args)
            if checkpoints:
                writer.add_scalar("Time/checkpoint", time.perf_counter() - start_time, global_step)
        if iteration == last:
            break

    envs.close()
    stopping = last < num_iterations
    if rank == 0:
        progress.close()
        writer.close()
        if stopping:
            print(f"stopped by a signal: go on with --resume {run_dir}/checkpoints/{name}.pt")
        print(f"logs, checkpoints and videos: {run_dir}")
    return stopping


def train(
    args: Args, agent: Agent, signals: list, state: dict | None, num_iterations: int, trainers: TorchCollective,
    rollout_groups: list[TorchCollective], parameter_group: TorchCollective,
) -> bool:  # fmt: skip
    """A trainer's run: receive a rollout of each player and update; the first trainer sends the parameters back.

    With `overlap` it sends them when it has got the next rollout, so that the players wait for an update only where it
    takes longer than a rollout; without, they wait for the update on the rollout that they have just sent. Returns
    whether a signal ended the run.
    """
    rank, num_trainers, generator = trainers.rank, trainers.world_size, Generator()
    like, device = batch_like(agent), next(agent.parameters()).device
    row_bytes = len(pack(like))
    flat = flatten_parameters(agent)
    optimizer = make_optimizer(flat, args)
    if state:
        restore(state, agent, optimizer)
    model = DistributedDataParallel(agent, process_group=trainers.group) if num_trainers > 1 else agent
    rollout_size, rows = args.num_players * args.num_envs * args.num_steps, state["rows"] if state else 0
    first, last = math.ceil(rows / rollout_size) + 1, num_iterations
    part, num_parts = (rank, num_trainers) if args.share_data else (0, 1)
    num_minibatches = max(1, round(rollout_size / (args.per_rank_batch_size * num_trainers)))
    minibatches = partial(shuffle, num_minibatches=num_minibatches, generator=generator, part=part, num_parts=num_parts)
    compiled, start_time = None, time.perf_counter()
    if args.compile:
        num_rows = args.num_envs * args.num_steps
        num_rows = args.num_players * (num_rows if args.share_data else -(-num_rows // num_trainers))
        compiled = compile_update(agent, flat, optimizer, batch_like(agent, num_rows), minibatches, args)
        if rank == 0:
            print(f"compiled in {time.perf_counter() - start_time:.1f} seconds", flush=True)
    means, seconds, stop, start_time = torch.zeros(6), [0.0, 0.0, 0.0], False, time.perf_counter()

    def send(iteration: int) -> int:
        """Send the players what an iteration has come to; return the one that the run ends with."""
        nonlocal stop
        if not args.overlap:  # else they have met over the next rollout
            num_signals = [meet_player(player, group)[-1] for player, group in enumerate(rollout_groups)]
            stop = stop or any(num_signals)
        if rank == 0:
            message = torch.cat([flat.detach().cpu(), means, torch.tensor([*seconds, stop])])
            parameter_group.broadcast(message, args.num_players)
        stop_if_diverged(flat, means, iteration)
        last = iteration if stop and iteration >= first else num_iterations
        if rank == 0 and checkpoint_due(args, iteration, last):
            send_optimizer(optimizer, args.num_players, parameter_group)
        return last

    for iteration in range(first, num_iterations + 1):
        # rollouts
        parts, wait_seconds = [], 0.0
        for player, group in enumerate(rollout_groups):
            time_before = time.perf_counter()
            *bad, num_signals = meet_player(player, group)
            stop = stop or num_signals > 0
            wait_seconds += time.perf_counter() - time_before
            if not any(bad):
                parts.append(receive_rollout(row_bytes, args, player, num_trainers, group))
        stop_if_bad(bad, iteration)
        batch = {name: tensor.to(device) for name, tensor in unpack(torch.stack(parts), like).items()}
        if args.overlap and (last := send(iteration - 1)) < iteration:
            break
        received_time = time.perf_counter()
        if args.overlap:
            recenter(agent, batch)

        # update, with a stream of random numbers of its own
        stream = 0 if args.share_data else rank
        generator.manual_seed(int(np.random.SeedSequence((args.seed, rows)).generate_state(2 * stream + 2)[-1]))
        optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - args.anneal_lr * (iteration - 1) / num_iterations)
        means = update(model, optimizer, batch, args, minibatches, compiled, trainers)
        sums = torch.cat([means, means.new_tensor([len(signals)])])  # now, so that one that came meanwhile counts
        if num_trainers > 1:
            trainers.all_reduce(sums)
        means, rows = (sums[:-1] / num_trainers).cpu(), rows + rollout_size
        stop = stop or sums[-1].item() > 0
        end_time = time.perf_counter()
        seconds = [wait_seconds, received_time - start_time - wait_seconds, end_time - received_time]
        start_time = end_time  # so that sending parameters counts with the next iteration's communication
        if not args.overlap or iteration == num_iterations:
            last = send(iteration)
        if iteration == last:
            break
    return last < num_iterations


def main(args: Args) -> None:
    # distributed set-up: fabric run starts the processes
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    world_size, local_world_size = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if args.evaluate:
        return evaluate_checkpoint(args) if rank == 0 else None
    num_trainers, is_player = world_size - args.num_players, rank < args.num_players
    if args.num_players < 1 or num_trainers < 1:
        raise SystemExit(
            f"error: --num-players {args.num_players} of {world_size} ranks leaves no player or no trainer: start "
            "ranks enough with `fabric run --devices=N`"
        )
    if os.environ.get("LT_PRECISION", "32-true") not in ("32-true", "32"):
        raise SystemExit("error: --precision must be 32-true: the players act in 32 bits")
    if os.environ.get("LT_STRATEGY", "ddp") != "ddp":
        raise SystemExit("error: --strategy must be ddp: it is what the trainers run")
    if "," in os.environ.get("LT_DEVICES", ""):
        raise SystemExit("error: --devices must be a number of ranks: choose GPUs with CUDA_VISIBLE_DEVICES")
    if args.player_on_gpu and not args.cuda:
        raise SystemExit("error: --player-on-gpu needs --cuda")
    rollout_size = args.num_players * args.num_envs * args.num_steps
    if args.per_rank_batch_size * num_trainers > rollout_size:
        raise SystemExit(
            f"error: --per-rank-batch-size {args.per_rank_batch_size} of each of {num_trainers} trainers is more than "
            f"the rollouts' {rollout_size} rows"
        )
    player_rows = args.num_envs * args.num_steps
    if num_trainers > player_rows and not args.share_data:
        raise SystemExit(f"error: {num_trainers} trainers are more than the {player_rows} rows of a player's rollout")
    num_iterations = args.total_timesteps // rollout_size
    if num_iterations == 0:
        raise SystemExit(f"error: --total-timesteps {args.total_timesteps} is less than one rollout of {rollout_size}")

    ranks = {"num_actors": args.num_players, "world_size": world_size}
    run_dir, state = open_run(args, "logs/fabric_decoupled_logs", ranks) if rank == 0 else ("", None)

    # devices: players that act on the CPU leave their machine's first GPUs to its trainers
    on_gpu = args.cuda and (args.player_on_gpu or not is_player)
    num_players_here = min(max(args.num_players - (rank - local_rank), 0), local_world_size)
    gpu = local_rank if args.player_on_gpu else local_rank - num_players_here
    if on_gpu and torch.cuda.device_count() <= gpu:
        flag = "--player-on-gpu" if args.player_on_gpu else "--cuda"
        raise SystemExit(f"error: {flag} needs more GPUs than the {torch.cuda.device_count()} here: leave {flag} away")
    device = torch.device("cuda", gpu) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    torch.set_num_threads(args.num_threads)
    # as many CPUs as ranks, which work at once: a CPU for each makes 5% more steps per second
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    one_thread = args.num_threads == 1 and args.vec_env == "sync" and not args.cuda
    if args.overlap and num_trainers == 1 and one_thread and len(cpus) == local_world_size:
        os.sched_setaffinity(0, {cpus[local_rank]})
    torch.backends.cudnn.deterministic = args.torch_deterministic

    # groups: rollouts and parameters pass through the hosts, where the rollouts are; gradients stay on their devices
    timeout = {"timeout": timedelta(seconds=args.dist_timeout)}
    world = TorchCollective().setup(backend="gloo", **timeout)
    world.broadcast_object_list(states := [state], 0)
    (state,) = states
    player_ranks, trainer_ranks = range(args.num_players), range(args.num_players, world_size)
    backend = "nccl" if args.cuda else "gloo"
    players = TorchCollective().create_group(ranks=list(player_ranks), **timeout)
    trainers = TorchCollective().create_group(ranks=list(trainer_ranks), backend=backend, **timeout)
    rollout_groups = [TorchCollective().create_group(ranks=[p, *trainer_ranks], **timeout) for p in player_ranks]
    parameter_group = TorchCollective().create_group(ranks=[*player_ranks, trainer_ranks[0]], **timeout)

    # environments, each with a seed of its own, also of a resumed run; a trainer only looks at their spaces
    video_dir = f"{run_dir}/videos/train-from-step-{state['global_step'] if state else 0}"
    last_seed = args.seed + args.num_players * args.num_envs + args.eval_episodes + rank
    env_seed = args.seed + (state["rows"] if state else 0) + rank * args.num_envs
    num_envs, env_seed = (args.num_envs, env_seed) if is_player else (1, last_seed)
    envs, first_obs = make_envs(args, num_envs, env_seed, video_dir if args.capture_video and rank == 0 else None)
    signals = catch_signals()
    torch.manual_seed(args.seed)
    agent = Agent(envs.single_observation_space, envs.single_action_space, args).to(device)

    if is_player:
        if state:
            restore(state, agent)
        groups = (players, rollout_groups[rank], parameter_group)
        stopping = play(args, agent, envs, first_obs, signals, state, run_dir, num_iterations, *groups)
    else:
        envs.close()
        groups = (trainers, rollout_groups, parameter_group)
        stopping = train(args, agent, signals, state, num_iterations, *groups)
    world.barrier()  # launchers end the others if one leaves, and player 0 has been writing
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
