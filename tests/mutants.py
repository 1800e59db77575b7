"""Faults to plant in the shipped files, and the tests that find them.

    python tests/mutants.py                # each fault in a copy of the project; exit 1 if one is not found
    python tests/mutants.py gae checkpoint # those whose names contain one of these words

A mutant names a function and what it changes there, in every file that has the function, so that twins stay twins. One
whose place is not found is an error: it has to follow the files as they change. The tests named are of the default
`pytest`; they run alone, as one that fails is enough.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from twins import ROOT, SOURCE, TWINS, definitions

FABRIC, DECOUPLED = TWINS


class Mutant(NamedTuple):
    name: str
    function: str
    old: str
    new: str
    tests: str
    files: tuple[str, ...] = (SOURCE, *TWINS)


MUTANTS = [
    Mutant(
        "truncation taken for termination",
        "collect_rollout",
        "actions, reward, terminated\n",
        "actions, reward, done\n",
        "test_algorithm.py -k reset_rows_are_marked",
    ),
    Mutant(
        "termination bootstraps",
        "compute_gae",
        " * ~terminated",
        "",
        "test_algorithm.py -k gae",
    ),
    Mutant(
        "GAE's trace crosses the ends of episodes",
        "compute_gae",
        "(~dones).to(values.dtype)",
        "torch.ones_like(deltas)",
        "test_algorithm.py -k gae",
    ),
    Mutant(
        "rows of resets are experience",
        "collect_rollout",
        "~dones[:-1].to(device)",
        "torch.ones_like(~dones[:-1])",
        "test_training.py -k reset_rows",
    ),
    Mutant(
        "the mask of missing choices is dropped",
        "Agent",
        "+ self.padding).log_softmax",
        ").log_softmax",
        "test_algorithm.py -k categorical",
    ),
    Mutant(
        "the clipped loss counts where it is the smaller",
        "larger",
        "loss >= clipped",
        "loss <= clipped",
        "test_algorithm.py -k loss",
    ),
    Mutant(
        "the entropy is punished",
        "ppo_loss",
        "loss - args.ent_coef",
        "loss + args.ent_coef",
        "test_algorithm.py -k loss",
    ),
    Mutant(
        "the normalisers forget the variance between batches",
        "Normalizer",
        "self.squares.add_(squares - deviations.square() / self.count)",
        "self.squares.add_(squares)",
        "test_algorithm.py -k statistics",
    ),
    Mutant(
        "the normalisers learn in evaluation",
        "evaluate",
        "        actions = agent.act(",
        "        for normalizer in agent.normalizers.values():\n"
        "            normalizer.merge(normalizer.sums(obs[:, : normalizer.count.numel()]))\n"
        "        actions = agent.act(",
        "test_launch.py -k normalisers",
    ),
    Mutant(
        "evaluation goes on counting after an episode's end",
        "evaluate",
        "np.where(running, rewards, 0.0)",
        "rewards",
        "test_algorithm.py -k evaluat",
    ),
    Mutant(
        "a checkpoint is written in place",
        "save_checkpoint",
        'f"{folder}/incomplete"',
        "path",
        "test_checkpoints.py -k writer_killed",
    ),
    Mutant(
        "a checkpoint may run code",
        "load_checkpoint",
        "weights_only=True",
        "weights_only=False",
        "test_checkpoints.py -k bad_checkpoint",
    ),
    Mutant(
        "the optimizer starts anew on resume",
        "restore",
        "    if optimizer:",
        "    if False:",
        "test_checkpoints.py -k stopped_and_resumed",
    ),
    Mutant(
        "a lost run's logs stay",
        "truncate_logs",
        ".step > global_step",
        ".step > 10**9",
        "test_checkpoints.py -k costs_no_more",
    ),
    Mutant(
        "each rank normalises its own advantages",
        "main",
        "sums = [all_reduce(tensor) for tensor in sums]",
        "sums = [world_size * tensor for tensor in sums]",
        "test_launch.py -k different_rollouts",
        (SOURCE, FABRIC),
    ),
    Mutant(
        "the same environments on all ranks",
        "main",
        "args.seed + rows + rank * args.num_envs",
        "args.seed + rows",
        "test_launch.py -k no_seed_twice",
        (SOURCE, FABRIC),
    ),
    Mutant(
        "the same actions' noise on all ranks",
        "main",
        "stream_seeds[2 * rank]",
        "stream_seeds[0]",
        "test_launch.py -k stop_together",
        (SOURCE, FABRIC),
    ),
    Mutant(
        "ranks that share rows shuffle them differently",
        "main",
        "stream_seeds[1 if args.share_data else 2 * rank + 1]",
        "stream_seeds[2 * rank + 1]",
        "test_launch.py -k sharing_ranks",
        (SOURCE, FABRIC),
    ),
    Mutant(
        "gradients are not exchanged over TCP",
        "update",
        "flat.grad = all_reduce(flat.grad).div_(world_size)",
        "pass",
        "test_launch.py -k over_tcp",
        (SOURCE,),
    ),
    Mutant(
        "DDP does not wrap the model",
        "main",
        "DistributedDataParallel(agent) if world_size > 1 and not args.tcp_all_reduce else agent",
        "agent",
        "test_launch.py -k different_rollouts",
        (SOURCE,),
    ),
    Mutant(
        "each rank decides on the KL divergence",
        "update",
        "all_reduce(torch.stack(metrics[start:])[:, 3].mean()) / world_size",
        "torch.stack(metrics[start:])[:, 3].mean()",
        "test_algorithm.py -k of_all_ranks",
        (SOURCE, FABRIC),
    ),
    Mutant(
        "overlap forgets who acted",
        "recenter",
        "    log_probs, _, _ = agent(",
        "    return\n    log_probs, _, _ = agent(",
        "test_algorithm.py -k lags_behind",
        (DECOUPLED,),
    ),
    Mutant(
        "a twin is edited",
        "compute_gae",
        "gamma * lam",
        "lam * gamma",
        "test_twins.py",
        (FABRIC,),
    ),
]


def apply(mutant: Mutant, folder: Path) -> None:
    """Plant a fault in the files below a folder; ValueError where its place is not found once in each."""
    for name in mutant.files:
        path = folder / name
        lines = path.read_text().splitlines(keepends=True)
        first, last = definitions("".join(lines))[mutant.function]
        body = "".join(lines[first:last])
        if body.count(mutant.old) != 1:
            raise ValueError(f"{mutant.name}: {body.count(mutant.old)} places in {mutant.function} of {name}")
        path.write_text("".join(lines[:first]) + body.replace(mutant.old, mutant.new) + "".join(lines[last:]))


def is_found(mutant: Mutant, folder: Path) -> bool:
    """Whether the mutant's tests fail in a copy of the project, and do not fail to run."""
    tests = f"tests/{mutant.tests}".split()
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n0", "-p", "no:cacheprovider", *tests]
    result = subprocess.run(command, cwd=folder, text=True, capture_output=True)
    failed = re.findall(r"^FAILED \S+::(\S+)", result.stdout, re.MULTILINE)
    print(f"{mutant.name}: {f'found by {failed[0]}' if failed else 'NOT FOUND'}", flush=True)
    if result.returncode not in (0, 1):
        raise RuntimeError(f"{mutant.name}: {' '.join(tests)} did not run:\n{result.stdout}{result.stderr}")
    return bool(failed)


def copy_project(folder: Path) -> None:
    """The files of the project, without logs and environments."""
    ignored = shutil.ignore_patterns(".*", "__pycache__", "logs", "build")
    shutil.copytree(ROOT, folder, ignore=ignored, dirs_exist_ok=True)


def main(words: list[str]) -> int:
    missed = 0
    for mutant in MUTANTS:
        if not words or any(word in mutant.name for word in words):
            with tempfile.TemporaryDirectory() as folder:
                copy_project(Path(folder))
                apply(mutant, Path(folder))
                missed += not is_found(mutant, Path(folder))
    return missed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) > 0)
