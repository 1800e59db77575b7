"""Run a shipped file's `main` and save what its `update` saw and made: `probe.py FILE FOLDER [FLAGS]`.

FOLDER/RANK.pt then holds a dictionary. Of a rank that trains: `before` and `after` (the parameters as one vector,
before the first and after each update), `batches` (what each update was given), `received` (the same before
`recenter`, with --overlap), `rows` and `weights` (of the minibatches of each first epoch), `steps` (the optimizer's
count after the last), `exchange` (of gradients), `normalised` (by their size, the rows that the normalisers took in).
Of one that steps: `acted` (the parameters in each rollout) and `rollouts`. Of each: `state` (the agent's state_dict at
the end), `seeds` (of the environments). With $GREEDY the agent samples no actions.
"""

import importlib.util
import os
import sys
from itertools import chain

import torch
import tyro


def load(path: str):
    spec = importlib.util.spec_from_file_location("shipped", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["shipped"] = module
    spec.loader.exec_module(module)
    return module


def probe(module) -> dict:
    """Wrap functions of the module to note what they get and make in the dictionary returned."""
    lists = ("after", "batches", "received", "rows", "weights", "seeds", "acted", "rollouts")
    notes = {"before": None, "normalised": {}} | {name: [] for name in lists}
    update, make_optimizer, collect_rollout = module.update, module.make_optimizer, module.collect_rollout
    make_envs, normalise, sample = module.make_envs, module.RunningMeanStd.update, module.Agent.sample

    def vector():
        return torch.nn.utils.parameters_to_vector(notes["agent"].parameters()).detach().clone()

    def noting_update(batch, train_step, epochs, *rest):
        if notes["before"] is None:
            notes["before"] = vector()
        notes["batches"].append({name: tensor.clone() for name, tensor in batch.items()})
        first = next(epochs)
        result = update(batch, train_step, chain([first], epochs), *rest)
        notes["after"].append(vector())
        notes["rows"].append(first["rows"])
        notes["weights"].append(first["weights"])
        (state, *_) = notes["optimizer"].state.values()
        notes["steps"] = int(state["step"])
        return result

    def noting_optimizer(agent, args):
        notes["agent"] = agent
        made = make_optimizer(agent, args)
        notes["optimizer"], _ = made
        return made

    def noting_rollout(agent, envs, rollout, *rest):
        notes["agent"] = agent
        notes["acted"].append(vector())
        result = collect_rollout(agent, envs, rollout, *rest)
        notes["rollouts"].append({name: torch.from_numpy(array.copy()) for name, array in rollout.items()})
        return result

    def noting_envs(args, num_envs, seed, *rest):
        notes["seeds"] += range(seed, seed + num_envs)
        return make_envs(args, num_envs, seed, *rest)

    def noting_normaliser(self, rows, all_reduce):
        notes["normalised"].setdefault(rows.shape[1], []).append(rows.clone())
        return normalise(self, rows, all_reduce)

    module.update, module.make_optimizer, module.collect_rollout = noting_update, noting_optimizer, noting_rollout
    module.make_envs, module.RunningMeanStd.update = noting_envs, noting_normaliser
    if "GREEDY" in os.environ:
        module.Agent.sample = lambda self, outputs, noise=None: sample(self, outputs)
    if hasattr(module, "choose_exchange"):
        choose_exchange = module.choose_exchange

        def noting_exchange(*args):
            notes["exchange"] = choose_exchange(*args)
            return notes["exchange"]

        module.choose_exchange = noting_exchange
    if hasattr(module, "recenter"):
        recenter = module.recenter

        def noting_recenter(agent, batch):
            notes["received"].append({name: tensor.clone() for name, tensor in batch.items()})
            recenter(agent, batch)

        module.recenter = noting_recenter
    return notes


if __name__ == "__main__":
    path, folder, *flags = sys.argv[1:]
    module = load(path)
    notes = probe(module)
    module.main(tyro.cli(module.Args, args=flags))
    notes["state"] = notes.pop("agent").state_dict()
    notes.pop("optimizer", None)
    torch.save(notes, os.path.join(folder, f"{os.environ.get('RANK', 0)}.pt"))
