"""The mean of two adapters of one base model: what the second run has learnt, with less of what it has unlearnt.

python examples/average_adapters.py my-run/adapter my-run-2/adapter my-adapter
"""

import dataclasses
import sys

from activation_beacon.persistence import load_adapter_config, load_adapter_tensors, save_adapter


def average(first: str, second: str, target: str) -> None:
    """Write the mean of two adapters to `target`, in the dtype of the first."""
    configs = [load_adapter_config(folder) for folder in (first, second)]
    if any(
        dataclasses.replace(config, training=None) != dataclasses.replace(configs[0], training=None)
        for config in configs
    ):
        raise SystemExit(f"{first} and {second} have different settings. Average adapters of one recipe's config only.")
    tensors = [load_adapter_tensors(folder) for folder in (first, second)]
    mean = {
        name: ((tensor.float() + tensors[1][name].float()) / 2).to(tensor.dtype) for name, tensor in tensors[0].items()
    }
    runs = [config.training or {} for config in configs]
    totals = {key: round(sum(run.get(key, 0) for run in runs), 1) for key in ("steps", "tokens", "minutes")}
    config = dataclasses.replace(configs[0], training={**totals, "weights": "mean of two runs", "runs": runs})
    save_adapter(target, config, mean)


if __name__ == "__main__":
    average(*sys.argv[1:4])
