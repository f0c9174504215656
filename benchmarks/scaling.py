"""A model of pre-training on several GPUs: how long an update takes, and what of it is not computing.

    python benchmarks/scaling.py --speed 6.5
    python benchmarks/scaling.py --speed 0.1 6.5 --devices 1 8 64 --network 50

Nothing is measured on GPUs here: --speed is the measured speed of one (pretrain_step.py), in hours of audio a second,
and the bandwidths are the machine's. The model: an update's audio is shared by the ranks in micro-batches; gradients
(fp32) are summed by a ring all-reduce, 2 (N - 1) / N of their bytes through the slowest link of each rank, in
buckets, while the last micro-batch's backward pass (two thirds of its time) goes on; what does not fit into that is
waited for, and so is the last bucket. Ranks also wait for the one with the longest batch: how long, is computed from
the project's own batch plan for LibriSpeech-like lengths. docs/scaling.md discusses what comes out.
"""

import argparse
from dataclasses import dataclass

import numpy as np
from common import RATE, librispeech_lengths

from speechbrain_bestrq.batching import LadderBatchSampler

#: Of DistributedDataParallel, bytes.
BUCKET = 25e6
BACKWARD_SHARE = 2 / 3


@dataclass
class Update:
    """Seconds of an update's parts, on each rank."""

    computing: float
    waiting_for_ranks: float
    reducing: float
    """All-reduce, overlapped or not."""
    exposed: float
    """What of it is waited for."""

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.computing + self.waiting_for_ranks + self.exposed

    @property
    def efficiency(self) -> float:
        """Share in which a rank computes."""
        return self.computing / self.seconds


def model_update(
    update_hours: float,
    speed: float,
    devices: int,
    gradient_bytes: float,
    gigabytes_per_second: float,
    micro_batch_seconds: float,
    imbalance: float,
) -> Update:
    """Model an update.

    Arguments
    ---------
    update_hours : float
        Audio of an update, on all ranks together.
    speed : float
        Of one device, hours of audio a second.
    devices : int
        Ranks N.
    gradient_bytes : float
        Of all parameters.
    gigabytes_per_second : float
        Through the slowest link of a rank, in each direction.
    micro_batch_seconds : float
        Audio of a micro-batch on a rank, at most its share of the update.
    imbalance : float
        By how much the longest batch of a group exceeds the mean, as a share of it.

    Returns
    -------
    Update
    """
    computing = update_hours / devices / speed
    last = min(micro_batch_seconds / 3600, update_hours / devices) / speed
    reducing = 2 * (devices - 1) / devices * gradient_bytes / gigabytes_per_second / 1e9
    bucket = reducing * min(BUCKET / gradient_bytes, 1.0)
    exposed = max(reducing - BACKWARD_SHARE * last, bucket)
    return Update(computing, imbalance * computing if devices > 1 else 0.0, reducing, exposed)


def measure_imbalance(devices: int, micro_batch_seconds: float, utterances: int = 60000) -> float:
    """By how much the longest batch that ranks take together exceeds their mean, over an epoch."""
    lengths = librispeech_lengths(utterances)
    samplers = [
        LadderBatchSampler(lengths, round(micro_batch_seconds * RATE), rank=rank, world_size=devices)
        for rank in range(devices)
    ]
    audio = np.array([[len(plan.indices) * plan.samples for plan in sampler] for sampler in samplers])
    return audio.max(0).sum() / audio.mean(0).sum() - 1


def table(arguments: argparse.Namespace) -> str:
    """The model's figures, as Markdown."""
    gradient_bytes = 4e6 * arguments.parameters
    lines = [
        f"{arguments.parameters:g} M parameters; updates of {arguments.update_hours:g} h, {arguments.updates} of them; "
        f"micro-batches of at most {arguments.micro_batch:g} s; {arguments.devices_per_node} GPUs a node, "
        f"{arguments.node_link:g} GB/s between them, {arguments.network:g} GB/s for each to other nodes",
        "",
        "| h/s of one GPU | GPUs | computing, ms | waiting for ranks, ms | all-reduce, ms | of it exposed, ms "
        "| computing share | days | GPU-days |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    micro_batches = {
        devices: min(arguments.micro_batch, 3600 * arguments.update_hours / devices) for devices in arguments.devices
    }
    imbalances = {
        devices: measure_imbalance(devices, seconds) if devices > 1 else 0.0
        for devices, seconds in micro_batches.items()
    }
    for speed in arguments.speed:
        for devices in arguments.devices:
            link = arguments.node_link if devices <= arguments.devices_per_node else arguments.network
            update = model_update(
                arguments.update_hours,
                speed,
                devices,
                gradient_bytes,
                link,
                micro_batches[devices],
                imbalances[devices],
            )
            days = update.seconds * arguments.updates / 86400
            parts = (update.computing, update.waiting_for_ranks, update.reducing, update.exposed)
            cells = [f"{speed:g}", f"{devices}", *(f"{1e3 * part:.1f}" for part in parts)]
            lines.append(f"| {' | '.join(cells)} | {update.efficiency:.0%} | {days:.2f} | {days * devices:.1f} |")
    return "\n".join(lines)


def main(words: list[str] | None = None) -> None:
    """Model, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speed", type=float, nargs="+", required=True, help="of one GPU, hours of audio a second")
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 8, 16, 64], help="GPUs")
    parser.add_argument("--update_hours", type=float, default=2.0, help="audio of an update (%(default)s)")
    parser.add_argument("--updates", type=int, default=300000, help="(%(default)s)")
    parser.add_argument("--micro_batch", type=float, default=800.0, help="seconds on a GPU at once (%(default)s)")
    parser.add_argument("--parameters", type=float, default=90.0, help="millions (%(default)s)")
    parser.add_argument("--devices_per_node", type=int, default=8, help="(%(default)s)")
    parser.add_argument("--node_link", type=float, default=450.0, help="GB/s of a GPU, each way (%(default)s)")
    parser.add_argument("--network", type=float, default=50.0, help="GB/s of a GPU, each way (%(default)s)")
    arguments = parser.parse_args(words)
    numbers = [value for name, value in vars(arguments).items() if name not in ("speed", "devices")]
    if min([*numbers, *arguments.speed, *arguments.devices]) <= 0:
        parser.error("all numbers must be above 0")
    print(table(arguments))


if __name__ == "__main__":
    main()
