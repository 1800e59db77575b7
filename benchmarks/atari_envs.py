"""ALE's Pong as its vector environment makes it, one by one: `--env-id atari_envs:StackedPong-v0 --vec-env sync`."""

import ale_py
import gymnasium as gym

gym.register_envs(ale_py)


def make(**kwargs) -> gym.Env:
    """Four stacked grey frames of 84 x 84 pixels, every fourth frame of the game, up to 30 no-ops at the start."""
    env = gym.make("ALE/Pong-v5", frameskip=1, **kwargs)
    return gym.wrappers.FrameStackObservation(gym.wrappers.AtariPreprocessing(env), 4)


gym.register("StackedPong-v0", make)
