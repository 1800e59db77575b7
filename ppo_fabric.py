"""Proximal Policy Optimization on many processes, in one file.

Every rank steps its own environments, collects a rollout and trains on it; DDP averages the gradients, so that all
ranks hold the same parameters all the time. Copy this file and hack it: it needs nothing from its neighbours.
Diff ppo_torch_ddp.py and ppo_fabric.py to see what Lightning Fabric takes off your hands.

In Lightning Fabric, with one process, two on the CPU, eight GPUs, two machines (--node-rank=1 on the second):
    python ppo_fabric.py
    fabric run --accelerator=cpu --strategy=ddp --devices=2 ppo_fabric.py
    fabric run --accelerator=gpu --strategy=ddp --devices=8 ppo_fabric.py
    fabric run --accelerator=gpu --devices=8 --num-nodes=2 --node-rank=0 --main-address=HOST ppo_fabric.py

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
from lightning.fabric import Fabric
from lightning.fabric.loggers import TensorBoardLogger
from lightning.fabric.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn
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
    fabric: Fabric,
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
            fabric.backward(loss)
            grad_norm = fabric.clip_gradients(model, optimizer, max_norm=args.max_grad_norm, error_if_nonfinite=False)
            optimizer.step()
            metrics.append(torch.cat([means, grad_norm.unsqueeze(0)]))
        if args.target_kl is not None:
            approx_kl = torch.stack(metrics[-num_minibatches:])[:, 3].mean()
            approx_kl = fabric.all_reduce(approx_kl)  # all ranks decide on the same number: none leaves the loop alone
            if approx_kl > args.target_kl:
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


def main(args: Args) -> None:
    name = f"{args.env_id.replace('/', '-')}_{args.exp_name}_{args.seed}_{time.strftime('%Y-%m-%d_%H-%M-%S')}"
    # distributed set-up: fabric run sets the number of processes and their device, plain python does not
    run_dir = f"logs/fabric_logs/{name}"
    choice = {} if "LT_CLI_USED" in os.environ else {"accelerator": "cpu", "devices": 1}
    try:
        fabric = Fabric(**choice, loggers=TensorBoardLogger("logs/fabric_logs", name, version=""))
    except (ImportError, RuntimeError, ValueError) as error:
        raise SystemExit(f"error: Fabric cannot start: {error}") from error
    if not isinstance(fabric.strategy, DDPStrategy | SingleDeviceStrategy):
        raise SystemExit(f"error: {type(fabric.strategy).__name__} cannot run this file: use --strategy=ddp")
    if fabric.world_size != int(os.environ.get("WORLD_SIZE", 1)):
        raise SystemExit("error: start several processes of this file with `fabric run --devices=N`, not with torchrun")
    rank, world_size, device = fabric.global_rank, fabric.world_size, fabric.device
    torch.set_num_threads(args.num_threads)
    torch.backends.cudnn.deterministic = args.torch_deterministic

    rollout_size = world_size * args.num_envs * args.num_steps
    num_iterations = args.total_timesteps // rollout_size
    if num_iterations == 0:
        raise SystemExit(f"error: --total-timesteps {args.total_timesteps} is less than one rollout of {rollout_size}")
    if args.per_rank_batch_size * world_size > rollout_size:
        raise SystemExit(f"error: --per-rank-batch-size {args.per_rank_batch_size} is more than a rank's rollout")

    # seeds: the same parameters everywhere, streams of their own for each rank's environments, actions and shuffling
    random.seed(args.seed + rank)
    np.random.seed(args.seed + rank)
    torch.manual_seed(args.seed)
    stream_seeds = np.random.SeedSequence(args.seed).generate_state(2 * world_size).tolist()
    action_generator = torch.Generator().manual_seed(stream_seeds[2 * rank])
    shuffle_generator = torch.Generator().manual_seed(stream_seeds[1 if args.share_data else 2 * rank + 1])

    # environments
    video_dir = f"{run_dir}/videos/train" if args.capture_video and rank == 0 else None
    envs = make_envs(args.env_id, args.num_envs, args.vec_env, video_dir)
    first_obs, _ = envs.reset(seed=args.seed + rank * args.num_envs)
    eval_seed = args.seed + world_size * args.num_envs

    # agent
    agent = Agent(envs.single_observation_space, envs.single_action_space, args.activation_function, args.ortho_init)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
    model, optimizer = fabric.setup(agent, optimizer)
    if next(agent.parameters()).dtype != torch.float32 or os.environ.get("LT_PRECISION") in ("16-mixed", "16"):
        raise SystemExit("error: --precision must be 32-true or bf16-mixed: the agent acts in 32 bits")
    storage = make_storage(args.num_steps, args.num_envs, agent, first_obs)

    # logs
    if rank == 0:
        writer = fabric.logger.experiment
        table = "".join(f"|{name}|{value}|\n" for name, value in vars(args).items())
        writer.add_text("hyperparameters", f"|flag|value|\n|-|-|\n{table}")
        progress = tqdm(total=num_iterations * rollout_size, unit="step", disable=not sys.stderr.isatty())
    global_step, mean_return, test_return = 0, math.nan, math.nan

    for iteration in range(1, num_iterations + 1):
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - (iteration - 1) / num_iterations)

        # rollout
        start_time = time.perf_counter()
        rollout, episodes = collect_rollout(agent, model, envs, storage, action_generator, device)
        rollout["advantages"] = compute_gae(
            rollout["rewards"], rollout["values"], rollout["terminated"], rollout["dones"], args.gamma, args.gae_lambda
        )
        names = ("obs", "actions", "log_probs", "values", "advantages", "valid")
        batch = {name: rollout[name][: args.num_steps].flatten(0, 1) for name in names}
        batch["returns"] = batch["advantages"] + batch["values"]
        rollout_time = time.perf_counter()

        # communication: statistics over all ranks, and with share_data the rows themselves
        sums = batch_sums(batch, rollout, episodes)
        sums = fabric.all_reduce(sums, reduce_op="sum")
        count, adv_sum, adv_sq, ret_sum, ret_sq, num_episodes, sum_return, sum_length, bad_obs, bad_rewards = (
            sums.tolist()
        )
        if bad_obs or bad_rewards:
            raise SystemExit(
                f"error: iteration {iteration}: {args.env_id} gave {bad_obs:.0f} non-finite observations and "
                f"{bad_rewards:.0f} non-finite rewards"
            )
        adv_var, ret_var = adv_sq / count - (adv_sum / count) ** 2, ret_sq / count - (ret_sum / count) ** 2
        if args.normalize_advantages:
            batch["advantages"] = (batch["advantages"] - adv_sum / count) / (math.sqrt(max(adv_var, 0.0)) + 1e-8)
        if args.share_data and world_size > 1:
            batch = unpack(fabric.all_gather(pack(batch)).flatten(0, 1), batch)
        communication_time = time.perf_counter()

        # update
        means = update(model, optimizer, batch, args, shuffle_generator, rank, world_size, fabric)
        policy_loss, value_loss, entropy_loss, approx_kl, clip_fraction, grad_norm = fabric.all_reduce(means).tolist()
        if not math.isfinite(policy_loss + value_loss + entropy_loss + grad_norm):
            raise SystemExit(f"error: iteration {iteration}: the loss or its gradient is not finite")
        update_time = time.perf_counter()

        # logs
        global_step += int(count)
        if rank > 0:
            continue
        metrics = {
            "Loss/policy_loss": policy_loss,
            "Loss/value_loss": value_loss,
            "Loss/entropy_loss": entropy_loss,
            "Loss/approx_kl": approx_kl,
            "Loss/clip_fraction": clip_fraction,
            "Loss/explained_variance": 1 - adv_var / ret_var if ret_var else math.nan,  # advantages = returns - values
            "Loss/grad_norm": grad_norm,
            "Info/entropy": -entropy_loss,
            "Info/learning_rate": optimizer.param_groups[0]["lr"],
            "Time/rollout": rollout_time - start_time,
            "Time/communication": communication_time - rollout_time,
            "Time/update": update_time - communication_time,
            "Time/step_per_second": count / (update_time - start_time),
        }
        if num_episodes:
            mean_return = sum_return / num_episodes
            metrics |= {"Rewards/rew_avg": mean_return, "Game/ep_len_avg": sum_length / num_episodes}
        status = f"return {mean_return:.2f}, {metrics['Time/step_per_second']:.0f} steps/s"
        progress.set_postfix_str(status, refresh=False)
        progress.update(int(count))
        if progress.disable and iteration % max(1, num_iterations // 20) == 0:
            print(f"step {global_step} of {progress.total}: {status}", flush=True)
        evaluation_due = iteration == num_iterations or (args.eval_every and iteration % args.eval_every == 0)
        if args.eval_episodes and evaluation_due:
            video_dir = f"{run_dir}/videos/test-step-{global_step}" if args.capture_video else None
            returns = evaluate(agent, args, eval_seed, device, video_dir)
            metrics["Test/cumulative_reward"] = test_return = returns.mean()
            progress.write(f"step {global_step}: greedy return {test_return:.2f} +- {returns.std():.2f}")
        fabric.log_dict(metrics, global_step)

    envs.close()
    if rank == 0:
        progress.total = global_step  # reset rows were no steps
        progress.close()
        hparams = {name: str(value) if value is None else value for name, value in vars(args).items()}
        writer.add_hparams(hparams, {"hp_metric": test_return}, run_name=".")
        writer.close()
        print(f"logs and videos: {run_dir}")
    if world_size > 1:
        time.sleep(0.1)  # gloo's threads need the interpreter to let go of the last tensor (PyTorch issue 190489)


if __name__ == "__main__":
    main(tyro.cli(Args))
