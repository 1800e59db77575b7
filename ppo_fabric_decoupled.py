"""Proximal Policy Optimization on many processes, in one file: players step the environments, trainers train.

The first ranks are players: each steps its own environments with its copy of the agent and sends its rollouts to the
trainers, all other ranks, which train under DDP and send the parameters back. With --overlap the players collect the
next rollout while the trainers work on the last one. Copy this file and hack it: it needs nothing from its neighbours.

In Lightning Fabric's collectives, with one player and two trainers, two and two, on GPUs, the player on a GPU as well:
    fabric run --devices=3 ppo_fabric_decoupled.py --num-envs 4
    fabric run --devices=4 ppo_fabric_decoupled.py --num-envs 4 --num-players 2 --overlap
    fabric run --devices=3 ppo_fabric_decoupled.py --num-envs 4 --cuda
    fabric run --devices=3 ppo_fabric_decoupled.py --num-envs 4 --cuda --player-on-gpu
Add --accelerator=cpu to `fabric run` on a machine with some GPUs, but fewer than --devices: the launcher counts them.

PPO: Schulman et al. 2017, arXiv:1707.06347. GAE: Schulman et al. 2016, arXiv:1506.02438.
"""

import math
import os
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import tyro
from lightning.fabric.plugins.collectives import TorchCollective
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    # experiment
    exp_name: str = "ppo"
    """name of the experiment, part of the run's folder"""
    seed: int = 1
    """seed of the parameters, the environments, the actions and the shuffling"""
    torch_deterministic: bool = True
    """let cuDNN use deterministic algorithms only"""
    capture_video: bool = False
    """record episodes of rank 0's first environment, and of the evaluation, under the run's folder"""
    eval_every: int = 0
    """evaluate every so many iterations (0: only at the end)"""
    eval_episodes: int = 10
    """episodes of an evaluation, each played greedily in an environment of its own (0: no evaluation)"""

    # environment
    env_id: str = "CartPole-v1"
    """id of the Gymnasium environment"""
    vec_env: Literal["sync", "async", "native"] = "sync"
    """step in this process, in one process per environment, or by the environment's own vector implementation"""
    num_envs: int = 4
    """environments per rank that steps them"""

    # algorithm
    total_timesteps: int = 100_000
    """environment steps of the whole run, over all ranks: the iterations that fit in are run"""
    num_steps: int = 128
    """steps per environment and rollout"""
    learning_rate: float = 1e-3
    """learning rate of Adam"""
    anneal_lr: bool = True
    """anneal the learning rate linearly to zero over the run"""
    gamma: float = 0.99
    """discount factor"""
    gae_lambda: float = 0.95
    """lambda of the generalised advantage estimation"""
    update_epochs: int = 10
    """passes over the rollout per update"""
    activation_function: Literal["relu", "tanh"] = "tanh"
    """activation function of the actor and the critic"""
    ortho_init: bool = True
    """initialise the layers orthogonally"""
    normalize_advantages: bool = True
    """normalise the advantages over the rollouts of all ranks"""
    clip_coef: float = 0.2
    """clip the probability ratio to 1 - clip_coef .. 1 + clip_coef"""
    clip_vloss: bool = False
    """clip the step of the value function by clip_coef as well"""
    ent_coef: float = 0.0
    """coefficient of the entropy bonus"""
    vf_coef: float = 0.5
    """coefficient of the value loss"""
    max_grad_norm: float = 0.5
    """clip the gradient to this norm"""
    target_kl: float | None = None
    """end the update after an epoch whose mean approximate KL divergence is above this"""

    # distributed
    per_rank_batch_size: int = 64
    """rows per minibatch and training rank"""
    share_data: bool = False
    """shuffle the rollouts of all ranks together; each training rank takes its part of every minibatch"""
    num_threads: int = 1
    """torch's CPU threads per rank: networks of this size run slower on more"""
    num_players: int = 1
    """ranks that step environments: the first ones; all others train"""
    overlap: bool = False
    """collect the next rollout while the trainers work on the last one: the policy that acts is one update older"""
    player_on_gpu: bool = False
    """with cuda, let the players act on a GPU each too"""
    cuda: bool = False
    """train on one GPU per training rank (NCCL); the environments stay on the CPU"""

    def __post_init__(self) -> None:
        rules = (
            ("num_envs total_timesteps update_epochs per_rank_batch_size num_threads", 1, math.inf),
            ("num_steps", 2, math.inf),  # of two steps of an environment one at least is no reset
            ("seed", 0, 2**31),
            ("eval_every eval_episodes ent_coef vf_coef", 0, math.inf),
            ("learning_rate clip_coef max_grad_norm target_kl", sys.float_info.min, math.inf),
            ("gamma gae_lambda", 0, 1),
        )
        for names, low, high in rules:
            for name in names.split():
                value = getattr(self, name)
                if value is not None and not (low <= value <= high and value < math.inf):
                    least = "positive" if 0 < low < 1 else f"at least {low}"
                    most = f" and at most {high}" if high < math.inf else ""
                    raise SystemExit(f"error: --{name.replace('_', '-')} must be {least}{most}, not {value}")


def make_envs(env_id: str, num_envs: int, vec_env: str, video_dir: str | None = None) -> gym.vector.VectorEnv:
    """Make a vector of environments: the place to plug in your own.

    Its autoreset mode must be NEXT_STEP: the step after an episode's end ignores the action, returns reward 0 and the
    first observation of the next episode. With `video_dir`, the first environment's episodes are recorded there.
    """
    kwargs = {"render_mode": "rgb_array"} if video_dir else {}

    def make_env(index: int) -> gym.Env:
        if video_dir and index == 0:
            return gym.wrappers.RecordVideo(gym.make(env_id, **kwargs), video_dir)
        return gym.make(env_id)

    try:
        if vec_env == "native":
            envs = gym.make_vec(env_id, num_envs, vectorization_mode="vector_entry_point", **kwargs)
            if video_dir:
                envs = gym.wrappers.vector.RecordVideo(envs, video_dir, record_first_only=True)
        else:
            vectorize = gym.vector.AsyncVectorEnv if vec_env == "async" else gym.vector.SyncVectorEnv
            envs = vectorize([partial(make_env, index) for index in range(num_envs)])
    except (gym.error.Error, ImportError, TypeError, ValueError) as error:
        raise SystemExit(f"error: --env-id {env_id} --vec-env {vec_env}: {error}") from error

    obs_space, action_space = envs.single_observation_space, envs.single_action_space
    if not isinstance(obs_space, gym.spaces.Box) or len(obs_space.shape) != 1:
        raise SystemExit(
            f"error: --env-id {env_id} observes {obs_space}, which is no vector: "
            "register it with gymnasium.wrappers.FlattenObservation around it"
        )
    if not isinstance(action_space, gym.spaces.Discrete | gym.spaces.Box):
        raise SystemExit(f"error: --env-id {env_id} acts in {action_space}: only Discrete and Box can be trained")
    if envs.metadata.get("autoreset_mode") != gym.vector.AutoresetMode.NEXT_STEP:
        raise SystemExit(f"error: --env-id {env_id} --vec-env {vec_env} must have the autoreset mode NEXT_STEP")
    return envs


class Agent(nn.Module):
    """Actor and critic, two networks of two hidden layers.

    The actor's output parametrises the action distribution: the logits of a categorical for Discrete, the mean of a
    diagonal Gaussian with a state-independent standard deviation for Box.
    """

    def __init__(self, obs_space: gym.spaces.Box, action_space: gym.Space, activation: str, ortho_init: bool):
        super().__init__()
        self.discrete = isinstance(action_space, gym.spaces.Discrete)
        obs_dim = math.prod(obs_space.shape)
        self.num_outputs = int(action_space.n) if self.discrete else math.prod(action_space.shape)

        def layer(inputs: int, outputs: int, gain: float) -> nn.Linear:
            linear = nn.Linear(inputs, outputs)
            if ortho_init:
                nn.init.orthogonal_(linear.weight, gain)
                nn.init.zeros_(linear.bias)
            return linear

        def mlp(outputs: int, gain: float) -> nn.Sequential:
            act = nn.Tanh if activation == "tanh" else nn.ReLU
            hidden = [layer(obs_dim, 64, math.sqrt(2)), act(), layer(64, 64, math.sqrt(2)), act()]
            return nn.Sequential(*hidden, layer(64, outputs, gain))

        self.actor = mlp(self.num_outputs, 0.01)
        self.critic = mlp(1, 1.0)
        if not self.discrete:
            self.log_std = nn.Parameter(torch.zeros(self.num_outputs))

    def sample_noise(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Draw all the randomness of a rollout at once, (*shape, num_outputs), for `act`: one call, not one a step."""
        noise = torch.empty(*shape, self.num_outputs)
        if self.discrete:
            return -noise.exponential_(generator=generator).log()  # Gumbel
        return noise.normal_(generator=generator)

    def act(self, obs: Tensor, noise: Tensor | float = 0.0) -> Tensor:
        """Actions for observations (N, obs_dim): (N,) integers or (N, act_dim) floats, sampled by `noise`.

        The largest logit plus Gumbel noise is a sample of the categorical (Maddison et al. 2014, arXiv:1411.0030).
        No noise gives the greedy action.
        """
        output = obs
        for layer in self.actor:  # forward, not __call__, and none for the Sequential: 4% more steps per second
            output = layer.forward(output)
        if self.discrete:
            return (output + noise).argmax(-1)
        return output + self.log_std.exp() * noise

    def forward(self, obs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities of the actions, entropies and values, each (B,), for observations (B, obs_dim)."""
        output, values = self.actor(obs), self.critic(obs).squeeze(-1)
        if self.discrete:
            log_probs = output.log_softmax(-1)
            entropy = -(log_probs.exp() * log_probs).sum(-1)
            return log_probs.gather(-1, actions.unsqueeze(-1)).squeeze(-1), entropy, values
        z = (actions - output) * (-self.log_std).exp()
        log_norm = self.log_std + 0.5 * math.log(2 * math.pi)
        return (-0.5 * z.square() - log_norm).sum(-1), (log_norm + 0.5).sum().expand_as(values), values


def to_env(actions: Tensor, action_space: gym.Space) -> np.ndarray:
    """What a vector environment is stepped with: Box actions within their bounds, Discrete ones from `start` on."""
    if isinstance(action_space, gym.spaces.Box):
        return actions.numpy().reshape(action_space.shape).clip(action_space.low, action_space.high)
    return actions.numpy() + action_space.start


def make_storage(num_steps: int, num_envs: int, agent: Agent, first_obs: np.ndarray) -> dict[str, Tensor]:
    """The rollout's buffers on the host; their last row starts the next rollout, so it holds the first observation."""
    T, N = num_steps, num_envs
    action_shape, action_type = ((), torch.int64) if agent.discrete else ((agent.num_outputs,), torch.float32)
    storage = {
        "obs": torch.zeros(T + 1, N, first_obs.shape[-1]),
        "actions": torch.zeros(T + 1, N, *action_shape, dtype=action_type),
        "rewards": torch.zeros(T, N),
        "terminated": torch.zeros(T, N, dtype=torch.bool),
        "dones": torch.zeros(T + 1, N, dtype=torch.bool),  # dones[t]: an episode ended just before row t
        "episode_return": torch.zeros(N, dtype=torch.float64),
        "episode_length": torch.zeros(N, dtype=torch.int64),
    }
    storage["obs"][-1] = torch.as_tensor(first_obs)
    return storage


@torch.inference_mode()
def collect_rollout(
    agent: Agent,
    model: nn.Module,
    envs: gym.vector.VectorEnv,
    storage: dict[str, Tensor],
    generator: torch.Generator,
    device: torch.device,
) -> tuple[dict[str, Tensor], list[tuple[float, int]]]:
    """Step the environments T times with the actor alone; then pass all rows through the model that is trained.

    Returns the rollout on the device and the returns and lengths of the episodes that ended. `rewards`, `terminated`,
    `dones` (the episode ended at t) and `valid` are (T, N); `obs`, `actions`, `log_probs` and `values` have a row more,
    of which only the value counts. `valid` is False where the environment was reset instead of stepped (NEXT_STEP
    autoreset): that row is no experience. The same mode makes `obs[t + 1]` the true last observation of an episode
    that ended at t, so that `values[t + 1]` is what a truncated episode bootstraps from.
    """
    obs, dones = storage["obs"], storage["dones"]
    obs[0], dones[0] = obs[-1], dones[-1]
    noise = agent.sample_noise(storage["rewards"].shape, generator).to(device)
    array = {name: tensor.numpy() for name, tensor in storage.items()}  # numpy writes a row several times faster
    episode_return, episode_length = array["episode_return"], array["episode_length"]
    episodes = []
    for t, step_noise in enumerate(noise):
        actions = agent.act(obs[t].to(device), step_noise).cpu()
        next_obs, reward, terminated, truncated, _ = envs.step(to_env(actions, envs.action_space))
        done = terminated | truncated
        array["obs"][t + 1], array["dones"][t + 1] = next_obs, done
        array["actions"][t], array["rewards"][t], array["terminated"][t] = actions.numpy(), reward, terminated
        episode_return += reward
        episode_length += ~array["dones"][t]
        if np.count_nonzero(done):
            episodes += zip(episode_return[done].tolist(), episode_length[done].tolist(), strict=True)
            episode_return[done], episode_length[done] = 0.0, 0

    rollout = {name: storage[name].to(device) for name in ("obs", "actions", "rewards", "terminated")}
    rollout["dones"], rollout["valid"] = dones[1:].to(device), ~dones[:-1].to(device)
    log_probs, _, values = model(rollout["obs"].flatten(0, 1), rollout["actions"].flatten(0, 1))
    rollout["log_probs"], rollout["values"] = log_probs.view(dones.shape), values.view(dones.shape)
    return rollout, episodes


def compute_gae(
    rewards: Tensor, values: Tensor, terminated: Tensor, dones: Tensor, gamma: float, gae_lambda: float
) -> Tensor:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16), (T, N).

    `rewards`, `terminated` and `dones` (the episode ended at t, by termination or truncation) are (T, N); `values` is
    (T + 1, N), and `values[t + 1]` that of the observation which step t led to. Termination cuts the bootstrap, an
    episode's end cuts the trace.
    """
    deltas = rewards + gamma * values[1:] * ~terminated - values[:-1]
    decays = gamma * gae_lambda * (~dones).to(values.dtype)
    advantage = torch.zeros_like(values[0])
    advantages = []
    for delta, decay in zip(deltas.flip(0), decays.flip(0), strict=True):
        advantage = torch.addcmul(delta, decay, advantage)
        advantages.append(advantage)
    return torch.stack(advantages[::-1])


def ppo_loss(
    new_log_probs: Tensor, entropy: Tensor, new_values: Tensor, minibatch: dict[str, Tensor], args: Args
) -> tuple[Tensor, Tensor]:
    """PPO's clipped objective (Schulman et al. 2017, eq. 7 and 9) over a minibatch of B rows.

    Every mean is a sum weighted by the minibatch's `weights`, 0 in a row that is no experience. Returns the loss and,
    detached, (5,) means: policy loss, value loss, entropy loss, approximate KL divergence, clipped fraction.
    """
    advantages, returns, values = minibatch["advantages"], minibatch["returns"], minibatch["values"]
    log_ratio = new_log_probs - minibatch["log_probs"]
    ratio = log_ratio.exp()
    policy_loss = -torch.min(advantages * ratio, advantages * ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef))
    value_loss = (new_values - returns).square()
    if args.clip_vloss:
        clipped_values = values + (new_values - values).clamp(-args.clip_coef, args.clip_coef)
        value_loss = torch.max(value_loss, (clipped_values - returns).square())
    entropy_loss = -entropy if args.ent_coef else -entropy.detach()  # no backward pass for nothing
    with torch.no_grad():
        approx_kl = ratio - 1 - log_ratio  # k3 of http://joschu.net/blog/kl-approx.html
        clipped = ((ratio - 1).abs() > args.clip_coef).float()
    # two matrix products in place of nine small operations and their backward passes: 9% of an update
    means = torch.stack([policy_loss, 0.5 * value_loss, entropy_loss, approx_kl, clipped]) @ minibatch["weights"]
    loss = means @ means.new_tensor([1.0, args.vf_coef, args.ent_coef, 0.0, 0.0])
    return loss, means.detach()


def shuffle(
    batch: dict[str, Tensor], num_minibatches: int, generator: torch.Generator, part: int, num_parts: int
) -> Iterator[dict[str, Tensor]]:
    """Shuffle a batch of R rows, cut it into minibatches of near-equal sizes, yield the given part of each.

    A minibatch's `weights` are 0 in a row that is no experience. The averages that they make of the parts have as
    their mean over the parts the average over the whole minibatch, whatever the parts' counts of valid rows.
    """
    permutation = torch.randperm(len(batch["valid"]), generator=generator).to(batch["valid"].device)
    rows = [minibatch.tensor_split(num_parts)[part] for minibatch in permutation.tensor_split(num_minibatches)]
    counts = torch.stack([valid.sum() for valid in batch["valid"][permutation].tensor_split(num_minibatches)])
    sizes = torch.tensor([len(r) for r in rows], device=counts.device)
    # one gather an epoch and views of it, not one a minibatch
    shuffled = {name: tensor[torch.cat(rows)] for name, tensor in batch.items()}
    shuffled["weights"] = shuffled["valid"] * (num_parts / counts.clamp(min=1)).repeat_interleave(sizes)
    for tensors in zip(*(tensor.split(sizes.tolist()) for tensor in shuffled.values()), strict=True):
        yield dict(zip(shuffled, tensors, strict=True))


def update(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, Tensor],
    args: Args,
    generator: torch.Generator,
    rank: int,
    world_size: int,
    trainers: TorchCollective,
) -> Tensor:
    """Train on a batch of R rows; return the means of `ppo_loss` and the gradient's norm, (6,), over all steps.

    With `share_data` every rank holds the same R rows, shuffles them alike and trains on its part of each minibatch;
    without, the rows are the rank's own. Either way all ranks take the same number of steps.
    """
    part, num_parts = (rank, world_size) if args.share_data else (0, 1)
    num_minibatches = max(1, round(len(batch["valid"]) / (args.per_rank_batch_size * num_parts)))
    metrics = []
    for _ in range(args.update_epochs):
        for minibatch in shuffle(batch, num_minibatches, generator, part, num_parts):
            outputs = model(minibatch["obs"], minibatch["actions"])
            loss, means = ppo_loss(*outputs, minibatch, args)
            optimizer.zero_grad()
            loss.backward()
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            optimizer.step()
            metrics.append(torch.cat([means, grad_norm.unsqueeze(0)]))
        if args.target_kl is not None:
            approx_kl = torch.stack(metrics[-num_minibatches:])[:, 3].mean()
            if world_size > 1:
                trainers.all_reduce(approx_kl)  # all ranks decide on the same number: none leaves the loop alone
            if approx_kl / world_size > args.target_kl:
                break
    return torch.stack(metrics).mean(0)


def batch_sums(batch: dict[str, Tensor], rollout: dict[str, Tensor], episodes: list[tuple[float, int]]) -> Tensor:
    """What the ranks add up before an update, (10,) float64.

    Of the valid rows: count, sums of the advantages, their squares, the returns and their squares. Of the episodes
    that ended: count, sums of returns and lengths. Last the rollout's counts of non-finite observations and rewards.
    """
    advantages, returns = (batch[name][batch["valid"]].double() for name in ("advantages", "returns"))
    row_sums = [x.sum() for x in (batch["valid"], advantages, advantages.square(), returns, returns.square())]
    episode_sums = torch.tensor([(1.0, *e) for e in episodes], dtype=torch.float64).view(-1, 3).sum(0)
    bad_counts = [(~rollout[name].isfinite()).sum() for name in ("obs", "rewards")]
    return torch.stack([*row_sums, *episode_sums.to(advantages.device), *bad_counts])


def pack(batch: dict[str, Tensor]) -> Tensor:
    """The bytes of a batch's R rows, (R, bytes per row): one message, whatever the types of its tensors."""
    return torch.cat([tensor.reshape(len(tensor), -1).view(torch.uint8) for tensor in batch.values()], dim=1)


def unpack(packed: Tensor, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `pack` for any number of rows, with the names, types and row shapes of `like`."""
    columns = packed.split([tensor[0].numel() * tensor.element_size() for tensor in like.values()], dim=1)
    return {
        name: column.clone(memory_format=torch.contiguous_format).view(tensor.dtype).view(-1, *tensor.shape[1:])
        for (name, tensor), column in zip(like.items(), columns, strict=True)
    }


@torch.inference_mode()
def evaluate(agent: Agent, args: Args, seed: int, device: torch.device, video_dir: str | None = None) -> np.ndarray:
    """Returns (eval_episodes,) of greedy episodes, each the first one of an environment of its own.

    It ends when they have all ended: give an environment that can go on for ever a `max_episode_steps`.
    """
    envs = make_envs(args.env_id, args.eval_episodes, "sync", video_dir)
    obs, _ = envs.reset(seed=seed)
    returns, running = np.zeros(args.eval_episodes), np.ones(args.eval_episodes, dtype=bool)
    while running.any():
        actions = agent.act(torch.as_tensor(obs, dtype=torch.float32, device=device)).cpu()
        obs, rewards, terminated, truncated, _ = envs.step(to_env(actions, envs.action_space))
        returns += rewards * running
        running &= ~(terminated | truncated)
    envs.close()
    return returns


def meet(group: TorchCollective, bad_counts: list[float]) -> list[float]:
    """Wait until a player and all trainers are there, which tells waiting from talking.

    The player brings its counts of non-finite observations and rewards, the trainers zeros; all get the player's.
    """
    return group.all_reduce(torch.tensor(bad_counts, dtype=torch.float64)).tolist()


def stop_if_bad(bad_counts: list[float], iteration: int, args: Args) -> None:
    """End this rank, as all others do, if the environments gave something that is not finite."""
    if any(bad_counts):
        raise SystemExit(
            f"error: iteration {iteration}: {args.env_id} gave {bad_counts[0]:.0f} non-finite observations and "
            f"{bad_counts[1]:.0f} non-finite rewards"
        )


def stop_if_diverged(means: Tensor, iteration: int) -> None:
    """End this rank, as all others do, if an update's means are not finite."""
    if not means.isfinite().all():
        raise SystemExit(f"error: iteration {iteration}: the loss or its gradient is not finite")


def batch_like(envs: gym.vector.VectorEnv, agent: Agent) -> dict[str, Tensor]:
    """A batch of one row, which tells a trainer the names, types and row shapes of what the players send."""
    storage = make_storage(1, 1, agent, np.zeros((1, *envs.single_observation_space.shape)))
    obs, action, number = storage["obs"][0], storage["actions"][0], torch.zeros(1)
    like = {"obs": obs, "actions": action, "log_probs": number, "values": number, "advantages": number}
    return like | {"valid": torch.zeros(1, dtype=torch.bool), "returns": number}


def send_rollout(batch: dict[str, Tensor], args: Args, rank: int, num_trainers: int, group: TorchCollective) -> None:
    """Send a player's rows to the trainers: all rows to all with `share_data`, else equal parts.

    What parts lack in rows is made up by copies of the first ones, which are not `valid` and so count nowhere.
    """
    if args.share_data:
        group.broadcast(pack(batch).cpu(), rank)
        return
    num_rows = len(batch["valid"])
    index = torch.arange(num_rows + -num_rows % num_trainers, device=batch["valid"].device) % num_rows
    batch = {name: tensor[index] for name, tensor in batch.items()}
    batch["valid"][num_rows:] = False
    rows = pack(batch).cpu()
    parts = [rows[i::num_trainers].contiguous() for i in range(num_trainers)]
    group.scatter(torch.empty_like(parts[0]), [torch.empty_like(parts[0]), *parts], rank)


def receive_rollout(
    like: dict[str, Tensor], args: Args, player: int, num_trainers: int, group: TorchCollective
) -> Tensor:
    """Receive what `send_rollout` sends to a trainer, as `pack`ed rows; `like` has the types of a row."""
    num_rows, width = args.num_envs * args.num_steps, pack(like).shape[1]
    rows = torch.empty(num_rows if args.share_data else -(-num_rows // num_trainers), width, dtype=torch.uint8)
    return group.broadcast(rows, player) if args.share_data else group.scatter(rows, [], player)


def send_parameters(agent: Agent, means: Tensor, seconds: list[float], args: Args, group: TorchCollective) -> None:
    """Send all players one message: the parameters, the means of the update, and the seconds that the trainer took."""
    parameters = nn.utils.parameters_to_vector(agent.parameters()).detach().cpu()
    group.barrier()
    group.broadcast(torch.cat([parameters, means, torch.tensor(seconds)]), args.num_players)


def play(
    args: Args,
    agent: Agent,
    envs: gym.vector.VectorEnv,
    generator: torch.Generator,
    device: torch.device,
    num_iterations: int,
    run_dir: str,
    eval_seed: int,
    player_group: TorchCollective,
    rollout_group: TorchCollective,
    parameter_group: TorchCollective,
) -> None:
    """A player's run: collect a rollout, send it to the trainers, receive parameters; player 0 logs and evaluates.

    What the trainers have to say of an iteration comes with the parameters that it ended with, which is one iteration
    later with `overlap`. So there is one more turn then, without a rollout.
    """
    rank, lag, first_trainer = player_group.rank, int(args.overlap), args.num_players
    num_trainers = rollout_group.world_size - 1
    storage = make_storage(args.num_steps, args.num_envs, agent, envs.reset(seed=args.seed + rank * args.num_envs)[0])
    sizes = [parameter.numel() for parameter in agent.parameters()]
    message = torch.empty(sum(sizes) + 6 + 3)  # parameters, means of the update, times of the first trainer

    # logs
    if rank == 0:
        writer = SummaryWriter(run_dir)
        table = "".join(f"|{name}|{value}|\n" for name, value in vars(args).items())
        writer.add_text("hyperparameters", f"|flag|value|\n|-|-|\n{table}")
        rollout_size = args.num_players * args.num_envs * args.num_steps
        progress = tqdm(total=num_iterations * rollout_size, unit="step", disable=not sys.stderr.isatty())
    global_step, mean_return, test_return, pending = 0, math.nan, math.nan, []

    for turn in range(1, num_iterations + lag + 1):
        start_time = time.perf_counter()
        metrics, wait_seconds, communication_seconds = {}, 0.0, 0.0
        if turn <= num_iterations:
            # rollout
            rollout, episodes = collect_rollout(agent, agent, envs, storage, generator, device)
            rollout["advantages"] = compute_gae(
                rollout["rewards"],
                rollout["values"],
                rollout["terminated"],
                rollout["dones"],
                args.gamma,
                args.gae_lambda,
            )
            names = ("obs", "actions", "log_probs", "values", "advantages", "valid")
            batch = {name: rollout[name][: args.num_steps].flatten(0, 1) for name in names}
            batch["returns"] = batch["advantages"] + batch["values"]

            # statistics over all players
            sums = batch_sums(batch, rollout, episodes).cpu()
            if args.num_players > 1:
                player_group.all_reduce(sums)
            count, adv_sum, adv_sq, ret_sum, ret_sq, num_episodes, sum_return, sum_length, *bad_counts = sums.tolist()
            adv_var, ret_var = adv_sq / count - (adv_sum / count) ** 2, ret_sq / count - (ret_sum / count) ** 2
            if args.normalize_advantages:
                batch["advantages"] = (batch["advantages"] - adv_sum / count) / (math.sqrt(max(adv_var, 0.0)) + 1e-8)
            metrics = {
                # the advantages are the returns less the values
                "Loss/explained_variance": 1 - adv_var / ret_var if ret_var else math.nan,
                "Info/policy_lag": min(turn - 1, lag),
                "Time/rollout": time.perf_counter() - start_time,
            }
            if num_episodes:
                metrics |= {"Rewards/rew_avg": sum_return / num_episodes, "Game/ep_len_avg": sum_length / num_episodes}

            # the trainers get the rollout
            time_before = time.perf_counter()
            stop_if_bad(meet(rollout_group, bad_counts), turn, args)
            time_ready = time.perf_counter()
            send_rollout(batch, args, rank, num_trainers, rollout_group)
            wait_seconds += time_ready - time_before
            communication_seconds += time.perf_counter() - time_ready

        # parameters: of the update on this rollout, or with overlap on the last one
        time_before = time.perf_counter()
        parameter_group.barrier()
        time_ready = time.perf_counter()
        parameter_group.broadcast(message, first_trainer)
        stop_if_diverged(message[-9:-3], turn - lag)
        with torch.no_grad():
            for parameter, values in zip(agent.parameters(), message.split([*sizes, 9]), strict=False):
                parameter.copy_(values.view_as(parameter))
        end_time = time.perf_counter()
        metrics["Time/player_wait"] = wait_seconds + time_ready - time_before
        metrics["Time/communication"] = communication_seconds + end_time - time_ready
        if turn <= num_iterations:
            metrics["Time/step_per_second"] = count / (end_time - start_time)
            pending.append((int(count), metrics))

        # logs: of the iteration that the received means belong to
        if turn <= lag or rank > 0:
            continue
        iteration = turn - lag
        count, metrics = pending.pop(0)
        global_step += count
        policy_loss, value_loss, entropy_loss, approx_kl, clip_fraction, grad_norm, *seconds = message[-9:].tolist()
        decay = 1 - (iteration - 1) / num_iterations if args.anneal_lr else 1.0
        metrics |= {
            "Loss/policy_loss": policy_loss,
            "Loss/value_loss": value_loss,
            "Loss/entropy_loss": entropy_loss,
            "Loss/approx_kl": approx_kl,
            "Loss/clip_fraction": clip_fraction,
            "Loss/grad_norm": grad_norm,
            "Info/entropy": -entropy_loss,
            "Info/learning_rate": args.learning_rate * decay,
            "Time/trainer_wait": seconds[0],
            "Time/trainer_communication": seconds[1],
            "Time/update": seconds[2],
        }
        mean_return = metrics.get("Rewards/rew_avg", mean_return)
        status = f"return {mean_return:.2f}, {metrics['Time/step_per_second']:.0f} steps/s"
        progress.set_postfix_str(status, refresh=False)
        progress.update(count)
        if progress.disable and iteration % max(1, num_iterations // 20) == 0:
            print(f"step {global_step} of {progress.total}: {status}", flush=True)
        evaluation_due = iteration == num_iterations or (args.eval_every and iteration % args.eval_every == 0)
        if args.eval_episodes and evaluation_due:
            video_dir = f"{run_dir}/videos/test-step-{global_step}" if args.capture_video else None
            returns = evaluate(agent, args, eval_seed, device, video_dir)
            metrics["Test/cumulative_reward"] = test_return = returns.mean()
            progress.write(f"step {global_step}: greedy return {test_return:.2f} +- {returns.std():.2f}")
        for tag, value in metrics.items():
            writer.add_scalar(tag, value, global_step)

    envs.close()
    if rank == 0:
        progress.total = global_step  # reset rows were no steps
        progress.close()
        hparams = {name: str(value) if value is None else value for name, value in vars(args).items()}
        writer.add_hparams(hparams, {"hp_metric": test_return}, run_name=".")
        writer.close()
        print(f"logs and videos: {run_dir}")


def train(
    args: Args,
    agent: Agent,
    like: dict[str, Tensor],
    generator: torch.Generator,
    device: torch.device,
    num_iterations: int,
    trainer_group: TorchCollective,
    rollout_groups: list[TorchCollective],
    parameter_group: TorchCollective,
) -> None:
    """A trainer's run: receive a rollout of each player and update; the first trainer sends the parameters back.

    With `overlap` it sends them when it has got the next rollout, so that the players never wait for an update that
    runs; without, the players wait for the update on the rollout that they have just sent.
    """
    rank, num_trainers = trainer_group.rank, trainer_group.world_size
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
    model = DistributedDataParallel(agent, process_group=trainer_group.group) if num_trainers > 1 else agent
    means, seconds = torch.zeros(6), [0.0, 0.0, 0.0]

    for iteration in range(1, num_iterations + 1):
        # rollouts
        parts, wait_seconds, start_time = [], 0.0, time.perf_counter()
        for player, group in enumerate(rollout_groups):
            time_before = time.perf_counter()
            bad_counts = meet(group, [0.0, 0.0])
            wait_seconds += time.perf_counter() - time_before
            if not any(bad_counts):
                parts.append(receive_rollout(like, args, player, num_trainers, group))
        stop_if_bad(bad_counts, iteration, args)
        batch = {name: tensor.to(device) for name, tensor in unpack(torch.cat(parts), like).items()}
        if args.overlap and rank == 0:
            send_parameters(agent, means, seconds, args, parameter_group)
        stop_if_diverged(means, iteration - 1)
        received_time = time.perf_counter()

        # update
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - (iteration - 1) / num_iterations)
        means = update(model, optimizer, batch, args, generator, rank, num_trainers, trainer_group)
        if num_trainers > 1:
            trainer_group.all_reduce(means)
        means = (means / num_trainers).cpu()
        seconds = [wait_seconds, received_time - start_time - wait_seconds, time.perf_counter() - received_time]
        if not args.overlap:
            if rank == 0:
                send_parameters(agent, means, seconds, args, parameter_group)
            stop_if_diverged(means, iteration)
    if args.overlap:
        if rank == 0:
            send_parameters(agent, means, seconds, args, parameter_group)
        stop_if_diverged(means, num_iterations)


def main(args: Args) -> None:
    # distributed set-up: fabric run starts the processes
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    world_size, local_world_size = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
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
    if args.player_on_gpu and not args.cuda:
        raise SystemExit("error: --player-on-gpu needs --cuda")
    rollout_size = args.num_players * args.num_envs * args.num_steps
    if args.per_rank_batch_size * num_trainers > rollout_size:
        raise SystemExit(
            f"error: --per-rank-batch-size {args.per_rank_batch_size} of each of {num_trainers} trainers is more than "
            f"the rollouts' {rollout_size} rows"
        )
    num_iterations = args.total_timesteps // rollout_size
    if num_iterations == 0:
        raise SystemExit(f"error: --total-timesteps {args.total_timesteps} is less than one rollout of {rollout_size}")

    # devices: players that act on the CPU leave their machine's first GPUs to its trainers
    on_gpu = args.cuda and (args.player_on_gpu or not is_player)
    num_players_here = min(max(args.num_players - (rank - local_rank), 0), local_world_size)
    gpu = local_rank if args.player_on_gpu else local_rank - num_players_here
    if on_gpu and torch.cuda.device_count() <= gpu:
        raise SystemExit(f"error: --cuda needs more GPUs than the {torch.cuda.device_count()} here: leave --cuda away")
    device = torch.device("cuda", gpu) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    torch.set_num_threads(args.num_threads)
    torch.backends.cudnn.deterministic = args.torch_deterministic

    # seeds: the same parameters everywhere, streams of their own for each rank's environments, actions and shuffling
    random.seed(args.seed + rank)
    np.random.seed(args.seed + rank)
    torch.manual_seed(args.seed)
    stream_seeds = np.random.SeedSequence(args.seed).generate_state(2 * world_size).tolist()
    action_seed, shuffle_seed = stream_seeds[2 * rank], stream_seeds[2 * max(rank - args.num_players, 0) + 1]
    if args.share_data:
        shuffle_seed = stream_seeds[1]

    # environments; a trainer only looks at their spaces
    name = f"{args.env_id.replace('/', '-')}_{args.exp_name}_{args.seed}_{time.strftime('%Y-%m-%d_%H-%M-%S')}"
    run_dir = f"logs/fabric_decoupled_logs/{name}"
    video_dir = f"{run_dir}/videos/train" if args.capture_video and rank == 0 else None
    envs = make_envs(args.env_id, args.num_envs if is_player else 1, args.vec_env, video_dir)
    agent = Agent(envs.single_observation_space, envs.single_action_space, args.activation_function, args.ortho_init)
    agent.to(device)

    # groups: rollouts and parameters pass through the hosts, where the rollouts are; gradients stay on their devices
    TorchCollective().setup(backend="gloo")
    players, trainers = range(args.num_players), range(args.num_players, world_size)
    player_group = TorchCollective().create_group(ranks=list(players))
    trainer_group = TorchCollective().create_group(ranks=list(trainers), backend="nccl" if args.cuda else "gloo")
    rollout_groups = [TorchCollective().create_group(ranks=[player, *trainers]) for player in players]
    parameter_group = TorchCollective().create_group(ranks=[*players, trainers[0]])

    if is_player:
        generator = torch.Generator().manual_seed(action_seed)
        groups = (player_group, rollout_groups[rank], parameter_group)
        eval_seed = args.seed + args.num_players * args.num_envs
        play(args, agent, envs, generator, device, num_iterations, run_dir, eval_seed, *groups)
    else:
        like = batch_like(envs, agent)
        envs.close()
        generator = torch.Generator().manual_seed(shuffle_seed)
        groups = (trainer_group, rollout_groups, parameter_group)
        train(args, agent, like, generator, device, num_iterations, *groups)
    time.sleep(0.1)  # gloo's threads need the interpreter to let go of the last tensor (PyTorch issue 190489)


if __name__ == "__main__":
    main(tyro.cli(Args))
