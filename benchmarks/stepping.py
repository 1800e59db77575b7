"""Steps environments with random actions, as fast as they go: the limit of any trainer that steps them in one process.

Takes the flags of ppo_torch_ddp.py that say which environments (others are ignored) and prints `step STEPS` for each
512 rows, reset rows left out.
"""

import sys
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
import ppo_torch_ddp as ppo


def main(args: ppo.Args) -> None:
    envs, *_ = ppo.make_envs(args, args.num_envs, args.seed)
    actions = [np.stack([envs.single_action_space.sample() for _ in range(args.num_envs)]) for _ in range(64)]
    steps, turn, dones = 0, 0, np.zeros(args.num_envs, dtype=bool)
    while steps < args.total_timesteps:
        for _ in range(max(1, 512 // args.num_envs)):
            _, _, terminated, truncated, _ = envs.step(actions[turn % 64])
            steps += args.num_envs - np.count_nonzero(dones)
            dones = terminated | truncated
            turn += 1
        print("step", steps, flush=True)
    envs.close()


if __name__ == "__main__":
    main(tyro.cli(ppo.Args, return_unknown_args=True)[0])
