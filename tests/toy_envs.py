"""Environments whose right answer is known, registered as `toy_envs:NAME-v0`."""

import multiprocessing
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np


class OneAStep(gym.Env):
    """Pays 1 each step. Observes the fraction of `length` that has passed, or a constant where `timeless`."""

    action_space = gym.spaces.Discrete(2)
    observation_space = gym.spaces.Box(0, 1, (1,), np.float32)

    def __init__(self, length: int = 10, timeless: bool = False, terminates: bool = True):
        self.length, self.timeless, self.terminates = length, timeless, terminates

    def observe(self) -> np.ndarray:
        return np.array([1.0 if self.timeless else self.steps / self.length], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.observe(), {}

    def step(self, action):
        self.steps += 1
        ended = self.steps == self.length
        return self.observe(), 1.0, ended and self.terminates, ended and not self.terminates, {}


class Diary(OneAStep):
    """Writes the seed of each seeded reset into the folder `$DIARY`, one file an environment."""

    def reset(self, *, seed=None, options=None):
        if seed is not None and "DIARY" in os.environ:
            Path(os.environ["DIARY"], f"{os.environ.get('RANK', 0)}-{id(self)}").write_text(str(seed))
        return super().reset(seed=seed, options=options)


class Broken(OneAStep):
    """Goes wrong at its fifth step: a NaN in the observation or the reward, or an exception on one rank."""

    def __init__(self, how: str, action_space: gym.Space = OneAStep.action_space, rank: int = 1):
        super().__init__()
        self.how, self.action_space, self.rank = how, action_space, rank

    def step(self, action):
        assert action in self.action_space, action
        obs, reward, terminated, truncated, info = super().step(action)
        if self.steps == 5 and self.how == "raises" and os.environ["RANK"] == str(self.rank):
            raise RuntimeError("the simulator broke")
        if self.steps == 5 and self.how == "obs":
            obs = np.full_like(obs, np.nan)
        if self.steps == 5 and self.how == "reward":
            reward = np.nan
        return obs, reward, terminated, truncated, info


class Evaluated(OneAStep):
    """Sound, but those that an evaluation makes after a process's first four raise an exception, or never end."""

    made = 0

    def __init__(self, raises: bool, reward: float = 1.0):
        super().__init__()
        Evaluated.made += 1
        self.raises, self.reward, self.is_sound = raises, reward, Evaluated.made <= 4

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        if not self.is_sound and self.raises:
            raise RuntimeError("the simulator broke")
        if not self.is_sound:
            reward = self.reward
        return obs, reward, terminated and self.is_sound, truncated and self.is_sound, info


class Lives(OneAStep):
    """A game of three lives, four steps each, that pays 5 a step; a lost life ends an episode, as in Atari training."""

    lives = 0

    def reset(self, *, seed=None, options=None):
        self.lives = self.lives or 3
        obs, _ = super().reset(seed=seed)
        return obs, {"lives": self.lives}

    def step(self, action):
        obs, _, _, _, _ = super().step(action)
        lost = self.steps == 4
        self.lives -= lost
        return obs, 5.0, lost, False, {"lives": self.lives}


class Noted(OneAStep):
    """Makes a file `rollout-N` in the working directory when it has taken so many steps, N times; never ends."""

    def __init__(self, num_steps: int):
        super().__init__(length=10**9)
        self.num_steps = num_steps

    def step(self, action):
        result = super().step(action)
        if self.steps % self.num_steps == 0:
            Path(f"rollout-{self.steps // self.num_steps}").touch()
        return result


class Clock(OneAStep):
    """Its state is the count of steps, which it shows and asks for; truncated episodes."""

    action_space = gym.spaces.Box(-2, 2, (1,), np.float32)
    observation_space = gym.spaces.Box(-3, 3, (2,), np.float32)

    def observe(self):
        return np.array([3 * np.sin(self.steps), np.cos(2 * self.steps)], np.float32)

    def step(self, action):
        obs, _, _, truncated, info = super().step(action)
        return obs, -abs(float(action[0]) - np.sin(self.steps)), False, truncated, info


class WrongShape(OneAStep):
    """Observes two numbers in place of one at its fifth step."""

    def observe(self):
        return super().observe().repeat(1 + (self.steps == 5))


class Dies(OneAStep):
    """Its process ends at the fifth step, as when a simulator crashes: for AsyncVectorEnv."""

    def step(self, action):
        if self.steps == 5:
            os.kill(os.getpid(), 9)
        return super().step(action)


class Hangs(OneAStep):
    """Never comes back from its fifth step."""

    def step(self, action):
        while self.steps == 5:
            time.sleep(1)
        return super().step(action)


class Puzzle(gym.Env):
    """Shows one of four observations of a space at random and pays how near the action is to the one that it asks for.

    From 0 to 1 a step: the share of the numbers that are right for finite spaces, 1 less the mean distance in units of
    half the range for Box. Episodes have ten steps.
    """

    def __init__(self, observation_space: gym.Space, action_space: gym.Space):
        self.observation_space, self.action_space = observation_space, action_space
        observation_space.seed(0)
        action_space.seed(0)
        self.shown = [observation_space.sample() for _ in range(4)]
        draws = [[action_space.sample() for _ in range(4)] for _ in range(200)]
        self.right = max(draws, key=lambda actions: np.std(actions, axis=0).mean())  # far from any constant action

    def observe(self):
        self.which = int(self.np_random.integers(4))
        return self.shown[self.which]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.observe(), {}

    def step(self, action):
        self.steps += 1
        assert action in self.action_space, action
        right = self.right[self.which]
        if isinstance(self.action_space, gym.spaces.Box):
            half_range = (self.action_space.high - self.action_space.low) / 2
            reward = 1.0 - float(np.mean(np.abs(action - right) / half_range))
        else:
            reward = float(np.mean(np.equal(action, right)))
        return self.observe(), reward, False, self.steps == 10, {}


class Masked(OneAStep):
    """Of five actions two are valid, other ones each step, as its infos say."""

    action_space = gym.spaces.Discrete(5)

    def info(self) -> dict:
        self.valid = self.np_random.permutation(5) < 2
        return {"action_mask": self.valid.astype(np.int8)}

    def reset(self, *, seed=None, options=None):
        obs, _ = super().reset(seed=seed)
        return obs, self.info()

    def step(self, action):
        assert self.valid[action]
        obs, reward, terminated, truncated, _ = super().step(action)
        return obs, reward, terminated, truncated, self.info()


class Shows(OneAStep):
    """Shows what does not, or hardly, fit the space that it declares."""

    def __init__(self, space: gym.Space, shown: object):
        super().__init__()
        self.observation_space, self.shown = space, shown

    def observe(self):
        return self.shown


class Pays(OneAStep):
    """Pays 1 in one of the forms that simulators use."""

    def __init__(self, form: str):
        super().__init__()
        self.reward = {"array": np.ones(1), "0-d": np.float32(1), "int": 1, "two": np.ones(2)}[form]

    def step(self, action):
        obs, _, *rest = super().step(action)
        return obs, self.reward, *rest


class Informs(OneAStep):
    """Its infos have other shapes and types in each step and environment."""

    def reset(self, *, seed=None, options=None):
        obs, _ = super().reset(seed=seed)
        return obs, {"path": np.zeros(self.np_random.integers(1, 9))}

    def step(self, action):
        obs, reward, terminated, truncated, _ = super().step(action)
        number = self.np_random.integers(1, 9)
        info = {"path": np.zeros(number), "goal": None if number < 5 else 3, "nested": {"a": [0] * number}}
        return obs, reward, terminated, truncated, info


class Exits(OneAStep):
    """Calls sys.exit(0), as scripts made into environments do; `where` is step or reset."""

    def __init__(self, where: str, rank: int = 0):
        super().__init__()
        self.where, self.resets = where, 0
        self.is_other = os.environ.get("RANK", "0") != str(rank)

    def reset(self, *, seed=None, options=None):
        self.resets += 1
        if self.where == "reset" and self.resets == 2 and not self.is_other:
            sys.exit(0)
        return super().reset(seed=seed)

    def step(self, action):
        if self.where == "step" and self.steps == 5 and not self.is_other:
            sys.exit(0)
        return super().step(action)


class Only(OneAStep):
    """One at a time on a machine: it holds a port."""

    def __init__(self, port: int):
        super().__init__()
        self.socket = socket.socket()
        self.socket.bind(("localhost", port))

    def close(self):
        self.socket.close()


class Starts(OneAStep):
    """Starts two processes of its own, which its `close` ends; raises an exception at its fifth step if told to."""

    def __init__(self, raises: bool):
        super().__init__()
        self.raises = raises
        self.processes = [subprocess.Popen(["sleep", "1000"]), multiprocessing.Process(target=time.sleep, args=[1000])]
        self.processes[1].start()

    def step(self, action):
        if self.raises and self.steps == 5:
            raise RuntimeError("the simulator broke")
        return super().step(action)

    def close(self):
        for process in self.processes:
            process.kill()
        self.processes[0].wait()
        self.processes[1].join()


class Filmed(OneAStep):
    """Never ends, and shows a small picture."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}  # noqa: RUF012

    def __init__(self, render_mode: str | None = None):
        super().__init__(length=10**9)
        self.render_mode = render_mode

    def render(self) -> np.ndarray:
        return np.full((32, 32, 3), self.steps % 256, np.uint8)


class StrangeSpaces(OneAStep):
    def __init__(self, observation_space=None, action_space=None):
        super().__init__()
        self.observation_space = observation_space or self.observation_space
        self.action_space = action_space or self.action_space

    def observe(self):
        return self.observation_space.sample()


gym.register("Terminated-v0", OneAStep)
gym.register("Truncated-v0", OneAStep, kwargs={"timeless": True, "terminates": False})
gym.register("Diary-v0", Diary)
gym.register("NanObs-v0", Broken, kwargs={"how": "obs"})
gym.register("NanObsBox-v0", Broken, kwargs={"how": "obs", "action_space": gym.spaces.Box(-2, 2, (2,))})
gym.register("NanReward-v0", Broken, kwargs={"how": "reward"})
gym.register("Raises-v0", Broken, kwargs={"how": "raises"})
gym.register("Evaluated-v0", Evaluated)
gym.register("Masked-v0", Masked)
gym.register("Pays-v0", Pays)
gym.register("Informs-v0", Informs)
gym.register("Exits-v0", Exits)
gym.register("Only-v0", Only)
gym.register("Starts-v0", Starts)
gym.register("Filmed-v0", Filmed)
gym.register("Noted-v0", Noted)
gym.register("Clock-v0", Clock, kwargs={"length": 15, "terminates": False})
gym.register("WrongShape-v0", WrongShape)
gym.register("Dies-v0", Dies)
gym.register("Hangs-v0", Hangs)
gym.register("TextObs-v0", StrangeSpaces, kwargs={"observation_space": gym.spaces.Text(5)})
gym.register("ImageObs-v0", StrangeSpaces, kwargs={"observation_space": gym.spaces.Box(0, 255, (8, 8, 3), np.uint8)})
gym.register(
    "LargeImage-v0", StrangeSpaces, kwargs={"observation_space": gym.spaces.Box(0, 255, (84, 84, 4), np.uint8)}
)
gym.register("Thousands-v0", StrangeSpaces, kwargs={"observation_space": gym.spaces.Box(-5000, 5000, (2,))})
gym.register("TupleAction-v0", StrangeSpaces, kwargs={"action_space": gym.spaces.Tuple([gym.spaces.Discrete(2)])})
gym.register("Unbounded-v0", StrangeSpaces, kwargs={"action_space": gym.spaces.Box(-np.inf, np.inf, (2,))})
gym.register("Lives-v0", Lives)

spaces = gym.spaces
BYTES = spaces.Box(0, 255, (3,), np.uint8)
FLOATS = spaces.Box(-1, 1, (3,), np.float32)
BOTH = spaces.Dict({"a": FLOATS, "b": spaces.Discrete(3)})
MISFITS = {  # space, what is shown, and what the error names
    "Int64ForUint8": (BYTES, np.zeros(3, np.int64), "int64"),
    "FloatForUint8": (BYTES, np.full(3, 0.5), "float64"),
    "OneForThree": (FLOATS, np.zeros(1, np.float32), r"shape (1,) does not fit Box(-1.0, 1.0, (3,), float32)"),
    "ScalarForThree": (FLOATS, 0.0, r"shape () does not fit Box(-1.0, 1.0, (3,), float32)"),
    "ArrayForDiscrete": (spaces.Discrete(3), np.zeros(1, np.int64), "shape (1,) does not fit Discrete(3)"),
    "OneForThreeInDict": (BOTH, {"a": np.zeros(1), "b": 1}, "does not fit Dict"),
    "NoNumbers": (spaces.Box(-1, 1, (0,)), np.zeros(0, np.float32), "no numbers"),
}
FITS = {
    "Float64ForFloat32": (FLOATS, np.zeros(3)),
    "List": (FLOATS, [0.0, 0.5, 1.0]),
    "ZeroD": (spaces.Discrete(3), np.array(1)),
    "Int": (spaces.Discrete(3), 1),
    "ListInDict": (BOTH, {"a": [0.0, 0.5, 1.0], "b": np.int64(1)}),
}
for name, (space, shown, *_) in (MISFITS | FITS).items():
    gym.register(f"{name}-v0", Shows, kwargs={"space": space, "shown": shown})
PUZZLES = {
    "Vector-Discrete": (spaces.Box(-1, 1, (8,), np.float32), spaces.Discrete(4, start=2)),
    "Float64-Box": (spaces.Box(-np.inf, np.inf, (4, 3), np.float64), spaces.Box(-3, 12, (2, 2), np.float32)),
    "ChannelsFirst-MultiBinary": (spaces.Box(0, 255, (4, 36, 36), np.uint8), spaces.MultiBinary(3)),
    "ChannelsLast-Box": (spaces.Box(0, 255, (40, 36, 3), np.uint8), spaces.Box(-2, 2, (3,), np.float64)),
    "Stacked-Discrete": (spaces.Box(0, 255, (2, 36, 36, 3), np.uint8), spaces.Discrete(4)),
    "Dict-MultiDiscrete": (
        spaces.Dict({"a": spaces.Box(-1, 1, (2, 2), np.float64), "b": spaces.Discrete(5)}),
        spaces.MultiDiscrete([3, 5, 2]),
    ),
    "Tuple-MultiDiscrete": (
        spaces.Tuple([spaces.MultiBinary(4), spaces.Box(-1, 1, (3,), np.float32)]),
        spaces.MultiDiscrete([[3, 2], [4, 3]]),
    ),
    "Discrete-MultiBinary": (spaces.Discrete(30), spaces.MultiBinary((2, 2))),
    "MultiDiscrete-Discrete": (spaces.MultiDiscrete([9, 9, 9]), spaces.Discrete(5)),
    "MultiBinary-Box": (spaces.MultiBinary(12), spaces.Box(0, 100, (1,), np.float32)),
}
for name, (observation_space, action_space) in PUZZLES.items():
    kwargs = {"observation_space": observation_space, "action_space": action_space}
    gym.register(f"{name}-v0", Puzzle, kwargs=kwargs)


def puzzle_flags(name: str) -> dict:
    """What learns a puzzle in seconds.

    The right action says nothing of what comes next: gamma is 0. Once all actions are right the advantages are noise,
    which normalising would blow up.
    """
    image = "Channels" in name or "Stacked" in name
    flags = {"env_id": f"toy_envs:{name}-v0", "num_steps": 32, "gamma": 0.0, "update_epochs": 4, "log_std_init": -1.0}
    flags |= {"total_timesteps": 8192 if image else 16384, "learning_rate": 3e-4 if image else 3e-3}
    return flags | {"normalize_advantages": False}
