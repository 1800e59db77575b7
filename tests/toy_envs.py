"""Environments whose right answer is known, registered as `toy_envs:NAME-v0`."""

import os
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
    """Goes wrong at its fifth step: a NaN in the observation or the reward, or an exception on rank 1."""

    def __init__(self, how: str):
        super().__init__()
        self.how = how

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        if self.steps == 5 and self.how == "raises on rank 1" and os.environ["RANK"] == "1":
            raise RuntimeError("the simulator broke")
        if self.steps == 5 and self.how == "obs":
            obs = np.full_like(obs, np.nan)
        if self.steps == 5 and self.how == "reward":
            reward = np.nan
        return obs, reward, terminated, truncated, info


class StrangeSpaces(OneAStep):
    def __init__(self, observation_space=None, action_space=None):
        super().__init__()
        self.observation_space = observation_space or self.observation_space
        self.action_space = action_space or self.action_space


gym.register("Terminated-v0", OneAStep)
gym.register("Truncated-v0", OneAStep, kwargs={"timeless": True, "terminates": False})
gym.register("Diary-v0", Diary)
gym.register("NanObs-v0", Broken, kwargs={"how": "obs"})
gym.register("NanReward-v0", Broken, kwargs={"how": "reward"})
gym.register("RaisesOnRank1-v0", Broken, kwargs={"how": "raises on rank 1"})
gym.register("TextObs-v0", StrangeSpaces, kwargs={"observation_space": gym.spaces.Text(5)})
gym.register("ImageObs-v0", StrangeSpaces, kwargs={"observation_space": gym.spaces.Box(0, 255, (8, 8, 3), np.uint8)})
gym.register("TupleAction-v0", StrangeSpaces, kwargs={"action_space": gym.spaces.Tuple([gym.spaces.Discrete(2)])})
