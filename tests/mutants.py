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

from twins import DECOUPLED, FABRIC, ROOT, SOURCE, definitions

FILES = (SOURCE, FABRIC, DECOUPLED)
COUPLED = (SOURCE, FABRIC)


class Mutant(NamedTuple):
    name: str
    function: str
    old: str
    new: str
    tests: str
    files: tuple[str, ...] = FILES


MUTANTS = [
    Mutant(
        "truncation taken for termination",
        "collect_rollout",
        'rollout["terminations"][t] = terminations',
        'rollout["terminations"][t] = terminations | truncations',
        "test_algorithm.py -k reset_rows",
    ),
    Mutant(
        "termination bootstraps",
        "compute_gae",
        " * ~terminations",
        "",
        "test_algorithm.py -k gae",
    ),
    Mutant(
        "GAE's trace crosses the ends of episodes",
        "compute_gae",
        " * ~dones",
        " * np.ones_like(deltas)",
        "test_algorithm.py -k gae",
    ),
    Mutant(
        "rows of resets are experience",
        "make_batch",
        "torch.from_numpy(~resets[:-1])",
        "torch.from_numpy(~resets[:-1] | True)",
        "test_algorithm.py -k reset_rows",
    ),
    Mutant(
        "rows of resets are in the normalisers",
        "update_normalizers",
        "is_valid = ~rollout",
        "is_valid = True | ~rollout",
        "test_training.py -k reset_rows",
    ),
    Mutant(
        "the mask of missing choices is dropped",
        "Agent",
        "*mask_or_log_std.shape) + mask_or_log_std}",
        "*mask_or_log_std.shape)}",
        "test_algorithm.py -k categorical",
    ),
    Mutant(
        "the clipped loss counts where it is the smaller",
        "ppo_loss",
        "unclipped_loss >= clipped_loss",
        "unclipped_loss <= clipped_loss",
        "test_algorithm.py -k loss",
    ),
    Mutant(
        "the clipped value loss counts where it is the smaller",
        "ppo_loss",
        "value_loss >= clipped_loss",
        "value_loss <= clipped_loss",
        "test_algorithm.py -k loss",
    ),
    Mutant(
        "the entropy is punished",
        "ppo_loss",
        'entropy_loss = -outputs["entropy"]',
        'entropy_loss = outputs["entropy"]',
        "test_algorithm.py -k loss",
    ),
    Mutant(
        "the normalisers forget the variance between batches",
        "RunningMeanStd",
        "new_squares - deviations**2 / count",
        "new_squares",
        "test_algorithm.py -k statistics",
    ),
    Mutant(
        "the normalisers learn in evaluation",
        "evaluate",
        "        returns += np.where",
        "        if agent.obs_rms:\n"
        "            agent.obs_rms.update(torch.as_tensor(obs), lambda tensor: tensor)\n"
        "        returns += np.where",
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
        'with open(f"{folder}/incomplete", "wb")',
        'with open(f"{folder}/{name}.pt", "wb")',
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
        "load_optimizer",
        '{"state": moments}',
        "{}",
        "test_checkpoints.py -k stopped_and_resumed",
        COUPLED,
    ),
    Mutant(
        "a lost run's logs stay",
        "Log",
        "purge_step=global_step + 1 if global_step else None",
        "purge_step=None",
        "test_checkpoints.py -k costs_no_more",
    ),
    Mutant(
        "what is not finite goes on",
        "check_finite",
        "if not finite.all():",
        "if False:",
        "test_algorithm.py -k not_finite",
    ),
    Mutant(
        "each rank normalises its own advantages",
        "normalize",
        'numbers["advantages"].sum() / valid_rows',
        'numbers["advantages"][0] / numbers["valid_rows"][0]',
        "test_algorithm.py -k numbers_of_a_rollout",
    ),
    Mutant(
        "ranks with fewer rows weigh the same",
        "shuffle",
        "counts[:, None]",
        "counts[:1, None] + 0 * counts[:, None]",
        "test_algorithm.py -k weigh_less",
    ),
    Mutant(
        "the same environments on all ranks",
        "main",
        "args.seed + rows + rank * args.num_envs",
        "args.seed + rows",
        "test_launch.py -k no_seed_twice",
        COUPLED,
    ),
    Mutant(
        "the same actions' noise on all ranks",
        "main",
        "(args.seed, rows, 0, rank)",
        "(args.seed, rows, 0, 0)",
        "test_launch.py -k stop_together",
        COUPLED,
    ),
    Mutant(
        "ranks that share rows shuffle them differently",
        "main",
        "0 if args.share_data else rank))",
        "rank))",
        "test_launch.py -k sharing_ranks",
        COUPLED,
    ),
    Mutant(
        "gradients are not exchanged over TCP",
        "make_train_step",
        "grad.copy_(reduce_gradients(grad) / world_size)",
        "pass",
        "test_launch.py -k over_tcp",
    ),
    Mutant(
        "DDP does not wrap the model",
        "main",
        "DistributedDataParallel(agent) if uses_ddp else agent",
        "agent",
        "test_launch.py -k over_tcp",
        (SOURCE,),
    ),
    Mutant(
        "each rank decides on the KL divergence",
        "update",
        'gather({"approx_kl": approx_kl})["approx_kl"].mean()',
        "approx_kl",
        "test_algorithm.py -k of_all_ranks",
    ),
    Mutant(
        "a layer is trained and does not act",
        "Agent",
        "self.policy(self.actor(features), minibatch, self.mask_or_log_std())",
        "self.policy(self.actor(features) * 1.01, minibatch, self.mask_or_log_std())",
        "test_algorithm.py -k acting_and_training",
    ),
    Mutant(
        "a frozen network is trained",
        "make_optimizer",
        "if p.requires_grad",
        "if True",
        "test_training.py -k frozen",
    ),
    Mutant(
        "overlap forgets who acted",
        "train",
        "copy.deepcopy(agent) if args.overlap else agent",
        "agent",
        "test_decoupled.py -k corrects",
        (DECOUPLED,),
    ),
    Mutant(
        "overlap clips around the agent that acted",
        "recenter",
        '    batch["logprobs"] = logprobs\n',
        "",
        "test_decoupled.py -k recenter",
        (DECOUPLED,),
    ),
    Mutant(
        "what pads the trainers' parts is experience",
        "pack_rollout",
        'is_reset = name == "resets"',
        "is_reset = False",
        "test_decoupled.py -k dealt",
        (DECOUPLED,),
    ),
    Mutant(
        "a twin is edited",
        "compute_gae",
        "gamma * gae_lambda",
        "gae_lambda * gamma",
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
