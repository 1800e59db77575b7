"""Kinds of fault that people ran into with programs like these: each ends as it should, with a line that names it."""

import re
import signal
import sys
import threading

import gymnasium as gym
import numpy as np
import pytest

import ppo_torch_ddp as ppo
from launch import ROOT, Command, free_port, real_torchrun, run
from test_launch import (
    DECOUPLED,
    FABRIC,
    LAUNCHERS,
    NAMES,
    SLOW,
    SMALL,
    TORCH,
    fewest_ranks,
    last_line,
    scalars,
)
from toy_envs import FITS, MISFITS

EACH = pytest.mark.parametrize(
    "file", [TORCH, *(pytest.param(file, marks=SLOW) for file in (FABRIC, DECOUPLED))], **NAMES
)
ROLLOUT = [*SMALL, "--total-timesteps", 512]
ASYNC = ["--vec-env", "async"]


def start(file, folder, *flags, ranks: int | None = None, **env: str) -> tuple[int, str]:
    """Status and output of a run of a few rollouts."""
    return Command([*LAUNCHERS[file](ranks or fewest_ranks(file)), file, *ROLLOUT, *flags], folder, **env).finish()


def checkpoints(folder) -> list:
    return sorted(folder.rglob("step-*.pt"))


# A: trained, then lost


@EACH
def test_an_evaluation_that_would_not_end_says_so_and_ends(tmp_path, file):
    """CliffWalking has no time limit, and a greedy agent walks against a wall for ever."""
    status, output = start(file, tmp_path, "--env-id", "CliffWalking-v1", "--eval-max-steps", 200)
    assert status == 0 and checkpoints(tmp_path), output
    before, after = output.split("evaluating 2 episodes")
    assert "evaluation cut short: 2 episodes go on after --eval-max-steps" in after and "return nan" in before
    ((_, logged),) = scalars(tmp_path)["Test/cumulative_reward"]
    assert logged <= -200  # -1 a step, -100 for the cliff


@EACH
def test_an_environment_of_which_there_may_be_one(tmp_path, file):
    kwargs = f'{{"port":{free_port()}}}'
    flags = ["--env-id", "toy_envs:Only-v0", "--env-kwargs", kwargs, "--num-envs", 1, "--eval-episodes", 1]
    status, output = start(file, tmp_path, *flags)
    assert status == 0 and "greedy return 10.00" in output, output
    status, output = start(file, tmp_path, *flags, *ASYNC)
    assert status == 0 and "greedy return 10.00" in output, output


def test_a_return_that_is_not_finite_is_no_best_one(tmp_path):
    kwargs = '{"raises":false,"reward":NaN}'
    flags = ["--env-id", "toy_envs:Evaluated-v0", "--env-kwargs", kwargs, "--eval-every", 1, "--eval-max-steps", 20]
    status, output = start(TORCH, tmp_path, *flags)
    assert status == 0 and "greedy return nan" in output, output
    assert checkpoints(tmp_path) and not list(tmp_path.rglob("best.pt"))


# B: the cause is the last line


@EACH
def test_the_last_line_names_the_cause_with_environments_in_processes(tmp_path, file):
    status, output = start(file, tmp_path, "--env-id", "toy_envs:NanReward-v0", *ASYNC)
    assert status != 0 and "iteration 1: not finite: rewards of rank 0" in last_line(output), output
    assert "Traceback" not in output.partition("=" * 20)[0], output


@pytest.mark.parametrize("raises", [False, True])
def test_environments_may_start_processes_and_none_is_left(tmp_path, raises):
    """`Command` sees to it that none is left."""
    kwargs = f'{{"raises":{str(raises).lower()}}}'
    status, output = start(TORCH, tmp_path, "--env-id", "toy_envs:Starts-v0", "--env-kwargs", kwargs, *ASYNC)
    if raises:
        assert status != 0 and output.splitlines()[-1] == "RuntimeError: the simulator broke", output
    else:
        assert status == 0 and "greedy return 10.00" in output, output


# C: what a vector of environments would cast or broadcast


@pytest.mark.parametrize("vec_env", ["sync", "async"])
@pytest.mark.parametrize("name", MISFITS)
def test_observations_that_do_not_fit_their_space_are_named(name, vec_env):
    with pytest.raises(SystemExit) as error:
        ppo.make_envs(ppo.Args(env_id=f"toy_envs:{name}-v0", vec_env=vec_env), 2, 0)
    assert re.fullmatch(f"error: .*{re.escape(MISFITS[name][2])}.*", error.value.code)


@pytest.mark.parametrize("vec_env", ["sync", "async"])
@pytest.mark.parametrize("name", FITS)
def test_observations_that_fit_their_space_in_another_form_work(name, vec_env):
    envs, *_ = ppo.make_envs(ppo.Args(env_id=f"toy_envs:{name}-v0", vec_env=vec_env), 2, 0)
    obs, *_ = envs.step(envs.action_space.sample())
    shown = gym.spaces.flatten(*FITS[name]) if not isinstance(FITS[name][0], gym.spaces.Box) else FITS[name][1]
    np.testing.assert_allclose(obs, np.stack([shown, shown]))
    envs.close()


@pytest.mark.parametrize("vec_env", ["sync", "async"])
@pytest.mark.parametrize("form", ["array", "0-d", "int", "two"])
def test_a_reward_is_one_number(form, vec_env):
    kwargs = f'{{"form":"{form}"}}'
    envs, *_ = ppo.make_envs(ppo.Args(env_id="toy_envs:Pays-v0", env_kwargs=kwargs, vec_env=vec_env), 2, 0)
    if form == "two":
        with pytest.raises(ValueError, match=r"the reward has the shape \(2,\): it must be one number"):
            envs.step(envs.action_space.sample())
    else:
        assert envs.step(envs.action_space.sample())[1].tolist() == [1, 1]
    envs.close()


# D: infos that nobody reads


@pytest.mark.parametrize("vec_env", ["sync", "async"])
def test_infos_of_any_form_do_not_matter(vec_env):
    envs, *_ = ppo.make_envs(ppo.Args(env_id="toy_envs:Informs-v0", vec_env=vec_env), 4, 0)
    for _ in range(30):
        *_, infos = envs.step(envs.action_space.sample())
        assert not infos
    envs.close()


# E: numbers of a large range


EIGHT_BIT = {
    "vector": gym.spaces.Box(0, 255, (128,), np.uint8),
    "small image": gym.spaces.Box(0, 255, (8, 8, 3), np.uint8),
    "dict": gym.spaces.Dict({"img": gym.spaces.Box(0, 255, (40, 40, 3), np.uint8), "v": gym.spaces.Box(-1, 1, (2,))}),
}


@pytest.mark.parametrize("name", EIGHT_BIT)
def test_eight_bit_numbers_become_fractions(name):
    space = EIGHT_BIT[name]
    flat_space = space if name != "dict" else gym.spaces.flatten_space(space)
    agent = ppo.Agent(flat_space, gym.spaces.Discrete(2), ppo.Args())
    space.seed(0)
    sample = space.sample()
    numbers = np.concatenate(
        [x.ravel() / (255 if x.dtype == np.uint8 else 1) for x in getattr(sample, "values", lambda: [sample])()]
    )
    flat = gym.spaces.flatten(space, sample)[None] if name == "dict" else sample[None]
    seen = agent.from_env(flat, {})["obs"]
    assert seen.dtype == np.float32
    np.testing.assert_allclose(seen[0], numbers, rtol=1e-6)


DESCRIPTIONS = [
    ("CartPole-v1", [], "observation: Box -> 4 numbers -> MLP 64-64", False),
    ("toy_envs:Dict-MultiDiscrete-v0", ["--hidden-sizes", 32], "observation: Dict -> 9 numbers -> MLP 32", False),
    ("toy_envs:ChannelsLast-Box-v0", [], "observation: Box -> Nature CNN", False),
    ("toy_envs:ImageObs-v0", [], "observation: Box -> 192 numbers -> MLP 64-64", False),
    ("toy_envs:Thousands-v0", [], "observation: Box -> 2 numbers -> MLP 64-64", True),
    ("toy_envs:Thousands-v0", ["--normalize-obs"], "observation: Box -> 2 numbers -> MLP 64-64", False),
]


@pytest.mark.parametrize("env_id, flags, line, is_large", DESCRIPTIONS)
def test_the_first_line_says_which_network_sees_what(capsys, env_id, flags, line, is_large):
    import tyro

    args = tyro.cli(ppo.Args, args=["--env-id", env_id, *map(str, flags)])
    envs, *_ = ppo.make_envs(args, 1, 0)
    ppo.describe(envs, ppo.Agent(envs.single_observation_space, envs.single_action_space, args), args)
    first, *rest = capsys.readouterr().out.splitlines()
    assert first == line and ["--normalize-obs" in text for text in rest] == [True] * is_large


@EACH
def test_each_file_says_which_network_sees_what(tmp_path, file):
    status, output = start(file, tmp_path, "--env-id", "toy_envs:Thousands-v0")
    assert (
        status == 0 and output.count("observation: Box -> 2 numbers") == output.count("--normalize-obs may help") == 1
    )


# F: another launcher


LAUNCHER_VARIABLES = [{"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, {"OMPI_COMM_WORLD_SIZE": "2"}, {"PMI_SIZE": "4"}]
LAUNCHER_VARIABLES += [{"SLURM_NTASKS_PER_NODE": "2"}]


@pytest.mark.parametrize("env", LAUNCHER_VARIABLES, ids=lambda env: next(iter(env)))
@EACH
def test_a_launcher_that_would_start_single_runs_is_refused(tmp_path, file, env):
    status, output = Command([sys.executable, file], tmp_path, **env).finish()
    assert status != 0 and re.fullmatch(r"error: \w+ is \d: start .* torchrun.*", last_line(output)), output
    assert len(output.splitlines()) == 1, output


def test_torchrun_below_another_launcher_works(tmp_path):
    status, output = start(TORCH, tmp_path, ranks=2, SLURM_NTASKS="2", SLURM_PROCID="0")
    assert status == 0 and "2 ranks" in output, output


# G: sys.exit in an environment


@pytest.mark.parametrize("vec_env", ["sync", "async"])
@pytest.mark.parametrize("where", ["step", "reset"])
@EACH
def test_sys_exit_in_an_environment_is_an_error(tmp_path, file, where, vec_env):
    flags = ["--env-id", "toy_envs:Exits-v0", "--env-kwargs", f'{{"where":"{where}"}}', "--vec-env", vec_env]
    status, output = start(file, tmp_path, *flags)
    assert status != 0 and "RuntimeError: the environment has called sys.exit(0)" in output, output
    assert not checkpoints(tmp_path)


@pytest.mark.slow
def test_sys_exit_of_one_rank_restarts_all(tmp_path):
    launcher = [*real_torchrun(2), "--max-restarts=1"]
    flags = ["--env-id", "toy_envs:Exits-v0", "--env-kwargs", '{"where":"step","rank":1}']
    status, output = Command([*launcher, TORCH, *ROLLOUT, *flags], tmp_path).finish()
    assert status != 0 and output.count("RuntimeError: the environment has called sys.exit(0)\n") >= 2, output


# H: memory


def test_a_video_has_an_end(tmp_path, monkeypatch):
    monkeypatch.setattr(ppo, "MAX_FRAMES", 50)
    args = ppo.Args(env_id="toy_envs:Filmed-v0", capture_video=True)
    envs, *_ = ppo.make_envs(args, 1, 0, str(tmp_path))
    for _ in range(200):
        envs.step(envs.action_space.sample())
    assert len(envs.envs[0].env.recorded_frames) == 50
    envs.close()
    (path,) = tmp_path.glob("*.mp4")
    assert path.stat().st_size > 500


PEAK = """
import resource, sys
sys.path.insert(0, {root!r})
import ppo_torch_ddp as ppo
ppo.main(ppo.Args({flags}))
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def test_memory_of_a_rollout_of_images(tmp_path):
    """At most 2.5 times the rollout and 0.6 GB."""
    flags = "env_id='toy_envs:LargeImage-v0', num_envs=8, num_steps=512, total_timesteps=4096, update_epochs=2, "
    flags += "per_rank_batch_size=256, eval_episodes=0, hidden_sizes=()"
    script = tmp_path / "peak.py"
    script.write_text(PEAK.format(root=str(ROOT), flags=flags))
    output = run([sys.executable, script], cwd=tmp_path, timeout=300)
    rollout = 513 * 8 * 84 * 84 * 4
    peak = int(output.split("peak ")[-1])
    print(f"rollout {rollout / 1e9:.2f} GB, peak {peak / 1e9:.2f} GB")
    assert peak <= 2.5 * rollout + 0.6e9


# I: used as a module


def test_main_leaves_the_process_as_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["notebook", "--no-such-flag"])
    flags = {"total_timesteps": 512, "num_steps": 32, "per_rank_batch_size": 32, "eval_episodes": 2}
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for _ in range(2):  # twice in a process
        ppo.main(ppo.Args(**flags))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert len({path.parent for path in checkpoints(tmp_path)}) == 2

    failures = []

    def in_a_thread() -> None:
        try:
            ppo.main(ppo.Args(**flags))
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=in_a_thread)
    thread.start()
    thread.join()
    assert not failures and len({path.parent for path in checkpoints(tmp_path)}) == 3


def test_main_restores_the_signals_of_a_run_that_fails(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(SystemExit, match="not finite"):
        ppo.main(ppo.Args(env_id="toy_envs:NanReward-v0", vec_env="async"))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_main_evaluates_with_the_arguments_that_it_is_given(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["notebook", "--eval-episodes", "7"])
    flags = {"total_timesteps": 512, "num_steps": 32, "per_rank_batch_size": 32, "eval_episodes": 2}
    ppo.main(ppo.Args(**flags, hidden_sizes=(16,)))
    path = str(checkpoints(tmp_path)[0])
    capsys.readouterr()
    ppo.main(ppo.Args(evaluate=path, eval_episodes=5, hidden_sizes=(16,)))
    assert "evaluating 5 episodes" in capsys.readouterr().out
    args = ppo.trained_args(path)
    assert (args.eval_episodes, args.hidden_sizes, args.evaluate) == (2, (16,), path)


# J: one dimension without bounds


def test_each_dimension_of_an_action_is_rescaled_by_itself():
    huge = np.array([2000, np.inf, 1e38, 3], np.float32)
    low = np.array([0, -np.inf, -1e38, -1], np.float32)
    agent = ppo.Agent(gym.spaces.Box(-1, 1, (2,)), gym.spaces.Box(low, huge), ppo.Args())
    np.testing.assert_allclose(agent.to_env(np.zeros((1, 4), np.float32)), [[1000, 0, 0, 1]])
    np.testing.assert_allclose(agent.to_env(np.full((1, 4), 0.5, np.float32)), [[1500, 0.5, 0.5, 2]])


def test_integer_actions_of_a_box_are_rescaled_without_overflow():
    agent = ppo.Agent(gym.spaces.Box(-1, 1, (2,)), gym.spaces.Box(-128, 127, (2,), np.int8), ppo.Args())
    np.testing.assert_array_equal(agent.to_env(np.array([[-1.0, 1.0]])), [[-128, 127]])


# smaller ones


WORDS = [
    ("--total-timesteps 1e6", "--total-timesteps INT"),
    ("--hidden-sizes 64,64", "--hidden-sizes [INT [INT ...]]"),
    ("--cuda False", "--no-flag"),
    ("--anneal-lr True", "--no-flag"),
]


@pytest.mark.parametrize("flags, said", WORDS)
def test_a_value_in_another_form_is_answered_with_the_right_one(tmp_path, flags, said):
    status, output = Command([sys.executable, TORCH, *flags.split()], tmp_path).finish()
    assert status != 0 and said in output, output


def test_a_run_that_goes_on_says_its_learning_rate(tmp_path):
    start(TORCH, tmp_path)
    status, output = start(TORCH, tmp_path, "--total-timesteps", 1024, "--resume", "auto")
    assert status == 0 and re.search(r"step 640 of 1024: .*learning_rate 0.0005", output), output


def test_ctrl_c_in_the_final_evaluation_says_so(tmp_path, monkeypatch, capsys):
    agent = ppo.Agent(gym.spaces.Box(-1, 1, (4,)), gym.spaces.Discrete(2), ppo.Args())
    ppo.evaluate(agent, ppo.Args(), None, [0.0])
    assert "evaluation cut short: 10 episodes go on after --eval-max-steps or at a signal" in capsys.readouterr().out


def test_infinite_observations_get_a_remedy():
    with pytest.raises(SystemExit, match="not finite: observations of rank 1; a wrapper in make_env may help"):
        ppo.check_finite({"observations": np.array([0.0, np.inf])}, 3)


def test_resuming_nothing_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ppo.open_run(ppo.Args(resume="auto"), "logs")
    assert "no checkpoint" in capsys.readouterr().out


def test_evaluating_no_episodes_now_and_then_is_no_error(tmp_path):
    status, output = start(TORCH, tmp_path, "--eval-every", 1, "--eval-episodes", 0)
    assert status == 0, output


def test_another_activation_is_refused_when_resuming(tmp_path):
    start(TORCH, tmp_path)
    status, output = start(TORCH, tmp_path, "--resume", "auto", "--activation-function", "relu")
    assert status != 0 and "was trained with activation_function tanh" in last_line(output), output
