"""What batches of a pre-training come to, summed on the device: losses, hits, frames, audio, labels."""

import torch
from torch import Tensor

from speechbrain_bestrq.pretraining_model import PretrainingModel, PretrainingOutput

#: Sums over batches, in the order of :attr:`Tally.sums`; the model's loss terms come after.
SUMS = ("targets", "loss", "correct", "frames", "seconds")

#: Share of the label histogram that :meth:`Tally.begin_update` keeps: a memory of some hundred updates.
HISTOGRAM_MEMORY = 0.995


class Tally:
    """Adds up batches, and tells the averages. Nothing of it makes the host wait for the device.

    Arguments
    ---------
    model : PretrainingModel
        Whose batches they are.
    device : torch.device or str
        Where.

    Attributes
    ----------
    sums : Tensor
        Of what has been added since :meth:`begin_update`, on this rank; float64.
    histogram : Tensor or None
        How often each label was met lately on this rank, as the model counts them; None before the first batch.
    """

    def __init__(self, model: PretrainingModel, device: torch.device | str):
        self.model, self.device = model, device
        self.names = (*SUMS, *model.loss_terms)
        self.histogram: Tensor | None = None
        self.sums = self.zeros()

    def zeros(self) -> Tensor:
        """Sums of nothing."""
        return torch.zeros(len(self.names), dtype=torch.float64, device=self.device)

    def begin_update(self) -> None:
        """Begin the sums anew; the histogram fades."""
        self.sums = self.zeros()
        if self.histogram is not None:
            self.histogram *= HISTOGRAM_MEMORY

    def add(self, output: PretrainingOutput, seconds: float) -> None:
        """Add a batch.

        Arguments
        ---------
        output : PretrainingOutput
            What the model gave.
        seconds : float
            Of audio in the batch.
        """
        metrics, targets = output.metrics, output.num_targets
        self.sums += torch.stack(
            [
                torch.full_like(self.sums[0], targets),
                output.loss.detach().double() * targets,
                metrics["correct"].double() / self.model.labels_per_target,
                metrics["frames"].double(),
                torch.full_like(self.sums[0], seconds),
                *(metrics[name].double() * targets for name in self.model.loss_terms),
            ]
        )
        if self.histogram is None:
            self.histogram = torch.zeros_like(metrics["label_counts"])
        # probabilities that are no numbers, of a batch whose update is skipped, would stay in it for ever
        self.histogram += metrics["label_counts"].nan_to_num(0.0, 0.0, 0.0)

    def shared_histogram(self, ranks: int) -> Tensor:
        """Add up the histograms of so many ranks, in a copy; a collective of them."""
        shared = self.histogram.clone()
        if ranks > 1:
            torch.distributed.all_reduce(shared)
        return shared

    def averages(self, sums: Tensor, ranks: int) -> dict[str, Tensor]:
        """Tell loss and label statistics; a collective of all ranks.

        Arguments
        ---------
        sums : Tensor
            As :attr:`sums`, of all ranks already.
        ranks : int
            How many there are.

        Returns
        -------
        dict
            Scalars: "loss", the model's loss terms, "accuracy", "mask_ratio", and what the model says of its labels.
        """
        by_name = dict(zip(self.names, sums.unbind(), strict=True))
        targets = by_name["targets"].clamp(min=1)
        loss = by_name["loss"] / targets
        return {
            "loss": loss,
            **{name: by_name[name] / targets for name in self.model.loss_terms},
            "accuracy": by_name["correct"] / targets,
            **self.model.statistics(loss, self.shared_histogram(ranks)),
            "mask_ratio": by_name["targets"] / by_name["frames"].clamp(min=1),
        }
