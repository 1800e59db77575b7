"""Ordinary changes to a copy of a file work, or end with a line that names them, in every mode."""

import csv
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launch import ROOT, Command
from probe import load
from test_launch import DECOUPLED, FABRIC, LAUNCHERS, PLAYERS, SLOW, TORCH, scalars

MODES = {
    "eager": (TORCH, 1, []),
    "tcp": (TORCH, 2, ["--exchange", "tcp", "--share-data"]),
    "ddp": (TORCH, 2, ["--exchange", "ddp"]),
    "compile": (TORCH, 1, ["--compile"]),
    "compile, tcp": (TORCH, 2, ["--exchange", "tcp", "--compile"]),
    "compile, ddp": (TORCH, 2, ["--exchange", "ddp", "--compile", "--share-data"]),
    "Fabric": (FABRIC, 2, ["--exchange", "ddp", "--share-data"]),
    "Fabric, tcp": (FABRIC, 2, []),
    "Fabric, compile": (FABRIC, 1, ["--compile"]),
    "decoupled": (DECOUPLED, 2, []),
    "decoupled, 4 ranks": (DECOUPLED, 4, PLAYERS),
    "decoupled, 5 ranks": (DECOUPLED, 5, [*PLAYERS, "--share-data", "--overlap"]),
    "decoupled, compile": (DECOUPLED, 3, ["--compile", "--overlap"]),
}
FAST = ("eager", "tcp", "ddp", "compile", "decoupled")
MODE = pytest.mark.parametrize("mode", [m if m in FAST else pytest.param(m, marks=SLOW) for m in MODES])
# test_training.py has these compiled in its own process
MODE_BUT_COMPILE = pytest.mark.parametrize(
    "mode", [m if m in FAST and m != "compile" else pytest.param(m, marks=SLOW) for m in MODES]
)
EAGER = pytest.mark.parametrize(
    "mode", [m if m in FAST else pytest.param(m, marks=SLOW) for m in MODES if "compile" not in m]
)

SUPER = "        super().__init__()\n        self.action_space = action_space\n"
CRITIC = "        self.critic = make_mlp(num_features, hidden_sizes, 1, args.activation_function)\n"
GROUPS = '    groups = [{"params": trained, "lr": args.learning_rate, "name": "learning_rate"}]\n'


def hack(folder: Path, mode: str, *changes: tuple[str, str], flags: tuple = ()) -> tuple[int, str]:
    """Run a copy of a file in which each text is replaced by another; exit status and output."""
    file, ranks, switches = MODES[mode]
    text = file.read_text()
    for old, new in changes:
        assert text.count(old) == 1, f"{text.count(old)} places of {old!r}"
        text = text.replace(old, new)
    (folder / file.name).write_text(text)
    sizes = ["--num-steps", 32, "--per-rank-batch-size", 32, "--update-epochs", 2, "--eval-episodes", 2]
    command = [*LAUNCHERS[file](ranks), file.name, *sizes, "--total-timesteps", 512, *switches, *flags]
    return Command(command, cwd=folder).finish()


def trained(folder: Path) -> dict:
    """The parameters at the end of a run."""
    return torch.load(max(folder.rglob("step-*.pt")))["agent"]


@MODE_BUT_COMPILE
def test_a_frozen_network_stays_as_it_is(tmp_path, mode):
    frozen = CRITIC + "        self.frozen = nn.Linear(num_features, 1).requires_grad_(False)\n"
    values = 'outputs["values"] = self.critic(features).squeeze(-1)'
    status, output = hack(
        tmp_path,
        mode,
        (CRITIC, frozen + "        nn.init.ones_(self.frozen.weight)\n"),
        (values, values + ' + self.frozen(features).squeeze(-1)'),
        ("        if args.ortho_init:\n", "        if False:\n"),
    )  # fmt: skip
    assert status == 0, output
    assert (trained(tmp_path)["frozen.weight"] == 1).all()


@MODE_BUT_COMPILE
def test_groups_of_parameters_have_learning_rates_of_their_own(tmp_path, mode):
    two = (
        '    groups = [{"params": list(agent.actor.parameters()), "lr": args.learning_rate, "name": "actor"}]\n'
        '    groups += [{"params": list(agent.critic.parameters()), "lr": 0.0, "name": "critic"}]\n'
    )
    ones = "        nn.init.ones_(self.actor[-1].bias)\n        nn.init.ones_(self.critic[-1].bias)\n"
    own = "        # layers of your own go here"
    status, output = hack(tmp_path, mode, (GROUPS, two), (own, ones + own))
    assert status == 0, output
    assert (trained(tmp_path)["critic.4.bias"] == 1).all() and (trained(tmp_path)["actor.4.bias"] != 1).all()


GROUPS_THAT_DO_NOT_FIT = {
    "one left out": '    groups = [{"params": list(agent.actor.parameters())}]\n',
    "one twice": '    groups = [{"params": list(agent.parameters())}, {"params": list(agent.critic.parameters())}]\n',
}


@pytest.mark.parametrize("case", GROUPS_THAT_DO_NOT_FIT)
@pytest.mark.parametrize("mode", [pytest.param(mode, marks=SLOW) if mode != "eager" else mode for mode in FAST])
def test_groups_of_parameters_that_do_not_fit_are_refused(tmp_path, mode, case):
    status, output = hack(tmp_path, mode, (GROUPS, GROUPS_THAT_DO_NOT_FIT[case]))
    assert status != 0 and "each parameter that requires a gradient must be in one group" in output, output


@pytest.mark.parametrize("mode", [pytest.param(mode, marks=SLOW) if mode != "eager" else mode for mode in FAST])
def test_a_column_with_the_name_of_a_computed_one_is_refused(tmp_path, mode):
    column = '        "terminations": np.zeros(shape, bool),\n'
    status, output = hack(tmp_path, mode, (column, column + '        "returns": np.zeros(shape, np.float32),\n'))
    assert status != 0 and "make_batch computes {'returns'}" in output, output


@MODE
def test_a_new_column_and_a_new_metric_reach_loss_and_log(tmp_path, mode):
    column = '        "terminations": np.zeros(shape, bool),\n'
    filled = '        rollout["terminations"][t] = terminations\n'
    metric = '        "entropy_loss": entropy_loss,\n'
    status, output = hack(
        tmp_path,
        mode,
        (column, column + '        "positions": np.zeros(shape, np.float32),\n'),
        (filled, filled + '        rollout["positions"][t] = rollout["obs"][t, :, 0]\n'),
        (metric, metric + '        "mismatch": (minibatch["positions"] - minibatch["obs"][:, 0]).abs() @ weights,\n'
                          '        "size": minibatch["positions"].abs() @ weights,\n'),
    )  # fmt: skip
    assert status == 0, output
    logs = scalars(tmp_path)
    assert {value for _, value in logs["Loss/mismatch"]} == {0} and min(value for _, value in logs["Loss/size"]) > 0


@MODE
def test_an_action_of_the_wrong_width_is_an_error(tmp_path, mode):
    mean = '        mean = outputs["mean"]\n'
    width = "self.num_actions = math.prod(action_space.shape)"
    status, output = hack(
        tmp_path,
        mode,
        (width, "self.num_actions = 1"),
        (mean, mean.replace('outputs["mean"]', 'outputs["mean"] + np.zeros((1, 2), np.float32)')),
        flags=("--env-id", "toy_envs:NanObsBox-v0"),
    )
    assert status != 0 and "Agent.sample returns (4, 2), not (4, 1)" in output, output
    assert not list(tmp_path.rglob("step-*.pt"))


@MODE
def test_a_layer_in_forward_alone_is_an_error(tmp_path, mode):
    """The network that acts does not have it."""
    policy = "outputs = self.policy(self.actor(features), minibatch, self.mask_or_log_std())"
    status, output = hack(
        tmp_path,
        mode,
        (CRITIC, CRITIC + "        self.extra = nn.Linear(num_outputs, num_outputs)\n"),
        (policy, "outputs = self.policy(self.extra(self.actor(features)), minibatch, self.mask_or_log_std())"),
    )
    assert status != 0 and "what acted differs from Agent.forward in logits" in output, output
    assert not list(tmp_path.rglob("step-*.pt"))


@pytest.mark.parametrize(
    "mode", ["compile", *(pytest.param(f"{file}, compile", marks=SLOW) for file in ("Fabric", "decoupled"))]
)
def test_what_cannot_be_compiled_fails_with_the_whole_exception(tmp_path, mode):
    loss = "    entropy_loss = -outputs"
    status, output = hack(tmp_path, mode, (loss, f"    print(float(weights.sum()))\n{loss}"))
    assert status != 0 and "print(float(weights.sum()))" in output and "torch._dynamo" in output, output
    assert not list(tmp_path.rglob("step-*.pt"))


@pytest.mark.parametrize(
    "mode", ["eager", "tcp", "ddp", *(pytest.param(m, marks=SLOW) for m in ("Fabric", "Fabric, tcp"))]
)
def test_all_ranks_know_the_folder_of_the_run(tmp_path, mode):
    start = "    is_stopping = False\n"
    saves = (
        start + '    os.makedirs(run_dir, exist_ok=True)\n    np.savez(f"{run_dir}/rollout-{rank}.npz", **rollout)\n'
    )
    status, output = hack(tmp_path, mode, (start, saves))
    assert status == 0, output
    (folder,) = {path.parent for path in tmp_path.rglob("events.*")}
    assert len(list(folder.glob("rollout-*.npz"))) == MODES[mode][1]


@EAGER
def test_one_place_sees_every_scalar(tmp_path, mode):
    add = "        values = [Summary.Value("
    rows = (
        '        with open("scalars.csv", "a") as file:\n'
        '            file.writelines(f"{global_step},{name},{value}\\n" for name, value in metrics.items())\n'
    )
    status, output = hack(tmp_path, mode, (add, rows + add), flags=("--eval-every", 1))
    assert status == 0, output
    with (tmp_path / "scalars.csv").open() as file:
        points = {(tag, int(step)) for step, tag, _ in csv.reader(file)}
    (events,) = {path.parent for path in tmp_path.rglob("events.*")}
    log = EventAccumulator(str(events), size_guidance={"scalars": 0}).Reload()
    assert points == {(tag, point.step) for tag in log.Tags()["scalars"] for point in log.Scalars(tag)}
    assert len(points) > 20


# the ten changes of docs/hacks, applied as a reader would


PATCHES = sorted((ROOT / "docs" / "hacks").glob("*.diff"))
EFFECTS = {}


def effect(*flags):
    """Register what the run of a patch has to show, and the flags of that run."""

    def register(check):
        EFFECTS[check.__name__.replace("_", "-")] = (check, flags)
        return check

    return register


def values(folder: Path, tag: str) -> list[float]:
    return [value for _, value in scalars(folder)[tag]]


def initial(folder: Path, file: Path) -> dict:
    """The parameters of a new agent of the changed file."""
    module = load(str(folder / file.name))
    args = module.Args(**{name: value for name, value in last_args(folder).items() if hasattr(module.Args, name)})
    envs, *_ = module.make_envs(args, 1, 0)
    torch.manual_seed(args.seed)
    return module.Agent(envs.single_observation_space, envs.single_action_space, args).state_dict()


def last_args(folder: Path) -> dict:
    return torch.load(max(folder.rglob("step-*.pt")))["args"]


@effect("--eval-every", 2)
def csv_log(folder, file, run_again):
    run_again("--total-timesteps", 1024, "--resume", "auto")
    (path,) = folder.rglob("scalars.csv")
    with path.open() as rows:
        points = [(tag, int(step)) for step, tag, _ in csv.reader(rows)]
    log = EventAccumulator(str(path.parent), size_guidance={"scalars": 0}).Reload()
    logged = {(tag, point.step) for tag in log.Tags()["scalars"] for point in log.Scalars(tag)}
    assert set(points) == logged and len(points) == len(logged) > 40


@effect("--total-timesteps", 4096)
def rnd(folder, file, run_again):
    before, after = initial(folder, file), trained(folder)
    for name, tensor in after.items():
        if "rnd_" in name:
            assert torch.allclose(tensor, before[name], atol=1e-5) == ("target" in name), name
    losses = values(folder, "Loss/rnd_loss")
    assert losses[-1] < losses[0] / 2 and min(values(folder, "Loss/bonus")) > 0


@effect("--critic-learning-rate", 0.0)
def two_learning_rates(folder, file, run_again):
    before, after = initial(folder, file), trained(folder)
    for name, tensor in after.items():
        assert torch.allclose(tensor, before[name], atol=1e-5) == name.startswith("critic"), name
    assert set(values(folder, "Info/critic_learning_rate")) == {0.0}


@effect("--env-id", "toy_envs:Masked-v0")
def action_masks(folder, file, run_again):
    """The environment raises an exception at an action that is not valid; of five two are."""
    assert max(values(folder, "Info/entropy")) <= np.log(2) + 1e-6


@effect("--env-id", "toy_envs:Clock-v0", "--update-epochs", 1, "--per-rank-batch-size", 128, "--total-timesteps", 2048)
def beta_policy(folder, file, run_again):
    after = trained(folder)
    assert "log_std" not in after and len(after["actor.4.bias"]) == 2
    if "decoupled" not in file.stem:  # what is logged of the first step is of the policy that acted
        assert max(map(abs, values(folder, "Loss/approx_kl"))) < 1e-5


@effect("--total-timesteps", 4096)
def next_observation(folder, file, run_again):
    losses = values(folder, "Loss/next_loss")
    assert losses[-1] < losses[0] / 2


@effect("--desired-kl", 0.002)
def kl_adaptive_rate(folder, file, run_again):
    run_again("--desired-kl", 0.002, "--total-timesteps", 1024, "--resume", "auto")
    rates, divergences = values(folder, "Info/learning_rate"), values(folder, "Loss/approx_kl")
    assert len(rates) > 3 and len(set(rates)) > 1
    for rate, divergence, following in zip(rates, divergences, rates[1:], strict=False):
        factor = 1 / 1.5 if divergence > 0.004 else 1.5 if divergence < 0.001 else 1
        assert following == pytest.approx(min(max(rate * factor, 1e-5), 1e-2), rel=1e-5)


@effect()
def saved_rollouts(folder, file, run_again):
    paths = sorted(folder.rglob("rollout-*.npz"))
    ranks = {path.stem.split("-")[2] for path in paths}
    assert len(paths) == 512 // (4 * 32) and all(np.load(path)["obs"].shape == (33, 4, 4) for path in paths)
    assert len({np.load(path)["obs"].tobytes() for path in paths}) == len(paths) and "0" in ranks


@effect()
def observation_history(folder, file, run_again):
    assert trained(folder)["actor.0.weight"].shape == (64, 16)


@effect()
def gru(folder, file, run_again):
    before, after = initial(folder, file), trained(folder)
    assert not torch.equal(before["memory.weight_hh"], after["memory.weight_hh"])


FOR_DECOUPLED = ("csv-log", "rnd", "action-masks", "next-observation")
CASES = [
    pytest.param(path.stem, mode, marks=SLOW if mode != "eager" else [])
    for path in PATCHES
    for mode in MODES
    if "decoupled" not in mode or path.stem in FOR_DECOUPLED
]


def test_there_are_ten_patches():
    assert {path.stem for path in PATCHES} == EFFECTS.keys() and len(PATCHES) == 10


@pytest.mark.parametrize("name, mode", CASES)
def test_a_patch_applies_and_does_what_it_is_for(tmp_path, name, mode):
    file, ranks, switches = MODES[mode]
    (tmp_path / file.name).write_text(file.read_text())
    patch = ROOT / "docs" / "hacks" / f"{name}.diff"
    subprocess.run(["patch", "--fuzz=0", "--silent", file.name, patch], cwd=tmp_path, check=True)
    check, flags = EFFECTS[name]

    def run_again(*flags):
        sizes = ["--num-steps", 32, "--per-rank-batch-size", 32, "--update-epochs", 2, "--eval-episodes", 2]
        command = [*LAUNCHERS[file](ranks), file.name, *sizes, "--total-timesteps", 512, *switches, *flags]
        status, output = Command(command, cwd=tmp_path).finish()
        assert status == 0, output

    run_again(*flags)
    check(tmp_path, file, run_again)


MEMORY = """
import gymnasium as gym
import numpy as np


class Cue(gym.Env):
    '''The first observation says which action is paid at the end; those after it say only the time.'''

    def __init__(self):
        self.observation_space, self.action_space = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time, self.cue = 0, int(self.np_random.integers(2))
        return np.array([2 * self.cue - 1, 0], np.float32), {}

    def step(self, action):
        self.time += 1
        over = self.time == 6
        return np.array([0, self.time / 6], np.float32), float(over and action == self.cue), over, False, {}


gym.register("Cue-v0", Cue)
"""


@pytest.mark.slow
def test_the_gru_remembers(tmp_path):
    (tmp_path / "cue.py").write_text(MEMORY)
    flags = ["--env-id", "cue:Cue-v0", "--num-envs", 16, "--total-timesteps", 60000, "--eval-episodes", 100]
    returns = []
    for name in ("shipped", "gru"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / TORCH.name).write_text(TORCH.read_text())
        if name == "gru":
            patch = ROOT / "docs" / "hacks" / "gru.diff"
            subprocess.run(["patch", "--fuzz=0", "--silent", TORCH.name, patch], cwd=folder, check=True)
        command = Command([*LAUNCHERS[TORCH](1), TORCH.name, *flags], cwd=folder, PYTHONPATH=str(tmp_path))
        status, output = command.finish(600)
        assert status == 0, output
        returns.append(values(folder, "Test/cumulative_reward")[-1])
    assert returns[0] < 0.8 and returns[1] > 0.95
