"""Run a shipped file's `main` and save what its `update` saw and made: `probe.py FILE FOLDER [FLAGS]`.

FOLDER/RANK.pt then holds a dictionary: `before` and `after` (the parameters as one vector, before the first and after
each update), `batches` (what each update was given), `received` (with overlap, the same before `recenter`), `steps`
(the optimiser's count of steps after the last), `reduces` (the function that sums over the ranks), `state` (the agent's
state_dict at the end), `cpus` (that the rank may use), `normalised` (by their size, the rows that the normalisers took
in). On rank $BREAKS the third update raises an exception, on rank $DRIFTS it leaves other parameters and another state
of the optimizer. $CPUS is the number of processors that the machine appears to have.
"""

import importlib.util
import os
import sys

import torch
import tyro


def load(path: str):
    spec = importlib.util.spec_from_file_location("shipped", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["shipped"] = module
    spec.loader.exec_module(module)
    return module


def probe(module) -> dict:
    """Wrap the module's `update` and `recenter` to note what they get and make in the dictionary returned."""
    notes = {"before": None, "after": [], "batches": [], "received": [], "normalised": {}, "steps": 0}
    update, recenter = module.update, getattr(module, "recenter", None)

    def vector(model):
        return torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()

    def noting_update(model, optimizer, batch, *rest):
        if notes["before"] is None:
            notes["before"] = vector(model)
        if len(notes["after"]) == 2 and "BREAKS" in os.environ and os.environ["BREAKS"] == os.environ["RANK"]:
            raise RuntimeError("the update broke")
        notes["batches"].append({name: tensor.clone() for name, tensor in batch.items()})
        result = update(model, optimizer, batch, *rest)
        if len(notes["after"]) == 2 and os.environ.get("DRIFTS", "none") == os.environ.get("RANK"):
            next(model.parameters()).data += 1e-3
            next(iter(optimizer.state.values()))["exp_avg"] += 1e-3
        notes["after"].append(vector(model))
        notes["reduces"] = getattr(rest[3], "func", rest[3])
        notes["steps"] = int(next(iter(optimizer.state.values()))["step"])
        notes["model"] = model
        return result

    def noting_recenter(agent, batch):
        notes["received"].append({name: tensor.clone() for name, tensor in batch.items()})
        recenter(agent, batch)

    class NotingAgent(module.Agent):
        def __init__(self, *args):
            super().__init__(*args)
            notes["agent"] = self

    class NotingNormalizer(module.Normalizer):
        def sums(self, rows):
            notes["normalised"].setdefault(rows.shape[1], []).append(rows.clone())
            return super().sums(rows)

    module.update, module.recenter = noting_update, noting_recenter
    module.Agent, module.Normalizer = NotingAgent, NotingNormalizer
    return notes


if __name__ == "__main__":
    path, folder, *flags = sys.argv[1:]
    if "CPUS" in os.environ:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(os.environ["CPUS"])])
    module = load(path)
    notes = probe(module)
    module.main(tyro.cli(module.Args, args=flags))
    notes.pop("model", None)
    notes["reduces"] = getattr(notes.pop("reduces", None), "__name__", "")
    notes["cpus"] = sorted(os.sched_getaffinity(0))
    notes["state"] = notes.pop("agent").state_dict()
    torch.save(notes, os.path.join(folder, f"{os.environ.get('RANK', 0)}.pt"))
