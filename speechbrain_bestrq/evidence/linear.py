"""Probes that are solved rather than trained: linear classifiers, whitening within classes, effective rank."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

#: Strengths of the weights' penalty that are tried; the validation set chooses.
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
#: Steps of L-BFGS at most, for each.
MOST_STEPS = 200
#: How far a covariance is drawn to a multiple of the identity, so that it can be inverted.
SHRINKAGE = 0.1


class Score(NamedTuple):
    """What a probe came to, shares of 1."""

    valid: float
    """On the validation set."""
    test: float


class Examples(NamedTuple):
    """Vectors and their classes."""

    vectors: Tensor
    """Shape (N, D)."""
    classes: Tensor
    """int64, shape (N,)."""


def linear_probe(
    train: Examples, valid: Examples, test: Examples, num_classes: int, penalties: Sequence[float] = PENALTIES
) -> Score:
    """Accuracy of a logistic regression on vectors that are standardised by the training set.

    Arguments
    ---------
    train, valid, test : Examples
        The validation set chooses the penalty.
    num_classes : int
        Classes are 0 to ``num_classes`` - 1.
    penalties : sequence of float
        Of half the squared weights, beside the mean cross-entropy.

    Returns
    -------
    Score
        Of the penalty that is best on the validation set.

    Example
    -------
    >>> vectors = torch.tensor([[-1.0, 0.3], [-2.0, -0.1], [1.0, 0.2], [3.0, 0.1]])
    >>> examples = Examples(vectors, torch.tensor([0, 0, 1, 1]))
    >>> linear_probe(examples, examples, examples, 2)
    Score(valid=1.0, test=1.0)
    """
    mean, scale = standardisation(train.vectors)
    sets = [((one.vectors - mean) * scale, one.classes) for one in (train, valid, test)]
    weight = train.vectors.new_zeros(train.vectors.shape[1], num_classes)
    bias = train.vectors.new_zeros(num_classes)
    found = []
    for penalty in sorted(penalties, reverse=True):  # the solution of the stronger is where the weaker begins
        weight, bias = _fit(*sets[0], penalty, weight, bias)
        accuracies = [float(((x @ weight + bias).argmax(1) == y).double().mean()) for x, y in sets[1:]]
        found.append(Score(*accuracies))
    return max(found, key=lambda score: score.valid)


def _fit(vectors: Tensor, classes: Tensor, penalty: float, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Weight (D, C) and bias (C,), from those given."""
    weight, bias = (one.clone().requires_grad_() for one in (weight, bias))
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=MOST_STEPS, tolerance_grad=1e-4, tolerance_change=1e-6, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(vectors @ weight + bias, classes) + penalty / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return weight.detach(), bias.detach()


def standardisation(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Find what makes the mean of each dimension 0 and its deviation 1; one that is the same everywhere becomes 0.

    Arguments
    ---------
    vectors : Tensor
        Shape (N, D).

    Returns
    -------
    mean : Tensor
        Shape (D,), to be subtracted.
    scale : Tensor
        Shape (D,), to multiply by then.

    Example
    -------
    >>> standardisation(torch.tensor([[1.0, 5.0], [5.0, 5.0]]))
    (tensor([3., 5.]), tensor([0.5000, 0.0000]))
    """
    mean, deviation = vectors.mean(0), vectors.std(0, correction=0)
    return mean, torch.where(deviation > 1e-6 * mean.abs(), 1 / deviation, 0.0)


def within_class_whitening(examples: Examples, shrinkage: float = SHRINKAGE) -> Tensor:
    """Find the linear map after which the scatter within classes is the same in all directions.

    Within-class covariance normalisation (Hatch et al., 2006): cosines of vectors so
    mapped tell classes apart that were not in the examples.

    Arguments
    ---------
    examples : Examples
    shrinkage : float
        The share of the identity, scaled to the covariance's trace, in the covariance.

    Returns
    -------
    Tensor
        Shape (D, D), to multiply vectors with from the right.

    Example
    -------
    >>> vectors = torch.tensor([[0.0, 10.0], [0.0, -10.0], [1.0, 10.0], [1.0, -10.0]])
    >>> mapping = within_class_whitening(Examples(vectors, torch.tensor([0, 0, 1, 1])), shrinkage=0.01)
    >>> (vectors @ mapping).abs().max(0).values
    tensor([1.4142, 1.0025])
    """
    vectors, classes = examples.vectors.double(), examples.classes
    number = int(classes.max()) + 1
    sums = vectors.new_zeros(number, vectors.shape[1]).index_add_(0, classes, vectors)
    counts = torch.bincount(classes, minlength=number).clamp(min=1)
    apart = vectors - (sums / counts[:, None])[classes]
    covariance = apart.T @ apart / len(vectors)
    identity = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    level = covariance.diagonal().mean().clamp(min=1e-12)
    covariance = (1 - shrinkage) * covariance + shrinkage * level * identity
    return torch.linalg.cholesky(torch.linalg.inv(covariance)).to(examples.vectors.dtype)


def effective_rank(vectors: Tensor) -> float:
    """The number of directions that vectors use: the exponential of the entropy of their variances' shares.

    Roy and Vetterli (2007), of the eigenvalues of the covariance. Between 1 and D.

    Arguments
    ---------
    vectors : Tensor
        Shape (N, D).

    Returns
    -------
    float

    Example
    -------
    >>> round(effective_rank(torch.tensor([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, -1.0, 0.0]])), 3)
    2.0
    """
    centred = vectors.double() - vectors.double().mean(0)
    shares = torch.linalg.eigvalsh(centred.T @ centred).clamp(min=0)
    shares = shares / shares.sum().clamp(min=torch.finfo(shares.dtype).tiny)
    return float(torch.special.entr(shares).sum().exp())
